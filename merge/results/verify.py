"""A finished result against its receipt: every byte of it belongs to a tensor, a header or a file with a digest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, Mistake, some
from ..files.digests import digest, digest_of_file, digest_of_run
from ..files.safetensors_header import PREFIX, Header, header_length, parse_header
from ..files.storage import PositionalFile
from ..limits import Limits
from ..progress import Progress
from ..receipt import RECEIPT, Receipt, read

_AGAIN = "build it again with --force, or fetch it again"


@dataclass(frozen=True)
class Verified:
    """What was compared, and what is not as it was written."""

    tensors: int
    files: int
    nbytes: int
    damaged: tuple[Mistake, ...]


def verify(out: str | Path, *, threads: int | None = None, progress: Progress | None = None) -> Verified:
    """Compare every byte of a result with what its receipt says; name each tensor and file that differs.

    >>> from portmanteau.merge import build, open
    >>> receipt = build(open("examples/models/base"), "merged")
    >>> verify("merged").damaged
    ()
    >>> Path("merged/config.json").write_text("{}")
    2
    >>> [one.what for one in verify("merged").damaged]
    ['is damaged: its bytes are not those that were written']

    Raises OutputError where there is no receipt, or where that is damaged itself.
    """
    receipt = read(Path(out))
    found = damage(Path(out), receipt, threads=threads, progress=progress)
    nbytes = sum(record["bytes"] for record in receipt.files.values())
    return Verified(len(receipt.outputs), len(receipt.files), nbytes, tuple(found))


def damage(
    out: Path, receipt: Receipt, *, threads: int | None = None, progress: Progress | None = None
) -> list[Mistake]:
    """Find what of a result is not as its receipt says."""
    told = progress or Progress()
    there = {path.relative_to(out).as_posix(): path for path in sorted(out.rglob("*")) if not path.is_dir()}
    mistakes = [
        Mistake(str(out / name), "is not of this build: its receipt does not name it", "remove it, if it is not yours")
        for name in there
        if name not in receipt.files and name != RECEIPT
    ]
    work: list[Callable[[], Mistake | None]] = []
    placed: set[str] = set()
    for name, record in receipt.files.items():
        if name not in there:
            mistakes.append(Mistake(str(out / name), "is missing", _AGAIN))
        elif "header" not in record:
            work.append(_Whole(out / name, record["digest"], told))
        else:
            header = _header(out / name, record)
            if isinstance(header, Mistake):
                mistakes.append(header)
                continue
            tensors = list(_tensors(out / name, header, receipt.outputs, told))
            placed.update(one.name for one in tensors)
            work += tensors
    told.begin("verify", sum(record["bytes"] for record in receipt.files.values()), len(receipt.outputs))
    with ThreadPoolExecutor(Limits.of(threads, None).threads, "verify") as pool:
        mistakes += [found for found in pool.map(lambda compare: compare(), work) if found is not None]
    lost = [name for name in receipt.outputs if name not in placed]
    if lost and not mistakes:
        mistakes.append(Mistake(str(out), f"no weight file holds {some(lost)}", _AGAIN))
    return mistakes


@dataclass(frozen=True)
class _Whole:
    """The comparison of a file."""

    path: Path
    digest: str
    progress: Progress

    def __call__(self) -> Mistake | None:
        try:
            same = digest_of_file(self.path, self.progress.advance) == self.digest
        except (OSError, EOFError) as error:
            return Mistake(str(self.path), f"cannot be read: {error}", _AGAIN)
        return (
            None if same else Mistake(str(self.path), "is damaged: its bytes are not those that were written", _AGAIN)
        )


@dataclass(frozen=True)
class _Tensor:
    """The comparison of a tensor."""

    path: Path
    name: str
    start: int
    size: int
    digest: str | None
    progress: Progress

    def __call__(self) -> Mistake | None:
        where = f"{self.path}: tensor {self.name}"
        file = PositionalFile(self.path)
        try:
            same = digest_of_run(file, self.start, self.size, self.progress.advance) == self.digest
        except (OSError, EOFError) as error:
            return Mistake(where, f"cannot be read: {error}", _AGAIN)
        finally:
            file.close()
            self.progress.advance(0, 1)
        return None if same else Mistake(where, "is damaged: its bytes are not those that were written", _AGAIN)


def _header(path: Path, record: Mapping[str, Any]) -> Header | Mistake:
    """Read the header of a weight file whose size and header are those that were written."""
    size = path.stat().st_size
    if size != record["bytes"]:
        return Mistake(str(path), f"has {size:,} bytes, and {record['bytes']:,} were written", _AGAIN)
    damaged = Mistake(str(path), "its header is damaged, so that its tensors cannot be found", _AGAIN)
    try:
        with path.open("rb") as file:
            prefix = file.read(PREFIX)
            raw = file.read(header_length(prefix, str(path)))
        if digest(prefix + raw) != record["header"]:
            return damaged
        return parse_header(raw, size, str(path))
    except CheckpointError:
        return damaged


def _tensors(path: Path, header: Header, outputs: Mapping[str, str], progress: Progress) -> Iterator[_Tensor]:
    for name, spec in header.specs.items():
        yield _Tensor(path, name, header.offsets[name], spec.nbytes, outputs.get(name), progress)
