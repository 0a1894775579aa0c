"""Model breadcrumbs: leave out the smallest deltas, and the few largest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..kernels import Cut, largest, select_largest
from ..operator import WHOLE, Part, Parts, PerModel, each, operator
from ..thinning import Divide, Elect, RescaleNorm, Scale, Weight, add_up, cancelling, l1_factors

if TYPE_CHECKING:
    from torch import Tensor

Density = Annotated[float, Field(gt=0, le=1, description="share of entries that is kept")]
Gamma = Annotated[float, Field(ge=0, lt=1, description="share of entries of largest magnitude that is left out")]
Band = tuple[Cut | None, Cut | None]  # what is kept lies within the first boundary, and outside the second


def bands(
    parts: Parts, *, density: PerModel[float], gamma: PerModel[float], rescale: str
) -> tuple[tuple[Band, ...], tuple[float, ...]]:
    """Find every model's two boundaries (None: there is none) and its factor."""
    inner: list[int | None] = []
    outer: list[int | None] = []
    if not parts.entries:
        return ((None, None),) * parts.models, (1.0,) * parts.models
    for share, outliers in zip(each(density, parts.models), each(gamma, parts.models), strict=True):
        kept = max(1, int(share * parts.entries))
        left_out = min(int(outliers * parts.entries), parts.entries - kept) if share < 1 else 0
        inner.append(kept + left_out if kept + left_out < parts.entries else None)
        outer.append(left_out or None)

    def boundaries(counts: list[int | None]) -> tuple[Cut | None, ...]:
        return largest(lambda: (deltas.reshape(parts.models, -1) for (deltas, *_) in parts), counts)

    found = tuple(zip(boundaries(inner), boundaries(outer), strict=True))
    if rescale == "none":
        return found, (1.0,) * parts.models
    return found, l1_factors(parts, lambda values, model, start: _kept(values, found[model], start))


def _kept(values: Tensor, band: Band, start: int) -> Tensor:
    import torch

    inner, outer = band
    kept = torch.ones_like(values, dtype=torch.bool) if inner is None else select_largest(values, inner, start)
    return kept if outer is None else kept & ~select_largest(values, outer, start)


@operator(
    source="Davari and Belilovsky 2024 (arXiv 2312.06795), section 3; mergekit 0.1.5 `breadcrumbs`, `breadcrumbs_ties`",
    laws=("permutation", "base", "scaling"),
    measure=bands,
    refuse=cancelling,
)
def breadcrumbs(
    deltas: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    density: PerModel[Density] = 0.2,
    gamma: PerModel[Gamma] = 0.01,
    rescale: RescaleNorm = "none",
    elect: Elect = "none",
    divide: Divide = "none",
    scale: Scale = 1.0,
    part: Part = WHOLE,
) -> Tensor:
    """Keep of every delta what is neither among its largest entries nor among its smallest, and add up.

    Formula: λ Σ w_i m_i d_i, where m_i keeps the ⌊ρ_i n⌋ entries of largest magnitude after the ⌊γ_i n⌋ largest of all
    (fewer are left out where γ + ρ > 1, none where ρ = 1, as in mergekit; at least one is kept, other than there).
    Shapes: deltas [n, *shape] → delta [*shape].

    >>> import torch
    >>> breadcrumbs(torch.tensor([[9.0, -4.0, 3.0, 0.5]]), density=0.5, gamma=0.25)
    tensor([ 0., -4.,  3.,  0.])
    """
    whole = Parts.whole(deltas)
    measured = part.measured or bands(whole, density=density, gamma=gamma, rescale=rescale)
    kept = deltas.clone()
    for delta, band, factor in zip(kept, *measured, strict=True):
        delta.masked_fill_(~_kept(delta, band, part.start), 0.0).mul_(factor)
    return add_up(kept, weight, elect=elect, divide=divide, scale=scale)
