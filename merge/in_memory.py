"""A checkpoint of tensors that are in memory already: a state dict, the result of a training run, a decoded file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from .checkpoint import Checkpoint
from .companions import Companions
from .dtypes import from_torch
from .node import Source
from .tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class InMemory(Checkpoint):
    """A checkpoint over tensors in memory; they are not copied."""

    revision: str | None = None
    repository: str | None = None
    files: tuple[()] = ()

    def __init__(self, label: str, tensors: Mapping[str, Tensor], companions: Companions | None = None) -> None:
        """Name the tensors; `companions` stand beside them when they are written."""
        self.label = label
        self.companions = companions or Companions()
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()
        }

    def beside(self, companions: Companions) -> Self:
        """Give the same checkpoint with other companions."""
        return type(self)(self.label, self._tensors, companions)

    def node(self, name: str) -> Source:
        """Give the tensor."""
        return Source(self, self.specs[name])

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """Give a copy of one tensor, or of a flat run of its entries."""
        tensor = self._tensors[name]
        return tensor.reshape(-1)[part].clone() if part is not None else tensor.clone()

    def read_into(self, name: str, buffer: memoryview, at: int = 0) -> None:
        """Fill a buffer with the tensor's bytes, from byte `at` of the tensor on."""
        import torch

        size = self._tensors[name].element_size()
        flat = self.read(name, slice(at // size, (at + len(buffer)) // size))
        buffer[:] = flat.contiguous().view(torch.uint8).numpy().data
