"""Weighted sum of task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..compiled.forms import WeightedSum
from ..kernels import divided, weighted_sum
from ..operator import WHOLE, Part, PerModel, each, operator
from .linear import cancelling

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[float, Field(description="factor of this model's task vector", allow_inf_nan=False)]


def compiled(*, count: int, weight: PerModel[float], normalize: bool, scale: float) -> WeightedSum:
    """Say it to the compiled library."""
    weights = each(weight, count)
    return WeightedSum(weights, divisor=sum(weights) if normalize else 1.0, scale=scale)


@operator(
    source="Ilharco et al. 2023 (arXiv 2212.04089), section 2; mergekit 0.1.5 `task_arithmetic`",
    laws=("permutation", "base", "scaling"),
    refuse=cancelling,
    compiled=compiled,
)
def task_arithmetic(
    deltas: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    normalize: Annotated[bool, Field(description="divide by the sum of the weights")] = False,
    scale: Annotated[float, Field(description="factor of the summed task vector (λ)", allow_inf_nan=False)] = 1.0,
    part: Part = WHOLE,
) -> Tensor:
    """Add weighted task vectors to the base.

    Formula: λ Σ wᵢ dᵢ (÷ Σ wᵢ with normalize), added to the base. Shapes: deltas [n, *shape] → delta [*shape].

    >>> import torch
    >>> task_arithmetic(torch.tensor([[1.0, 0.0], [1.0, -2.0]]), weight=[1.0, 0.5])
    tensor([ 1.5000, -1.0000])
    """
    weights = each(weight, len(deltas))
    mixed = weighted_sum(deltas, weights)
    if normalize:
        divided(mixed, sum(weights))
    return mixed.mul_(scale)
