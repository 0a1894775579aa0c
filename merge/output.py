"""The output folder: made beside its final place under a temporary name, and published by one rename."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import Mistake, OutputError
from .files.storage import sync_folder
from .receipt import RECEIPT
from .units import readable

_LONGEST_NAME = 220  # bytes; 255 with what temporary names add
_SLACK = 64 << 20  # room for companions and for what the file system keeps for itself


def check_place(out: Path, *, nbytes: int, force: bool) -> None:
    """Check, before any work, that the result can be written. Raises OutputError with all that is in its way."""
    mistakes = place_mistakes(out, nbytes=nbytes, force=force)
    if mistakes:
        raise OutputError.of(mistakes)


def place_mistakes(out: Path, *, nbytes: int, force: bool) -> list[Mistake]:
    """Find everything that would keep a result of so many bytes from being written."""
    where, found = str(out), []
    if os.path.lexists(out) and not force:  # a broken link is there too
        found.append(Mistake(where, "exists already", "choose another name, or replace it with --force"))
    elif os.path.lexists(out) and not _is_ours(out):
        hint = "--force replaces only what portmanteau built, or an empty folder; remove this one yourself if it may go"
        found.append(Mistake(where, "exists, and was not built by portmanteau", hint))
    if not out.name.isprintable() or len(os.fsencode(out.name)) > _LONGEST_NAME:
        found.append(Mistake(where, "is no name for a folder", "choose a shorter name, of signs that can be shown"))
    home = _existing_parent(out)
    if not home.is_dir():
        return [*found, Mistake(where, f"{home} is a file")]
    if not os.access(home, os.W_OK | os.X_OK):
        found.append(Mistake(where, f"no right to write in {home}"))
    free = shutil.disk_usage(home).free
    if free < nbytes + _SLACK:
        hint = "free some space, choose another disk, or a smaller output dtype"
        what = f"needs {readable(nbytes + _SLACK)}, and {home} has {readable(free)} free"
        found.append(Mistake(where, what, hint))
    return found


def check_file(path: Path, *, force: bool) -> None:
    """Check, before any work, that a file beside the result can be written. Raises OutputError where it cannot."""
    if path.is_dir():
        raise OutputError(str(path), "is a folder", "name a file")
    if os.path.lexists(path) and not force:
        raise OutputError(str(path), "exists already", "choose another name, or replace it with --force")
    if not path.absolute().parent.is_dir():
        raise OutputError(str(path), f"there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise OutputError(str(path), "no right to write it")


def _is_ours(out: Path) -> bool:
    return out.is_dir() and not out.is_symlink() and ((out / RECEIPT).is_file() or not any(out.iterdir()))


def _existing_parent(out: Path) -> Path:
    """Find the nearest thing above that exists, which should be a folder."""
    parent = out.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    return parent


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """Give a folder to fill. It takes its final name when the block ends well; after an error nothing is left of it."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.portmanteau-partial")
    if work.exists():
        shutil.rmtree(work)  # left over from a build that was killed
    try:
        work.mkdir()
        yield work
        sync_folder(work)
        _rename(work, out)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError):
            hint = "free some space, choose another disk, or a smaller output dtype"
            what = f"cannot be written: {error.strerror or error}"
            raise OutputError(str(out), what, hint if error.errno == errno.ENOSPC else "") from error
        raise
    sync_folder(out.parent)


def _rename(work: Path, out: Path) -> None:
    """Let the finished folder take its name; an older one gives way only then, and is put back if that fails."""
    if not out.exists():
        work.rename(out)
        return
    old = out.with_name(f".{out.name}.portmanteau-replaced")
    if old.exists():
        shutil.rmtree(old)
    out.rename(old)
    try:
        work.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)
