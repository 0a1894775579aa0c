"""SCE: select where the deltas vary, calculate weights from their size, erase what disagrees in sign."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..kernels import Cut, divided, largest, mix_agreeing, select_largest, sums_over
from ..operator import WHOLE, Part, Parts, operator

if TYPE_CHECKING:
    from torch import Tensor

Found = tuple[Cut | None, tuple[float, ...]]
_NOTHING = Cut(float("inf"), -1)  # a boundary that no entry lies within


def selection(parts: Parts, *, density: float, uniform_below: float) -> Found:
    """Find the boundary of the entries that vary most (None: all are taken), and the weight of every model."""
    cut = None
    if density < 1:
        varying = sum(int((variance(deltas) > 0).sum()) for (deltas, *_) in parts)
        count = int(varying * density)
        cut = largest(lambda: (variance(deltas)[None] for (deltas, *_) in parts), [count])[0] if count else _NOTHING
    squares = sums_over(
        list(_selected(deltas, cut, start).double().square_()) for start, (deltas, *_) in parts.placed()
    )
    sizes = [square / max(1, parts.entries) for square in squares]
    if sum(sizes) < uniform_below or not sum(sizes):
        return cut, (1 / parts.models,) * parts.models
    return cut, tuple(size / sum(sizes) for size in sizes)


def variance(deltas: Tensor) -> Tensor:
    """Give the variance over the models in each entry, computed in fp64, as fp32: [n, *part] → [part]."""
    wide = deltas.double().reshape(len(deltas), -1)
    mean = wide[0].clone()
    for delta in wide[1:]:
        mean += delta
    divided(mean, len(wide))
    total = (wide[0] - mean).square_()
    for delta in wide[1:]:
        total += (delta - mean).square_()
    return divided(total, len(wide)).float()


def _selected(deltas: Tensor, cut: Cut | None, start: int) -> Tensor:
    if cut is None:
        return deltas
    kept = select_largest(variance(deltas), cut, start).view(deltas.shape[1:])
    return deltas.masked_fill(~kept, 0.0)


@operator(
    source="Wan et al. 2024 (arXiv 2408.07990), section 3.2; mergekit 0.1.5 `sce`",
    laws=("identity", "permutation", "base", "scaling"),
    measure=selection,
)
def sce(
    deltas: Tensor,
    *,
    density: Annotated[
        float, Field(gt=0, le=1, description="share of the entries that differ between models that is taken; 1: all")
    ] = 1.0,
    uniform_below: Annotated[
        float, Field(ge=0, description="weights are equal where the mean squares sum to less (mergekit: 1e-6)")
    ] = 0.0,
    part: Part = WHOLE,
) -> Tensor:
    """Take the entries that vary most between models, weigh models by the size of theirs, merge what agrees in sign.

    Formula: m keeps the ⌊ρ · #{var > 0}⌋ entries of largest variance over the models; wᵢ = mean (m dᵢ)² / Σ of these;
    γ = sgn Σ m dᵢ (0 counts as +); A = {i : sgn dᵢ = γ}; Σ_A wᵢ m dᵢ / Σ_A wᵢ. Of equal variances (as fp32) the lower
    index is kept. mergekit weighs small deltas equally: `uniform_below`. Shapes: deltas [n, *shape] → delta [*shape].

    >>> import torch
    >>> sce(torch.tensor([[3.0, 1.0, 3.0], [-1.0, 1.0, 1.0]]))  # weights 19/22 and 3/22
    tensor([3.0000, 1.0000, 2.7273])
    """
    found = part.measured or selection(Parts.whole(deltas), density=density, uniform_below=uniform_below)
    cut, weights = found
    return mix_agreeing(_selected(deltas, cut, part.start), weights, elect="unweighted", divide="weights")
