"""The direction of the weighted mean of unit vectors, with the weighted mean of their lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..errors import MergeError
from ..inner_products import inner_products
from ..kernels import weighted_sum
from ..operator import WHOLE, Part, Parts, PerModel, each, operator
from .linear import Weight, cancelling

if TYPE_CHECKING:
    from torch import Tensor


def coefficients(parts: Parts, *, weight: PerModel[float], normalize: bool, epsilon: float) -> tuple[float, ...]:
    """Find the factor of every model. Raises MergeError where the unit vectors of three or more cancel."""
    weights = each(weight, parts.models)
    if normalize:
        weights = tuple(one / sum(weights) for one in weights)
    if parts.models == 1:
        return (1.0,)
    found = inner_products(parts)
    mean = [share / length if length > 0 else 0.0 for share, length in zip(weights, found.lengths, strict=True)]
    length = found.length(mean)
    if not any(found.lengths):
        return weights
    if length < epsilon:
        if parts.models == 2:
            return weights
        raise MergeError("", "the weighted directions of the models cancel", "give them other weights")
    longer = sum(share * own for share, own in zip(weights, found.lengths, strict=True)) / length
    return tuple(one * longer for one in mean)


@operator(
    source="mergekit 0.1.5 `multislerp`",
    laws=("identity", "permutation", "scaling"),
    measure=coefficients,
    refuse=cancelling,
)
def multislerp(
    vectors: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    normalize: Annotated[bool, Field(description="divide the weights by their sum")] = True,
    epsilon: Annotated[float, Field(ge=0, description="the unit vectors cancel where their mean is shorter")] = 1e-8,
    part: Part = WHOLE,
) -> Tensor:
    """Take the direction of the weighted mean of unit vectors, and the weighted mean of the lengths.

    Formula: m/‖m‖ · Σ wᵢ‖xᵢ‖ with m = Σ wᵢ xᵢ/‖xᵢ‖ and Σ wᵢ = 1. mergekit also adds the mean of the unit vectors'
    components tangent to m: they sum to zero, whatever the vectors are, so they are left out. Two opposite vectors are
    interpolated linearly, more that cancel are refused. Shapes: vectors [n, *shape] → [*shape].

    >>> import torch
    >>> multislerp(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))  # 45°, of length 3
    tensor([2.1213, 2.1213])
    """
    whole = Parts.whole(vectors)
    found = part.measured or coefficients(whole, weight=weight, normalize=normalize, epsilon=epsilon)
    return weighted_sum(vectors, found)
