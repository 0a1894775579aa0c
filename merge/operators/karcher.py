"""The Karcher mean: the point on the sphere from which the squared angles to all models are least."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..inner_products import InnerProducts, inner_products
from ..kernels import weighted_sum
from ..operator import WHOLE, Part, Parts, PerModel, each, operator
from .linear import Weight, cancelling

if TYPE_CHECKING:
    from torch import Tensor


def coefficients(parts: Parts, *, weight: PerModel[float], iterations: int, tolerance: float) -> tuple[float, ...]:
    """Find the factor of every model."""
    weights = each(weight, parts.models)
    shares = [one / sum(weights) for one in weights]
    if parts.models == 1:
        return (1.0,)
    found = inner_products(parts)
    lengths = found.lengths
    length = sum(share * own for share, own in zip(shares, lengths, strict=True))
    present = sum(share for share, own in zip(shares, lengths, strict=True) if own > 0)
    if not present:
        return tuple(shares)
    shares = [share / present if own > 0 else 0.0 for share, own in zip(shares, lengths, strict=True)]
    mean = _start(found, shares, tolerance)
    for _ in range(iterations):
        tangent, size = _tangent(found, mean, shares, tolerance)
        if size < tolerance:
            break
        mean = [math.cos(size) * m + math.sin(size) * t / size for m, t in zip(mean, tangent, strict=True)]
        norm = found.length(mean)
        mean = [m / norm for m in mean]
    return tuple(length * m for m in mean)


def _start(found: InnerProducts, shares: list[float], tolerance: float) -> list[float]:
    """Give the mean of the unit vectors as a unit vector; the first of them where they cancel."""
    units = [1 / own if own > 0 else 0.0 for own in found.lengths]
    mean = [share * unit for share, unit in zip(shares, units, strict=True)]
    norm = found.length(mean)
    if norm >= tolerance:
        return [m / norm for m in mean]
    first = next(i for i, unit in enumerate(units) if unit)
    return [unit if i == first else 0.0 for i, unit in enumerate(units)]


def _tangent(
    found: InnerProducts, mean: list[float], shares: list[float], tolerance: float
) -> tuple[list[float], float]:
    """Give the mean of the logarithms of all unit vectors at a point, and its length."""
    tangent = [0.0] * len(mean)
    for i, (share, own) in enumerate(zip(shares, found.lengths, strict=True)):
        if not own:
            continue
        unit = [1 / own if j == i else 0.0 for j in range(len(mean))]
        cosine = max(-1.0, min(1.0, found.dot(mean, unit)))
        angle = math.acos(cosine)
        if angle < tolerance or math.pi - angle < 1e-12:  # opposite: no direction leads there
            continue
        factor = share * angle / math.sin(angle)
        tangent = [t + factor * (u - cosine * m) for t, u, m in zip(tangent, unit, mean, strict=True)]
    return tangent, found.length(tangent)


def no_share(*, count: int, weight: PerModel[float] = 1.0) -> str:
    """Refuse weights that sum to zero."""
    return cancelling(count=count, weight=weight, normalize=True)


@operator(
    source="Karcher 1977, section 1; mergekit 0.1.5 `karcher` (arXiv 2603.04972), whose weights are equal",
    laws=("identity", "permutation", "scaling"),
    measure=coefficients,
    refuse=no_share,
)
def karcher(
    models: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    iterations: Annotated[int, Field(ge=0, description="the most steps that are taken")] = 10,
    tolerance: Annotated[float, Field(ge=0, description="a step shorter than this angle ends it")] = 1e-5,
    part: Part = WHOLE,
) -> Tensor:
    """Take the mean of the models' directions on the sphere, and the mean of their lengths.

    Formula: m · Σ wᵢ‖xᵢ‖ with m, of length 1, where Σ wᵢ log_m(xᵢ/‖xᵢ‖) = 0: from the normalised mean, steps
    m ← exp_m(Σ wᵢ log_m(xᵢ/‖xᵢ‖)), the angles taken over the whole tensor. Models of zero length give no direction
    (mergekit: shorter than the tolerance). Shapes: models [n, *shape] → [*shape].

    >>> import torch
    >>> karcher(torch.tensor([[2.0, 0.0], [0.0, 4.0]]))  # 45°, of length 3
    tensor([2.1213, 2.1213])
    """
    whole = Parts.whole(models)
    found = part.measured or coefficients(whole, weight=weight, iterations=iterations, tolerance=tolerance)
    return weighted_sum(models, found)
