"""Take one model's tensor as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..compiled.forms import WeightedSum
from ..operator import WHOLE, Part, PerModel, each, operator

if TYPE_CHECKING:
    from torch import Tensor

Factor = Annotated[float, Field(description="multiplies the tensor; 1 leaves it as it is", allow_inf_nan=False)]


def compiled(*, factor: PerModel[float]) -> WeightedSum:
    """Say it to the compiled library."""
    return WeightedSum(each(factor, 1))


@operator(
    source="mergekit 0.1.5 `passthrough`, whose `scale` is the factor",
    laws=("identity", "scaling"),
    takes=1,
    compiled=compiled,
)
def copy(models: Tensor, *, factor: PerModel[Factor] = 1.0, part: Part = WHOLE) -> Tensor:
    """Take one model's tensor as it is: byte for byte, where the dtype stays; or times a factor.

    Formula: c x₁, x₁ where c = 1; recipes multiply no tensor that is no float. Shapes: models [1, *shape] → [*shape].

    >>> import torch
    >>> copy(torch.tensor([[1.0, 2.0]]))
    tensor([1., 2.])
    """
    (multiplier,) = each(factor, 1)
    return models[0].clone() if multiplier == 1 else models[0] * multiplier
