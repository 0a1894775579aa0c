"""What a checkpoint needs of one file of weights, of whatever kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from ..dtypes import byte_size, torch_dtype
from ..tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class WeightFile(ABC):
    """A file of weights, known by its header: specs of its tensors, and reads of their bytes."""

    path: Path
    metadata: dict[str, str]
    specs: dict[str, TensorSpec]
    digest: str  # of what the file says it holds

    @abstractmethod
    def read_into(self, name: str, buffer: memoryview, at: int = 0) -> None:
        """Fill a buffer with the tensor's stored bytes, from byte `at` of the tensor on."""

    def read(self, name: str, part: slice) -> Tensor:
        """Read a flat run of entries [part.stop - part.start], in the stored dtype."""
        import torch

        spec = self.specs[name]
        size = byte_size(spec.dtype, part.stop - part.start)
        raw = torch.empty(size, dtype=torch.uint8)
        self.read_into(name, raw.numpy().data, byte_size(spec.dtype, part.start))
        return raw.view(torch_dtype(spec.dtype))
