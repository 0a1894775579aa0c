"""Memory into which tensors are read and in which they are made, kept for each thread."""

from __future__ import annotations

import mmap
import threading
from ctypes import addressof, c_char

ALIGNMENT = 64
_kept = threading.local()


class Arena:
    """Memory of one thread, handed out anew for each tensor: pages that were touched once are not touched anew."""

    def __init__(self, size: int) -> None:
        """Reserve so many bytes."""
        self._memory = mmap.mmap(-1, size)
        self._address = addressof(c_char.from_buffer(self._memory))
        self._taken = 0
        self.size = size

    def cleared(self) -> Arena:
        """Hand out everything anew."""
        self._taken = 0
        return self

    def take(self, size: int) -> tuple[memoryview, int]:
        """Give so many bytes, and their address."""
        start = self._taken
        self._taken += -(-size // ALIGNMENT) * ALIGNMENT
        return memoryview(self._memory)[start : start + size], self._address + start


def arena(size: int) -> Arena:
    """Give this thread's memory, of at least this size."""
    found: Arena | None = getattr(_kept, "arena", None)
    if found is None or found.size < size:
        _kept.arena = found = None  # the smaller one goes first
        _kept.arena = found = Arena(size)
    return found.cleared()
