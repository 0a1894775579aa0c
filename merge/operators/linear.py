"""Weighted mean of models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..compiled.forms import WeightedSum
from ..kernels import divided, weighted_sum
from ..operator import WHOLE, Part, PerModel, each, operator

if TYPE_CHECKING:
    from torch import Tensor

SMALLEST_SUM = 1e-8


def cancelling(*, count: int, weight: PerModel[float] = 1.0, normalize: bool = False) -> str:
    """Refuse to divide by weights that sum to zero."""
    weights = each(weight, count)
    hint = "set normalize: false, or other weights"
    return f"the weights {list(weights)} sum to zero: {hint}" if normalize and abs(sum(weights)) < SMALLEST_SUM else ""


Weight = Annotated[float, Field(description="share of this model in the result", allow_inf_nan=False)]


def compiled(*, count: int, weight: PerModel[float], normalize: bool) -> WeightedSum:
    """Say it to the compiled library."""
    weights = each(weight, count)
    return WeightedSum(weights, divisor=sum(weights) if normalize else 1.0)


@operator(
    source="Wortsman et al. 2022 (arXiv 2203.05482), section 2: uniform soup; mergekit 0.1.5 `linear`",
    laws=("identity", "permutation", "scaling"),
    refuse=cancelling,
    compiled=compiled,
)
def linear(
    models: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    normalize: Annotated[bool, Field(description="divide by the sum of the weights")] = True,
    part: Part = WHOLE,
) -> Tensor:
    """Take the weighted mean of models.

    Formula: Σ wᵢ xᵢ / Σ wᵢ; without normalize Σ wᵢ xᵢ. Weights that sum to zero cannot be normalised and are refused.
    Shapes: models [n, *shape] → [*shape].

    >>> import torch
    >>> linear(torch.tensor([[1.0, 2.0], [5.0, 2.0]]), weight=[3.0, 1.0])
    tensor([2., 2.])
    """
    weights = each(weight, len(models))
    mixed = weighted_sum(models, weights)
    return divided(mixed, sum(weights)) if normalize else mixed
