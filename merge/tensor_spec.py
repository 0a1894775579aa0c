"""A tensor without its entries."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .dtypes import byte_size


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its entries: name, safetensors dtype name (`BF16`), shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """Number of entries; 1 for a scalar."""
        return math.prod(self.shape)

    def run(self, part: slice) -> slice:
        """Give the bounds of a part as Python cuts a sequence: never beyond the last entry."""
        start, stop, _ = part.indices(self.entries)
        return slice(start, max(start, stop))

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return byte_size(self.dtype, self.entries)
