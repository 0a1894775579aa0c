"""The geometric median: the point with the least sum of distances to all models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..inner_products import InnerProducts, inner_products
from ..kernels import weighted_sum
from ..operator import WHOLE, Part, Parts, PerModel, each, operator

if TYPE_CHECKING:
    from torch import Tensor

_NEAREST = 1e-12  # of the largest distance: nearer than that, a model stands for the point itself
Weight = Annotated[float, Field(gt=0, description="factor of the distance to this model", allow_inf_nan=False)]


def shares(parts: Parts, *, weight: PerModel[float], iterations: int, tolerance: float) -> tuple[float, ...]:
    """Find the share of every model in the median, by Weiszfeld's iteration from their mean."""
    weights = each(weight, parts.models)
    found = inner_products(_differences(parts))  # from the first model: distances between close models stay exact
    current = [one / sum(weights) for one in weights]
    reach = max(found.lengths, default=0.0)
    if not reach:
        return tuple(current)
    for _ in range(iterations):
        distances = [max(_distance(found, current, i), _NEAREST * reach) for i in range(len(current))]
        pulls = [one / distance for one, distance in zip(weights, distances, strict=True)]
        before, current = current, [pull / sum(pulls) for pull in pulls]
        if max(abs(new - old) for new, old in zip(current, before, strict=True)) < tolerance:
            break
    return tuple(current)


def _distance(found: InnerProducts, point: list[float], i: int) -> float:
    return found.length([share - (j == i) for j, share in enumerate(point)])


def _differences(parts: Parts) -> Parts:
    """Take every model minus the first, in fp64."""

    def runs() -> Iterator[Callable[[], tuple[Tensor, ...]]]:
        return (partial(_from_first, run) for run in parts.runs())

    return Parts(runs, parts.models, parts.shape)


def _from_first(run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor]:
    wide = run()[0].double()
    return (wide - wide[:1],)


@operator(
    source="Weiszfeld 1937; Pillutla et al. 2022 (arXiv 1912.13445), algorithm 2",
    laws=("identity", "permutation", "scaling"),
    measure=shares,
)
def geometric_median(
    models: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    iterations: Annotated[int, Field(ge=0, description="the most steps that are taken")] = 100,
    tolerance: Annotated[float, Field(ge=0, description="it ends where no share moves by more")] = 1e-9,
    part: Part = WHOLE,
) -> Tensor:
    """Take the point with the least weighted sum of distances to the models, each tensor a point.

    Formula: argmin_y Σ wᵢ ‖y − xᵢ‖, by y ← Σ cᵢ xᵢ with cᵢ ∝ wᵢ/‖y − xᵢ‖ from the mean on. Every share follows from
    inner products, so the tensors are read once to measure. Shapes: models [n, *shape] → [*shape].

    >>> import torch
    >>> geometric_median(torch.tensor([[0.0, 1.0], [0.0, -1.0], [3.0 ** 0.5, 0.0]]))  # sees all under 120°
    tensor([0.5774, 0.0000])
    """
    whole = Parts.whole(models)
    found = part.measured or shares(whole, weight=weight, iterations=iterations, tolerance=tolerance)
    return weighted_sum(models, found)
