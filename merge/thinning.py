"""What the operators share that thin deltas out (trim, drop, mask) and then add them up, or what agrees of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from .kernels import ROW, divided, mix_agreeing, sums_over, weighted_sum
from .operator import Parts, PerModel, each

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[float, Field(description="factor of this model's thinned delta", allow_inf_nan=False)]
Elect = Annotated[
    Literal["none", "weighted", "unweighted"],
    Field(
        description="merge all, or in each entry only what has the sign of the sum of the weighted (TIES, mergekit) or "
        "unweighted (peft) thinned deltas"
    ),
]
Divide = Annotated[
    Literal["none", "weights", "count"],
    Field(description="divide by the (agreeing) weights (mergekit), by the count of (agreeing) models (peft), or not"),
]
Rescale = Annotated[
    Literal["density", "l1", "none"],
    Field(description="multiply what is kept by 1/probability (paper), by ‖d‖₁/‖kept‖₁ (mergekit), or not"),
]
RescaleNorm = Annotated[
    Literal["l1", "none"], Field(description="multiply what is kept by ‖d‖₁/‖kept‖₁ (mergekit's `rescale`), or not")
]
Scale = Annotated[float, Field(description="factor of the merged delta (λ)", allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63, description="picks the entries, with tensor and model name")]

SMALLEST_SUM = 1e-8
Keep = Callable[["Tensor", int, int], "Tensor"]  # of one model's entries, its position and where they start: bool


def cancelling(*, count: int, weight: PerModel[float] = 1.0, elect: str = "none", divide: str = "none") -> str:
    """Refuse to divide by weights that sum to zero."""
    divides = elect == "none" and divide == "weights"
    return "the weights sum to zero" if divides and abs(sum(each(weight, count))) < SMALLEST_SUM else ""


def add_up(thinned: Tensor, weight: PerModel[float], *, elect: str, divide: str, scale: float) -> Tensor:
    """Give λ Σ w_i t_i of all or of those that agree in sign, divided as asked. [n, *shape] → [*shape]."""
    weights = each(weight, len(thinned))
    if elect != "none":
        return mix_agreeing(thinned, weights, elect=elect, divide=divide).mul_(scale)  # type: ignore[arg-type]
    mixed = weighted_sum(thinned, weights)
    if divide != "none":
        divided(mixed, sum(weights) if divide == "weights" else float(len(thinned)))
    return mixed.mul_(scale)


def l1_factors(parts: Parts, keep: Keep, row: int = ROW) -> tuple[float, ...]:
    """Measure for every model ‖d‖₁ / ‖kept‖₁; 1 where nothing is kept. Every part begins at a multiple of `row`."""
    sums: list[float] = []
    for model in range(parts.models):
        sums += sums_over(_magnitudes(parts, model, keep), row)
    return tuple(whole / kept if kept > 0 else 1.0 for whole, kept in zip(sums[::2], sums[1::2], strict=True))


def _magnitudes(parts: Parts, model: int, keep: Keep) -> Iterator[tuple[Tensor, Tensor]]:
    for start, (deltas, *_) in parts.placed():
        values = deltas[model].reshape(-1)
        yield values.abs(), values.abs() * keep(values, model, start)
