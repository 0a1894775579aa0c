"""Where the parts of a PyTorch file lie, in either format: its pickle, and the bytes of every storage."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .pickled import PickleError, unpickle
from .torch_values import Storage, storage_of

_ZIP = b"PK\x03\x04"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before PyTorch 1.6
_MOST_DIRECTORY = 32 << 20  # bytes of a zip's list of entries
_END, _END_64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_LOCAL = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True)
class Archive:
    """What a file holds: the value of its pickle, and for each storage's key where its bytes begin and how many."""

    value: Any
    places: Mapping[str, tuple[int, int]]


def read_archive(path: Path, names: Mapping[str, Any], most: int) -> Archive:
    """Read the pickle of a file, of at most so many bytes, without running anything in it.

    Raises PickleError, a ValueError, for everything that is no whole file of plain tensors, or OSError.
    """
    seen: dict[str, set[Storage]] = {}  # by key

    def storage(identity: Any) -> Storage:
        found = storage_of(identity)
        seen.setdefault(found.key, set()).add(found)
        return found

    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
        read = _Reading(file, file.seek(0, os.SEEK_END), names, storage, most)
        found = _of_zip(read) if is_zip else _of_old(read, seen)
    for key, views in seen.items():
        length = found.places.get(key, (0, 0))[1]
        if any((view.begin + view.entries) * view.kind.size > length for view in views):
            raise PickleError("it lacks bytes of a tensor")
    return found


@dataclass(frozen=True)
class _Reading:
    """An open file, and what its pickles may ask for."""

    file: BinaryIO
    size: int
    names: Mapping[str, Any]
    storage: Callable[[Any], Storage]
    most: int

    def part(self, begin: int, length: int) -> bytes:
        """Read a part of the file that goes into memory."""
        if length > self.most:
            raise PickleError(f"a pickle of {length:,} bytes; at most {self.most:,} are read")
        self.file.seek(begin)
        return self.file.read(length)


# ---- since PyTorch 1.6: a zip


def _of_zip(read: _Reading) -> Archive:
    _check_directory(read.file)
    try:
        with zipfile.ZipFile(read.file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, EOFError) as error:
        raise PickleError(f"a damaged zip: {error}") from error
    pickles = [entry.filename for entry in entries if entry.filename.endswith("data.pkl")]
    if len(pickles) != 1:
        raise PickleError("a zip without a data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    wanted = ("data.pkl", "byteorder", "data/")
    found = [entry for entry in entries if entry.filename.removeprefix(root).startswith(wanted)]
    places = {entry.filename.removeprefix(root): _place(read, entry) for entry in found}
    if len(places) < len(found):
        raise PickleError("a zip that holds two entries of one name")
    pickle, order = places.pop("data.pkl"), places.pop("byteorder", None)
    if order and read.part(*order) != b"little":
        raise PickleError("numbers of another byte order: save it again on this machine")
    value, _ = unpickle(read.part(*pickle), read.names, read.storage)
    return Archive(value, {name.removeprefix("data/"): place for name, place in places.items()})


def _check_directory(file: BinaryIO) -> None:
    """Look how long a zip's list of entries says it is, before it is read."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - (1 << 16) - _END.size))
    tail = file.read()
    at = len(tail) - _END.size
    if at < 0 or not (tail[at:].startswith(b"PK\5\6") and tail.endswith(b"\0\0")):
        at = tail.rfind(b"PK\5\6")
    if at < 0 or at + _END.size > len(tail):
        raise PickleError("a zip that is cut short")
    length = _END.unpack_from(tail, at)[5]
    if at >= _LOCATOR.size and tail.startswith(b"PK\6\7", at - _LOCATOR.size):
        _, _, where, _ = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        for place in (where, size - len(tail) + at - _LOCATOR.size - _END_64.size):  # zipfile looks at the second
            if 0 <= place <= size - _END_64.size:
                file.seek(place)
                found = _END_64.unpack(file.read(_END_64.size))
                length = max(length if length != 0xFFFFFFFF else 0, found[8] if found[0] == b"PK\6\6" else 0)
    if length > _MOST_DIRECTORY:
        raise PickleError(f"a zip whose list of entries has {length:,} bytes")


def _place(read: _Reading, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Find where the bytes of an entry lie, which must be stored as they are."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise PickleError("compressed entries, which PyTorch does not write")
    read.file.seek(entry.header_offset)
    raw = read.file.read(_LOCAL.size)
    if len(raw) < _LOCAL.size or not raw.startswith(_ZIP):
        raise PickleError("a damaged zip")
    name, extra = _LOCAL.unpack(raw)[-2:]
    begin = entry.header_offset + _LOCAL.size + name + extra
    if begin + entry.file_size > read.size:
        raise PickleError("it is cut short")
    return begin, entry.file_size


# ---- before: five pickles, then the storages one after the other


def _of_old(read: _Reading, seen: Mapping[str, set[Storage]]) -> Archive:
    read.file.seek(0)
    raw = read.file.read(read.most)
    at, parts = 0, []
    for expected in (_MAGIC, _PROTOCOL, None, None, None):
        value, at = unpickle(raw, read.names, read.storage, at)
        if expected is not None and value != expected:
            raise PickleError("it does not begin as PyTorch's files do")
        parts.append(value)
    about, value, keys = parts[2:]
    if not isinstance(about, dict) or about.get("little_endian") is not True:
        raise PickleError("numbers of another byte order: save it again on this machine")
    if type(keys) is not list or not all(type(key) is str for key in keys) or len(set(keys)) < len(keys):
        raise PickleError("no list of storages")
    return Archive(value, dict(_in_order(read, keys, seen, at)))


def _in_order(
    read: _Reading, keys: list[str], seen: Mapping[str, set[Storage]], at: int
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Go through the storages as they follow each other: how many entries, then the entries."""
    for key in keys:
        read.file.seek(at)
        count = int.from_bytes(read.file.read(8), "little")
        sizes = {storage.kind.size for storage in seen.get(key, ())}
        if len(sizes) != 1:
            raise PickleError("its storages are not those that its tensors name")
        length = count * sizes.pop()
        if at + 8 + length > read.size:
            raise PickleError("it is cut short")
        yield key, (at + 8, length)
        at += 8 + length
