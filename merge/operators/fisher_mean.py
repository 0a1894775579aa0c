"""The mean of models, every entry weighed by how much it matters to each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..kernels import weighted_sum
from ..operator import WHOLE, Part, PerModel, each, operator

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[float, Field(gt=0, description="factor of this model's importances", allow_inf_nan=False)]


@operator(
    source="Matena and Raffel 2022 (arXiv 2111.09832), section 3.2",
    laws=("identity", "permutation"),
)
def fisher_mean(
    models: Tensor,
    importances: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    floor: Annotated[float, Field(gt=0, description="no importance counts less, so that no entry has none")] = 1e-6,
    part: Part = WHOLE,
) -> Tensor:
    """Take the mean of models, weighed in each entry by a diagonal Fisher or another importance.

    Formula: Σ wᵢ Fᵢ xᵢ / Σ wᵢ Fᵢ with Fᵢ = max(importanceᵢ, floor). Where no model cares about an entry it is the plain
    mean. Shapes: models [n, *shape], importances [n, *shape] → [*shape].

    >>> import torch
    >>> fisher_mean(torch.tensor([[1.0, 4.0], [5.0, 8.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
    tensor([2., 6.])
    """
    weights = each(weight, len(models))
    counted = importances.clamp(min=floor)
    return weighted_sum(models * counted, weights).div_(weighted_sum(counted, weights))
