"""TIES: trim, elect sign, merge what agrees."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..compiled.forms import Thin, ThinnedSum
from ..kernels import Cut, largest, select_largest
from ..operator import WHOLE, Part, Parts, PerModel, each, operator
from ..thinning import Divide, Elect, RescaleNorm, Scale, Weight, add_up, cancelling, l1_factors

if TYPE_CHECKING:
    from torch import Tensor

Density = Annotated[float, Field(gt=0, le=1, description="share of entries of largest magnitude that is kept")]
Found = tuple[tuple[Cut | None, ...], tuple[float, ...]]


def kept_of(entries: int, share: float) -> int | None:
    """Give how many entries are kept; None: all."""
    return max(1, int(share * entries)) if share < 1 else None


def trim_limits(parts: Parts, *, density: PerModel[float], rescale: str) -> Found:
    """Find every model's boundary of its max(1, ⌊density · entries⌋) largest deltas (None: all are kept) and factor."""
    counts = [kept_of(parts.entries, share) for share in each(density, parts.models)]
    cuts: tuple[Cut | None, ...] = (None,) * parts.models
    if parts.entries:
        cuts = largest(lambda: (deltas.reshape(parts.models, -1) for (deltas, *_) in parts), counts)
    if rescale == "none":
        return cuts, (1.0,) * parts.models
    return cuts, l1_factors(parts, lambda values, model, start: _kept(values, cuts[model], start))


def _kept(values: Tensor, cut: Cut | None, start: int) -> Tensor:
    import torch

    return torch.ones_like(values, dtype=torch.bool) if cut is None else select_largest(values, cut, start)


def compiled(
    *,
    count: int,
    weight: PerModel[float],
    density: PerModel[float],
    rescale: str,
    elect: str,
    divide: str,
    scale: float,
) -> ThinnedSum:
    """Say it to the compiled library."""
    thin = (
        Thin(kept=partial(kept_of, share=share), factor=None if rescale == "l1" else 1.0)
        for share in each(density, count)
    )
    return ThinnedSum(tuple(thin), each(weight, count), elect, divide, scale)


@operator(
    source="Yadav et al. 2023 (arXiv 2306.01708), section 3; weights as in mergekit 0.1.5 `ties` or peft 0.21 `ties`",
    laws=("permutation", "base", "scaling"),
    measure=trim_limits,
    refuse=cancelling,
    compiled=compiled,
)
def ties(
    deltas: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    density: PerModel[Density] = 0.2,
    rescale: RescaleNorm = "none",
    elect: Elect = "weighted",
    divide: Divide = "weights",
    scale: Scale = 1.0,
    part: Part = WHOLE,
) -> Tensor:
    """Trim deltas to their largest entries, elect a sign in each entry, merge the deltas that agree with it.

    Formula: t_i = d_i where |d_i| is among the ⌊ρ_i n⌋ largest, else 0 (of equals the lower index is kept);
    γ = sgn Σ w_i t_i (0 counts as +); A = {i : sgn(w_i t_i) = γ}; λ Σ_A w_i t_i / Σ_A w_i.
    With weights of 1 all conventions are the paper's. Shapes: deltas [n, *shape] → delta [*shape].

    >>> import torch
    >>> ties(torch.tensor([[4.0, -1.0, 3.0, 0.0], [2.0, 5.0, -4.0, 1.0]]), density=0.5)
    tensor([ 4.,  5., -4.,  0.])
    """
    measured = part.measured or trim_limits(Parts.whole(deltas), density=density, rescale=rescale)
    trimmed = deltas.clone()
    for delta, cut, factor in zip(trimmed, *measured, strict=True):
        if cut is not None:
            delta.masked_fill_(~select_largest(delta, cut, part.start), 0.0).mul_(factor)
    return add_up(trimmed, weight, elect=elect, divide=divide, scale=scale)
