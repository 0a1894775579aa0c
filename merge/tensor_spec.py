"""A tensor without its entries."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .dtypes import byte_size

_LONGEST_NAME = 1000


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


def name_mistake(name: str) -> str:
    r"""Say what is wrong with the name of a tensor; nothing: it can be shown, written and compared.

    >>> name_mistake("model.norm.weight"), name_mistake("a\x1b[2J")
    ('', 'its name holds control characters')
    """
    if len(name) > _LONGEST_NAME:
        return f"its name has {len(name)} characters"
    return "" if name.isprintable() else "its name holds control characters"
