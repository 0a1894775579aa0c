"""The journal of a build that is not finished: which tensors are, with their digests, so that it can be continued.

What a line is worth. A line says: the build of this identity made this tensor, and its bytes have this digest. It is a
claim, and only a claim: whoever continues reads the tensor's bytes again and compares their digest before a single one
of them is kept. So nothing depends on the order in which a system that lost its power had brought data and journal to
the disk. Whatever subset of writes arrived, a line is used exactly if it is whole (it carries a checksum over itself
and the identity, so neither a torn line nor a block of an older journal passes for one) and if the bytes that it speaks
of are there. Bytes and lines that were lost are made anew.

Surveys are not kept: they are carried out anew, and what they find is part of the identity (merge/building.py), so that
tensors which follow from it are continued only where it is the same.

What the order still decides is how much is lost. Data that was never synced may be gone after a power failure, so every
half minute of work is made durable: first the weight files, then the journal, which thus never promises, for long, what
the disk does not hold. The last sync before the result takes its name covers everything again, since `fsync` takes all
dirty pages of a file, whichever process wrote them. One case is not healed: after an error of the disk itself (EIO) the
system may hold pages as clean that never arrived, and reading them again would prove nothing; after such an error
nothing is kept (merge/output.py).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import blake3

from ..files.storage import sync_folder

SYNC_EVERY = 30.0  # seconds
_CHECKSUM = 32  # hexadecimal digits


@dataclass(frozen=True, slots=True)
class Finished:
    """A tensor that was made and written.

    Attributes:
        tensor: its name.
        digest: the BLAKE3 digest of its bytes.
        clean: whether it and its inputs were looked at for NaN and infinity, and none were found.
        learned: what its maker found out on the way and is asked for later.

    """

    tensor: str
    digest: str
    clean: bool
    learned: Any = None


class Journal:
    """An open journal, to which finished tensors are added from any thread."""

    def __init__(
        self, path: Path, identity: Mapping[str, str], finished: Iterable[Finished], sync: Callable[[], None]
    ) -> None:
        """Write it anew, in one step, with what is known to be finished; `sync` makes the weights durable."""
        head = json.dumps(identity, ensure_ascii=False)
        self._seal = _seal(head)
        new = path.with_name(f"{path.name}.new")
        lines = [_sealed(head, b""), *(self._line(one) for one in finished)]
        self._descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        self._lock, self._sync, self._synced = threading.Lock(), sync, time.monotonic()
        try:
            self._write("".join(lines))
            os.fsync(self._descriptor)
            new.replace(path)
            sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def _line(self, finished: Finished) -> str:
        return _sealed(json.dumps(asdict(finished), ensure_ascii=False), self._seal)

    def _write(self, text: str) -> None:
        data = memoryview(text.encode())
        while data:
            data = data[os.write(self._descriptor, data) :]

    def add(self, finished: Finished) -> None:
        """Add a tensor; now and then make what was finished durable, data first."""
        with self._lock:
            self._write(self._line(finished))
            due = time.monotonic() - self._synced > SYNC_EVERY
            if due:
                self._synced = time.monotonic()
        if due:
            self._sync()
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        """Use it in a block, at whose end it is closed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


@dataclass(frozen=True)
class Read:
    """What a journal says: the identity of the build, and the tensors that it finished."""

    identity: Mapping[str, str]
    finished: Mapping[str, Finished]


def read(path: Path) -> Read | None:
    """Read a journal up to the first line that is not whole; None where not even the first is."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return None
    head = _opened(lines[0], b"")
    if head is None:
        return None
    seal, finished = _seal(head), dict[str, Finished]()
    for line in lines[1:]:
        text = _opened(line, seal)
        if text is None:
            break
        try:
            one = Finished(**json.loads(text))
        except TypeError:  # of another version: none of it is continued, as the identity says
            break
        finished[one.tensor] = one
    return Read(json.loads(head), finished)


def _seal(head: str) -> bytes:
    return blake3.blake3(head.encode()).digest()


def _checksum(text: bytes, seal: bytes) -> str:
    return blake3.blake3(seal + text).hexdigest()[:_CHECKSUM]


def _sealed(text: str, seal: bytes) -> str:
    return f"{_checksum(text.encode(), seal)} {text}\n"


def _opened(line: bytes, seal: bytes) -> str | None:
    """Give the text of a line that is whole and sealed so."""
    checksum, _, text = line.partition(b" ")
    return text.decode() if checksum.decode("ascii", "replace") == _checksum(text, seal) else None
