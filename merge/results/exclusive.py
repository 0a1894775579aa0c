"""One process at a time: a lock on a file, which a process that has died does not hold.

`flock` where there is one, `msvcrt.locking` on Windows. Where a system, or a file system, has neither, a file that is
made exclusively holds the number of the process, and counts as long as that process lives.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BINARY = getattr(os, "O_BINARY", 0)
_UNABLE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)  # file systems that cannot lock
_WRITTEN_IN = 60.0  # seconds within which a process has written its number

Release = Callable[[], None]


def take(path: Path) -> Release | None:
    """Take the lock of this file, which is made; give what lets it go and removes the file; None where it is taken."""
    lock = _way()
    if lock is None:
        return _by_number(path)
    while True:
        descriptor, is_new = _opened(path)
        try:
            locked = lock(descriptor)
            if locked is not True:
                os.close(descriptor)
                if locked is None and is_new:
                    path.unlink(missing_ok=True)
                return _by_number(path) if locked is None else None
            if _is_still(path, descriptor):  # and not removed by the one who held it before
                _write_number(descriptor)
                return lambda: _release(path, descriptor)
            os.close(descriptor)
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _opened(path: Path) -> tuple[int, bool]:
    """Open the file; tell whether it was made by that."""
    with contextlib.suppress(FileExistsError):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o666), True
    return os.open(path, os.O_RDWR | os.O_CREAT | _BINARY, 0o666), False


def holder(path: Path) -> int | None:
    """Give the number of the process that holds the lock, as far as the file tells."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _way() -> Callable[[int], bool | None] | None:
    """Choose the system's way to lock an open file: it tells whether that worked, None where it cannot be done."""
    for name, function in (("fcntl", _by_flock), ("msvcrt", _by_msvcrt)):
        with contextlib.suppress(ImportError):
            module = importlib.import_module(name)
            return lambda descriptor, module=module, function=function: function(module, descriptor)  # type: ignore[misc]
    return None


def _by_flock(module: Any, descriptor: int) -> bool | None:
    try:
        module.flock(descriptor, module.LOCK_EX | module.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNABLE:
            return None
        raise
    return True


def _by_msvcrt(module: Any, descriptor: int) -> bool:
    try:
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # a byte far behind, so that the number can be read by others
        module.locking(descriptor, module.LK_NBLCK, 1)
    except OSError:
        return False
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_number(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a full disk: the number only serves a message
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, str(os.getpid()).encode())


def _release(path: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):  # Windows removes no open file
        path.unlink(missing_ok=True)
    os.close(descriptor)
    if os.name == "nt":
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _by_number(path: Path) -> Release | None:
    """Hold the file by the number of this process; what a process left that no longer lives is taken over."""
    for _ in range(2):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        except FileExistsError:
            if not _is_left(path):
                return None
            _set_aside(path)
        else:
            _write_number(descriptor)
            os.close(descriptor)
            return lambda: path.unlink(missing_ok=True)
    return None


def _is_left(path: Path) -> bool:
    """Tell whether whoever made the file no longer lives; one without a number may be just about to write it."""
    number = holder(path)
    if number is not None:
        return not _lives(number)
    try:
        return time.time() - path.stat().st_mtime > _WRITTEN_IN
    except FileNotFoundError:
        return True


def _set_aside(path: Path) -> None:
    """Remove what a dead process left; what another one that lives has put there since is put back."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)
        if _is_left(aside):
            aside.unlink()
        else:
            aside.rename(path)


def _lives(number: int) -> bool:
    if os.name == "nt":
        return True  # there is no way to ask without a risk: the user removes the file
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True
