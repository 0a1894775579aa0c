"""The output folder: made in a hidden folder beside its final place, and published by one rename.

The hidden folder, `.OUT.portmanteau-partial`, holds everything that a build which is not finished has: the result so
far, the journal of its finished tensors (merge/journal.py), the lock, and, for the moment between two renames, the
earlier result that gives way. A process may end anywhere, and the power too:

* before the renames the earlier result is in its place, and the journal says what can be kept of the new one;
* between them the next build puts the earlier result back, finds every tensor of the new one finished, and goes on;
* after them the new one is in its place, and what is left of the hidden folder is removed.

Everything in the result is synced, and then its folders, before the first rename: a name never stands for bytes that
the disk does not have.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import Mistake, OutputError
from ..files.storage import sync_file, sync_folder
from ..receipt import RECEIPT
from ..units import readable
from . import journal
from .exclusive import holder, take

_LONGEST_NAME = 220  # bytes; 255 with what temporary names add
_SLACK = 64 << 20  # room for companions and for what the file system keeps for itself


@dataclass(frozen=True)
class Work:
    """The hidden folder in which a result is made, and what stands in it."""

    home: Path

    @classmethod
    def of(cls, out: Path) -> Work:
        """Give that of a result; there need not be one."""
        return cls(out.absolute().with_name(f".{out.name}.portmanteau-partial"))

    @property
    def result(self) -> Path:
        """The result so far."""
        return self.home / "result"

    @property
    def journal(self) -> Path:
        """The journal of its finished tensors."""
        return self.home / "journal"

    @property
    def lock(self) -> Path:
        """The lock of the process that works here."""
        return self.home / "lock"

    @property
    def replaced(self) -> Path:
        """The earlier result, until the new one has its name."""
        return self.home / "replaced"

    @property
    def gone(self) -> Path:
        """What is being removed."""
        return self.home / "gone"

    def clear(self) -> None:
        """Remove what was made; the journal first, which speaks of it."""
        for path in (self.journal, self.journal.with_name(f"{self.journal.name}.new")):
            path.unlink(missing_ok=True)
        for folder in (self.result, self.gone):
            if folder.exists():
                shutil.rmtree(folder)

    @property
    def nbytes(self) -> int:
        """Bytes on the disk that it holds, which a build uses again or sets free."""
        found = 0
        for folder, _, names in os.walk(self.result):  # what cannot be looked at holds nothing
            for name in names:
                status = Path(folder, name).stat()
                found += getattr(status, "st_blocks", status.st_size // 512) * 512
        return found


def check_place(out: Path, *, nbytes: int, force: bool, since: str = "") -> None:
    """Check, before any work, that the result can be written. Raises OutputError with all that is in its way.

    `since` says how what stands there differs from what is asked for.
    """
    mistakes = place_mistakes(out, nbytes=nbytes, force=force, since=since)
    if mistakes:
        raise OutputError.of(mistakes)


def place_mistakes(out: Path, *, nbytes: int, force: bool, since: str = "") -> list[Mistake]:
    """Find everything that would keep a result of so many bytes from being written."""
    where, found = str(out), _standing_mistakes(out, force=force, since=since)
    if not out.name.isprintable() or len(os.fsencode(out.name)) > _LONGEST_NAME:
        found.append(Mistake(where, "is no name for a folder", "choose a shorter name, of signs that can be shown"))
    home = _existing_parent(out)
    if not home.is_dir():
        return [*found, Mistake(where, f"{home} is a file")]
    if not os.access(home, os.W_OK | os.X_OK):
        found.append(Mistake(where, f"no right to write in {home}"))
    free = shutil.disk_usage(home).free + Work.of(out).nbytes
    if free < nbytes + _SLACK:
        hint = "free some space, choose another disk, or a smaller output dtype"
        what = f"needs {readable(nbytes + _SLACK)}, and {home} has {readable(free)} free"
        found.append(Mistake(where, what, hint))
    return found


def check_name(out: Path, *, force: bool) -> None:
    """Check, when all work is done, that nothing has come to stand there that may not be replaced: OutputError."""
    mistakes = _standing_mistakes(out, force=force)
    if mistakes:
        raise OutputError.of(mistakes)


def _standing_mistakes(out: Path, *, force: bool, since: str = "") -> list[Mistake]:
    """Find why what stands there may not be replaced."""
    if not os.path.lexists(out) or (force and _is_ours(out)):  # a broken link is there too
        return []
    if force:
        hint = "--force replaces only what portmanteau built, or an empty folder; remove this one yourself if it may go"
        return [Mistake(str(out), "exists, and was not built by portmanteau", hint)]
    what = f"exists already{since and f', and is not what is asked for: {since}'}"
    is_ours = "or replace it with --force" if _is_ours(out) else "it was not built by portmanteau: --force leaves it"
    return [Mistake(str(out), what, f"choose another name, {is_ours}")]


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


def is_result(out: Path) -> bool:
    """Tell whether a result stands there."""
    return os.path.isfile(out / RECEIPT) and not out.is_symlink()  # noqa: PTH113 - of a name too long it says no


def _is_ours(out: Path) -> bool:
    return out.is_dir() and not out.is_symlink() and ((out / RECEIPT).is_file() or not any(out.iterdir()))


def _existing_parent(out: Path) -> Path:
    """Find the nearest thing above that exists, which should be a folder."""
    parent = out.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    return parent


@contextmanager
def published(out: Path, *, fresh: bool = False, check: Callable[[], None] = lambda: None) -> Iterator[Work]:
    """Give a folder to fill. It takes its final name when the block ends well, and `check` then raises nothing.

    After an error, or an interrupt, what is finished stays for the same command to continue, and the error says so in
    a note; where nothing is finished nothing is left. `fresh` removes what an earlier build left.

    Raises OutputError where another process builds the same result.
    """
    out = out.absolute()
    new = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    with _held(out) as work:
        if fresh:
            work.clear()
        filled = False
        try:
            yield work
            filled = True
            _sync(work.result)
            check()
            _rename(work, out)
            for folder in (out.parent, *(one.parent for one in new)):
                sync_folder(folder)
            work.clear()
        except BaseException as error:
            told = _as_output_error(out, error) if isinstance(error, OSError) else error
            if filled and not work.result.exists():
                told.add_note(f"{out} is written all the same")
            else:
                _leave(work, error, told)
            raise told from (error if told is not error else error.__cause__)


def healed(out: Path) -> None:
    """Bring what a process left that ended while it published into order. Raises OutputError where one still works."""
    if os.path.isdir(Work.of(out).home):  # noqa: PTH112 - of a name too long it says no, and does not raise
        with _held(out.absolute()):
            pass


@contextmanager
def _held(out: Path) -> Iterator[Work]:
    """Hold the hidden folder against other processes, in order; where nothing is left in it, it goes."""
    work, release = Work.of(out), None
    while release is None:
        work.home.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # whoever held it just removed it
            release = take(work.lock)
            if release is None:
                number = holder(work.lock)
                by = f" (process {number})" if number else ""
                hint = "wait until it is done, or choose another name"
                raise OutputError(str(out), f"is being built by another process{by}", hint)
    try:
        _heal(work, out)
        yield work
    finally:
        release()
        with suppress(OSError):
            work.home.rmdir()


def _heal(work: Work, out: Path) -> None:
    """Put back an earlier result whose successor did not take its name; remove what was left to be removed."""
    if work.replaced.exists():
        work.replaced.rename(work.gone if os.path.lexists(out) else out)
    if work.gone.exists():
        shutil.rmtree(work.gone)
    if not (work.journal.exists() and work.result.exists()):
        work.clear()


def _leave(work: Work, error: BaseException, told: BaseException) -> None:
    """Keep what can be continued, and say so; otherwise leave nothing."""
    read = journal.read(work.journal)
    if read is None or not read.finished or not work.result.is_dir() or getattr(error, "errno", 0) == errno.EIO:
        with suppress(OSError):
            work.clear()
        if isinstance(error, KeyboardInterrupt):
            told.add_note("nothing was written")
        return
    count = f"{len(read.finished)} finished tensor{'s are' if len(read.finished) > 1 else ' is'} kept"
    told.add_note(f"{count} in {work.home}: the same command continues, with --fresh it starts anew")


def _as_output_error(out: Path, error: OSError) -> OutputError:
    hint = "free some space, choose another disk, or a smaller output dtype" if error.errno == errno.ENOSPC else ""
    return OutputError(str(out), f"cannot be written: {error.strerror or error}", hint)


def _sync(folder: Path) -> None:
    """Bring every file in a folder to the disk, then the names."""
    for path in sorted(folder.rglob("*"), reverse=True):
        (sync_folder if path.is_dir() else sync_file)(path)
    sync_folder(folder)


def _rename(work: Work, out: Path) -> None:
    """Let the finished folder take its name; an older one gives way only then, and is put back if that fails."""
    if not out.exists():
        work.result.rename(out)
        return
    try:
        out.rename(work.replaced)
        work.result.rename(out)
    except BaseException:
        if not out.exists():
            work.replaced.rename(out)
        raise
    work.replaced.rename(work.gone)
