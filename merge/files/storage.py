"""Bytes at known places in files: positional reads and writes, preallocation and syncing, each with its plain fallback.

What a system lacks (`preadv`, `pwrite`, `posix_fallocate`, syncing a folder) is found by capability at the call.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import weakref
from pathlib import Path

BLOCK = 1 << 20
_BINARY = getattr(os, "O_BINARY", 0)


class PositionalFile:
    """An open file that is read and written at given offsets, from any thread."""

    def __init__(self, path: Path, *, size: int | None = None) -> None:
        """Open for reading; or, given a size, make a file of that size, with its space reserved, for writing."""
        self.path = path
        flags = os.O_RDONLY if size is None else os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._descriptor = os.open(path, flags | _BINARY, 0o666)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._seek_lock = threading.Lock()
        if size is not None:
            self._reserve(size)

    def _reserve(self, size: int) -> None:
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._descriptor, 0, size)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise  # a full disk
            else:
                return
        os.ftruncate(self._descriptor, size)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer (bytes) from this offset. EOFError where the file ends before."""
        done = 0
        while done < len(buffer):
            count = self._read_some(buffer[done:], offset + done)
            if count == 0:
                raise EOFError(f"{self.path} ends at byte {offset + done}")
            done += count

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [buffer], offset)
        with self._seek_lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            found = os.read(self._descriptor, len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def write(self, buffer: memoryview | bytes, offset: int) -> None:
        """Write the whole buffer (bytes) at this offset."""
        view = memoryview(buffer)
        done = 0
        while done < len(view):
            done += self._write_some(view[done:], offset + done)

    def _write_some(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._descriptor, buffer, offset)
        with self._seek_lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.write(self._descriptor, buffer)

    def sync(self) -> None:
        """Return when what was written has reached the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; a file that is no longer reachable closes itself."""
        self._close()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can (Windows cannot open a folder)."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
