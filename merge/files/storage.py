"""Bytes at known places in files: positional reads and writes, preallocation and syncing, each with its plain fallback.

What a system lacks (`preadv`, `pwrite`, `posix_fallocate`, `posix_fadvise`, `sync_file_range`, syncing a folder) is
found by capability at the call.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import weakref
from functools import cache
from pathlib import Path
from typing import Any

BLOCK = 1 << 20
_STRETCH = 16 << 20  # written bytes are sent to the disk, without waiting, in stretches of so many
_WRITE = 2  # SYNC_FILE_RANGE_WRITE
_BINARY = getattr(os, "O_BINARY", 0)


class PositionalFile:
    """An open file that is read and written at given offsets, from any thread."""

    def __init__(self, path: Path, *, size: int | None = None, again: bool = False) -> None:
        """Open for reading; or, given a size, make a file of that size, with its space reserved, for writing.

        `again`: the file is there, and what it holds stays.
        """
        self.path = path
        flags = os.O_RDONLY if size is None else os.O_RDWR | (0 if again else os.O_CREAT | os.O_EXCL)
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
        first, last = offset // _STRETCH, (offset + done) // _STRETCH
        if first < last:
            self._send(first * _STRETCH, (last - first) * _STRETCH)

    def _send(self, offset: int, count: int) -> None:
        """Let the system begin to bring a range to the disk, so that `sync` finds little left to wait for."""
        function = _sync_file_range()
        if function is not None:
            function(self._descriptor, offset, count, _WRITE)  # a hint: whether it fails does not matter

    def _write_some(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self._descriptor, buffer, offset)
        with self._seek_lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.write(self._descriptor, buffer)

    def sync(self) -> None:
        """Return when what was written has reached the disk."""
        os.fsync(self._descriptor)

    def forget(self, offset: int = 0, count: int = 0) -> None:
        """Let the system drop the pages of a range (count 0: to the end) from its cache, for it is not read again."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # a hint: what cannot take it keeps its pages
                os.posix_fadvise(self._descriptor, offset, count, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file; a file that is no longer reachable closes itself."""
        self._close()


def physical_memory() -> int | None:
    """Give the bytes of memory that the machine has, where the system tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


@cache
def _sync_file_range() -> Any | None:
    """Give the system's function, which Python's library lacks; None where there is none."""
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, TypeError, AttributeError):  # not Linux
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def sync_file(path: Path) -> None:
    """Bring a file to the disk."""
    descriptor = os.open(path, os.O_RDWR | _BINARY)  # Windows syncs none that is open for reading alone
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can (Windows cannot open a folder)."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
