"""TSV-Merge: add up the largest singular components of all deltas, after making them orthogonal to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels import multiplied, one_thread, weighted_sum
from ..operator import WHOLE, Part, Parts, PerModel, each, operator
from ..thinning import Scale, Weight

if TYPE_CHECKING:
    from torch import Tensor

Factors = tuple["Tensor", "Tensor"]


def factors(parts: Parts, *, weight: PerModel[float]) -> Factors | None:
    """Find the result as a product left [rows, k] · right [k, width]; nothing where the tensor is no matrix.

    Holds one delta at a time and its singular vectors. One thread of torch computes them, so that no bit depends on
    how many there are.
    """
    import torch

    if len(parts.shape) != 2 or not parts.entries:
        return None
    with one_thread():
        found = [_components(parts, model) for model in range(parts.models)]
        scaled = [s * factor for (_, s, _), factor in zip(found, each(weight, parts.models), strict=True)]
        left = _orthogonal(torch.cat([u for u, _, _ in found], dim=1))
        right = _orthogonal(torch.cat([v for _, _, v in found], dim=0))
        return left * torch.cat(scaled), right


def _components(parts: Parts, model: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give the largest singular components of one delta, as many as a model's share of the rank: u, s, v."""
    import torch

    u, s, v = torch.linalg.svd(parts.gathered(model), full_matrices=False)
    kept = max(1, len(s) // parts.models)
    return u[:, :kept].clone(), s[:kept], v[:kept].clone()


def _orthogonal(vectors: Tensor) -> Tensor:
    """Give the nearest matrix with orthonormal columns, or rows (the Procrustes problem)."""
    import torch

    u, _, v = torch.linalg.svd(vectors, full_matrices=False)
    product: Tensor = u @ v
    return product


@operator(
    source="Gargiulo et al. 2025 (arXiv 2412.00081), section 3.3; AntoAndGar/task_singular_vectors at a6c9718",
    laws=("base",),
    measure=factors,
    holds=6,
)
def tsv(deltas: Tensor, *, weight: PerModel[Weight] = 1.0, scale: Scale = 1.0, part: Part = WHOLE) -> Tensor:
    """Add up the largest singular components of all deltas of a matrix, made orthogonal to each other first.

    Formula: λ U S V, where U, S and V put side by side the first r/n components of every dᵢ = Uᵢ Sᵢ Vᵢ of rank r (at
    least one), Sᵢ times wᵢ, and U and V are replaced by the nearest orthonormal ones, P Q for U = P Σ Q. A tensor that
    is no matrix: λ Σ wᵢ dᵢ/n. Shapes: deltas [n, rows, width] → delta [rows, width].

    >>> import torch
    >>> tsv(torch.tensor([[[2.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 3.0]]]))  # 2 of the first, 3 of the second
    tensor([[2., 0.],
            [0., 3.]])
    """
    found = part.measured if part.measured is not None else factors(Parts.whole(deltas), weight=weight)
    if found is None:
        return weighted_sum(deltas, each(weight, len(deltas))).mul_(scale / len(deltas))
    (left, right), run = found, slice(part.start, part.start + deltas[0].numel())
    return multiplied(left, right, run).to(deltas.dtype).mul_(scale).view(deltas.shape[1:])
