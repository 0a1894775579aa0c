"""NearSwap: take over of another model what is near to the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..operator import WHOLE, Part, operator

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST = 1e-6


@operator(
    source="alchemonaut/QuartetAnemoi-70B-t0.0001 on the Hub, model card; mergekit 0.1.5 `nearswap`",
    laws=("base",),
    takes=1,
)
def nearswap(
    deltas: Tensor,
    *,
    t: Annotated[
        float, Field(ge=0, description="a change up to this magnitude is taken whole", allow_inf_nan=False)
    ] = 1e-4,
    part: Part = WHOLE,
) -> Tensor:
    """Move every entry of the base towards the model's, by t at most.

    Formula: s d with s = min(1, t / max(|d|, 1e-6)). Shapes: deltas [1, *shape] → delta [*shape].

    >>> import torch
    >>> nearswap(torch.tensor([[0.25, -2.0]]), t=0.5)
    tensor([ 0.2500, -0.5000])
    """
    return deltas[0] * (t / deltas[0].abs().clamp_(min=_SMALLEST)).clamp_(max=1.0)
