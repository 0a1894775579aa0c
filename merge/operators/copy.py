"""Take one model's tensor as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..operator import WHOLE, Part, operator

if TYPE_CHECKING:
    from torch import Tensor


@operator(source="mergekit 0.1.5 `passthrough` without its `scale`", laws=("identity", "scaling"), takes=1)
def copy(models: Tensor, *, part: Part = WHOLE) -> Tensor:
    """Take one model's tensor as it is: byte for byte, where the dtype stays.

    Formula: x₁. Shapes: models [1, *shape] → [*shape].

    >>> import torch
    >>> copy(torch.tensor([[1.0, 2.0]]))
    tensor([1., 2.])
    """
    return models[0].clone()
