"""Take a tensor that all models must share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..errors import MergeError
from ..operator import WHOLE, Part, operator

if TYPE_CHECKING:
    from torch import Tensor


@operator(
    source="mergekit 0.1.5: integer buffers are copied where they are identical", laws=("identity", "permutation")
)
def equal(
    models: Tensor,
    *,
    reason: Annotated[
        str, Field(description="what to say where they differ")
    ] = "choose one with a rule: operator: copy",
    part: Part = WHOLE,
) -> Tensor:
    """Take a tensor that is the same in all models, and refuse one that is not.

    Formula: x₁, where x₁ = x₂ = …. Tensors that are no floats (position ids, counters) are merged so.
    Shapes: models [n, *shape] → [*shape]. Raises MergeError where an entry differs.

    >>> import torch
    >>> equal(torch.tensor([[1, 2], [1, 2]]))
    tensor([1, 2])
    """
    if bool((models != models[:1]).any()):
        raise MergeError("", "the models differ here", reason)
    return models[0].clone()
