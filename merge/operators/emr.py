"""EMR-Merging: one unified delta for all models, and a mask and a factor that make it each one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ..kernels import sums_over, weighted_sum
from ..operator import WHOLE, Part, Parts, operator
from ..thinning import Scale

if TYPE_CHECKING:
    from torch import Tensor

Task = Annotated[int, Field(ge=0, description="0: the unified delta; k: of it what agrees in sign with the k-th model")]


def rescaler(groups: Mapping[Any, Parts], *, task: int) -> dict[str, float]:
    """Find λ of one model over all tensors, as `factor`: Σ |d| / Σ |its mask · unified|; 1 where it agrees nowhere."""
    parts = (part for group in groups.values() for part in group)
    whole, kept = sums_over((deltas[task - 1].abs(), emr(deltas, task=task).abs_()) for (deltas, *_) in parts)
    return {"factor": whole / kept if kept else 1.0}


def no_such_model(*, count: int, task: int = 0) -> str:
    """Refuse the mask of a model that is not there."""
    return f"task is {task}, and {count} models are given" if task > count else ""


@operator(
    source="Huang et al. 2024 (arXiv 2405.17461), section 3.2; harveyhuang18/EMR_Merging at cc225ec",
    laws=("identity", "permutation", "base", "scaling"),
    refuse=no_such_model,
)
def emr(deltas: Tensor, *, task: Task = 0, scale: Scale = 1.0, part: Part = WHOLE) -> Tensor:
    """Elect a sign for each entry, and take the largest of the deltas that have it.

    Formula: λ τ with τ = s · max {|dᵢ| : dᵢ s > 0} and s = sgn Σ dᵢ; for `task` k, λ mₖ τ with mₖ = 1 where dₖ τ > 0.
    The paper's λ of a model is Σ |dₖ| / Σ |mₖ τ| over all its tensors, which the composition `emr_task` finds. Where
    the sum is 0 nothing is elected, as in the paper (its code elects minus).
    Shapes: deltas [n, *shape] → delta [*shape].

    >>> import torch
    >>> deltas = torch.tensor([[3.0, -1.0, 2.0], [1.0, 4.0, -2.0]])
    >>> emr(deltas), emr(deltas, task=1)  # + of 4, + of 3, and nothing of 0
    (tensor([3., 4., 0.]), tensor([3., 0., 0.]))
    """
    elected = weighted_sum(deltas, (1.0,) * len(deltas)).sign_()
    unified = (deltas * elected).amax(dim=0).clamp_(min=0.0).mul_(elected)
    if task:
        unified.masked_fill_(deltas[task - 1] * elected <= 0, 0.0)
    return unified.mul_(scale)
