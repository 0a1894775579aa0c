"""Consensus merging: sum the deltas, and keep only the entries that several models find useful."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..kernels import weighted_sum
from ..operator import WHOLE, Part, PerModel, each, operator
from ..thinning import Scale, Weight

if TYPE_CHECKING:
    from torch import Tensor

Strictness = Annotated[
    float,
    Field(ge=0, description="an entry serves this model where |d| is greater than this times |sum − d|"),
]


Task = Annotated[
    int, Field(ge=0, description="k: keep of the sum what serves the k-th model, its own mask; 0: what `agreeing` says")
]


def too_few(*, count: int, agreeing: int = 2, task: int = 0) -> str:
    """Refuse to ask for more models than there are."""
    asked = ("task", task) if task else ("agreeing", agreeing)
    return f"{asked[0]} is {asked[1]}, and {count} models are given" if asked[1] > count else ""


@operator(
    source="Wang et al. 2024 (arXiv 2405.07813), sections 4.1 and 4.3; nik-dim/tall_masks at d10af8b",
    laws=("permutation", "base", "scaling"),
    refuse=too_few,
)
def consensus(
    deltas: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    strictness: PerModel[Strictness] = 0.4,
    agreeing: Annotated[int, Field(ge=0, description="keep an entry that serves at least so many models")] = 2,
    task: Task = 0,
    scale: Scale = 1.0,
    part: Part = WHOLE,
) -> Tensor:
    """Add up deltas, and drop the entries that serve no model (catastrophic) or only one (selfish).

    Formula: λ m Σ wᵢ dᵢ, where m is 1 where at least k models have |dᵢ| > sᵢ |Σⱼ wⱼ dⱼ − dᵢ| (their TALL mask), or
    where the model of `task` has. The paper chooses s from 0.2 to 0.6 for each model on its validation data.
    Shapes: deltas [n, *shape] → delta [*shape].

    >>> import torch
    >>> consensus(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0]]), strictness=0.5)  # 1 > ½·1 | 0 > ½·1 | 1 > ½·1
    tensor([2., 0., 0.])
    """
    import torch

    total = weighted_sum(deltas, each(weight, len(deltas)))
    served = torch.zeros_like(total, dtype=torch.int32)
    factors = each(strictness, len(deltas))
    for i in [task - 1] if task else range(len(deltas)):
        served += deltas[i].abs() > (total - deltas[i]).abs_().mul_(factors[i])
    return total.masked_fill_(served < (1 if task else agreeing), 0.0).mul_(scale)
