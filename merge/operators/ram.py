"""RAM: add what only one model changed, and average what several changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..kernels import weighted_sum
from ..operator import WHOLE, Part, Parts, operator

if TYPE_CHECKING:
    from torch import Tensor


def rewards(parts: Parts, *, epsilon: float, r: float, alpha: float) -> tuple[float, ...]:
    """Find the factor of every model's own entries: 1 + r · min(α, shared/own), by the counts in the whole tensor."""
    if not r or not alpha:
        return (1.0,) * parts.models
    own, shared = [0] * parts.models, [0] * parts.models
    for deltas, *_ in parts:
        changed = deltas.abs() > epsilon
        single = changed.sum(dim=0) == 1
        for model, entries in enumerate(changed):
            own[model] += int((entries & single).sum())
            shared[model] += int((entries & ~single).sum())
    return tuple(1 + r * min(alpha, many / max(one, epsilon)) for one, many in zip(own, shared, strict=True))


@operator(
    source="arXiv 2601.13572; mergekit 0.1.5 `ram`, and with r and alpha `ramplus_tl`",
    laws=("identity", "permutation", "base"),
    measure=rewards,
)
def ram(
    deltas: Tensor,
    *,
    epsilon: Annotated[float, Field(gt=0, description="a magnitude above it counts as a change")] = 1e-5,
    r: Annotated[float, Field(ge=0, description="how much a model's own entries gain from what it shares")] = 0.0,
    alpha: Annotated[float, Field(ge=0, description="the largest ratio of shared to own entries that counts")] = 0.2,
    part: Part = WHOLE,
) -> Tensor:
    """Add what only one model changed, and take the mean of what several changed.

    Formula: where one model has |dᵢ| > ε: (1 + r · min(α, sharedᵢ/ownᵢ)) dᵢ; where several have: the mean of theirs;
    else 0. ownᵢ and sharedᵢ count entries in the whole tensor (RAM+, tensor by tensor).
    Shapes: deltas [n, *shape] → delta [*shape].

    >>> import torch
    >>> ram(torch.tensor([[1.0, 4.0, 0.0], [0.0, 2.0, 0.0]]))
    tensor([1., 3., 0.])
    """
    factors = part.measured or rewards(Parts.whole(deltas), epsilon=epsilon, r=r, alpha=alpha)
    changed = deltas.abs() > epsilon
    present = deltas.masked_fill(~changed, 0.0)
    count = changed.sum(dim=0)
    own = weighted_sum(present, factors)
    shared = weighted_sum(present, (1.0,) * len(deltas)).div_(count.clamp(min=1))
    return own.where(count == 1, shared)
