"""Model Stock: go from the base towards the mean of the models, as far as their angles say."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..inner_products import InnerProducts, groups_along, inner_products, inner_products_along
from ..kernels import divided, weighted_sum
from ..operator import WHOLE, Part, Parts, operator

if TYPE_CHECKING:
    from torch import Tensor

_SINGULAR = 1e-6


def shares(parts: Parts, *, filter_wise: bool) -> tuple[float, ...]:
    """Find how far to go: one number for the whole tensor, or one for each row."""
    found = inner_products_along(parts, "last") if filter_wise else [inner_products(parts)]
    return tuple(_share(one, parts.models) for one in found)


def _share(found: InnerProducts, count: int) -> float:
    cosines = [found.cosine(i, j) for i, j in combinations(range(count), 2)]
    cosine = sum(cosines) / len(cosines)
    denominator = 1 + (count - 1) * cosine
    return count * cosine / denominator if abs(denominator) >= _SINGULAR else 0.0


def too_few(*, count: int) -> str:
    """Refuse a single model: there is no angle."""
    return "takes two models or more, and 1 is given" if count < 2 else ""


@operator(
    source="Jang et al. 2024 (arXiv 2403.19522), section 4; mergekit 0.1.5 `model_stock`",
    laws=("identity", "permutation", "base", "scaling"),
    measure=shares,
    refuse=too_few,
)
def model_stock(
    deltas: Tensor,
    *,
    filter_wise: Annotated[bool, Field(description="one angle for each row, else one for the tensor")] = False,
    part: Part = WHOLE,
) -> Tensor:
    """Go from the base towards the mean of the models, the less so the more they point apart.

    Formula: t Σ dᵢ/N with t = N c / (1 + (N−1) c) and c the mean cosine between two deltas, 0 where one of them is zero
    (mergekit: it shrinks where ‖dᵢ‖‖dⱼ‖ < 1e-6). t is not clamped: below c = 0 it is negative. t = 0 where the
    denominator is below 1e-6. Shapes: deltas [n, *shape] → delta [*shape].

    >>> import torch
    >>> model_stock(torch.tensor([[2.0, 0.0], [1.0, 1.7320508]]))  # 60°: c = 1/2, t = 2/3
    tensor([1.0000, 0.5774])
    """
    import torch

    whole = Parts.whole(deltas)
    found = part.measured if part.measured is not None else shares(whole, filter_wise=filter_wise)
    mean = divided(weighted_sum(deltas, (1.0,) * len(deltas)), len(deltas))
    if not filter_wise:
        return mean.mul_(found[0])
    group, _ = groups_along(whole.shape if part.shape is None else part.shape, "last")
    index = torch.arange(part.start, part.start + mean.numel(), device=mean.device)
    factors = torch.tensor(found, dtype=mean.dtype, device=mean.device)
    return mean.mul_(factors[group(index)].view(mean.shape))
