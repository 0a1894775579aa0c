"""TIES: trim, elect sign, merge what agrees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..kernels import Cut, largest, mix_agreeing, select_largest
from ..operator import WHOLE, Part, Parts, PerModel, each, operator

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[float, Field(description="factor of this model's trimmed delta", allow_inf_nan=False)]
Density = Annotated[float, Field(gt=0, le=1, description="share of entries of largest magnitude that is kept")]


def trim_limits(parts: Parts, *, density: PerModel[float]) -> tuple[Cut | None, ...]:
    """Find every model's boundary of its max(1, ⌊density · entries⌋) largest deltas; None: all are kept."""
    counts = [max(1, int(share * parts.entries)) if share < 1 else None for share in each(density, parts.models)]
    if not parts.entries:
        return (None,) * parts.models
    return largest(lambda: (deltas.reshape(parts.models, -1) for (deltas, *_) in parts), counts)


@operator(
    source="Yadav et al. 2023 (arXiv 2306.01708), section 3; weights as in mergekit 0.1.5 `ties` or peft 0.21 `ties`",
    laws=("permutation", "base", "scaling"),
    measure=trim_limits,
)
def ties(
    deltas: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    density: PerModel[Density] = 0.2,
    elect: Annotated[
        Literal["weighted", "unweighted"],
        Field(description="the sign is that of the sum of the weighted (mergekit) or unweighted (peft) trimmed deltas"),
    ] = "weighted",
    divide: Annotated[
        Literal["weights", "count", "none"],
        Field(description="divide by the sum of agreeing weights (mergekit), their count (peft), or not"),
    ] = "weights",
    scale: Annotated[float, Field(description="factor of the merged delta (λ)", allow_inf_nan=False)] = 1.0,
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
    limits = trim_limits(Parts.whole(deltas), density=density) if part.measured is None else part.measured
    trimmed = deltas.clone()
    for delta, limit in zip(trimmed, limits, strict=True):
        if limit is not None:
            delta.masked_fill_(~select_largest(delta, limit, part.start), 0.0)
    return mix_agreeing(trimmed, each(weight, len(deltas)), elect=elect, divide=divide) * scale
