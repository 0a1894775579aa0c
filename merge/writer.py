"""Safetensors written in place: headers first, every tensor at its known offset, in any order, from any thread."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

from .dtypes import DTYPES
from .files.digests import digest_of_run
from .files.storage import PositionalFile, sync_folder
from .form import MODEL, Form
from .tensor_spec import TensorSpec

INDEX = "model.safetensors.index.json"
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file: its name, its header, and where each of its tensors begins in the file."""

    file: str
    header: bytes
    offsets: Mapping[str, int]
    size: int


def layout(specs: Iterable[TensorSpec], shard_size: int, form: Form = MODEL) -> tuple[Shard, ...]:
    """Lay tensors out, in order, in shards of at most `shard_size` bytes; a larger tensor gets one of its own.

    What is no model has one file, whatever its size, or one in each of its sub-folders.
    """
    if not form.is_model:
        return _by_folder(specs, form)
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    count = len(groups)
    names = [form.weights] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    return tuple(_shard(name, group, form.metadata) for name, group in zip(names, groups, strict=True))


def _by_folder(specs: Iterable[TensorSpec], form: Form) -> tuple[Shard, ...]:
    """Lay out one file in each folder that the form names."""
    groups: dict[str, list[TensorSpec]] = {} if form.folders else {"": []}
    for spec in specs:
        groups.setdefault(form.folders.get(spec.name, ""), []).append(spec)
    return tuple(_shard((PurePath(folder) / form.weights).as_posix(), g, form.metadata) for folder, g in groups.items())


def _shard(file: str, specs: list[TensorSpec], metadata: Mapping[str, str]) -> Shard:
    """Lay out one file: wider dtypes first, so that every tensor is aligned to its entries."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    starts: dict[str, int] = {}
    end = 0
    for spec in sorted(specs, key=lambda spec: -DTYPES[spec.dtype].bits):
        starts[spec.name] = end
        end += spec.nbytes
        offsets = [starts[spec.name], end]
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    raw = len(text).to_bytes(8, "little") + text
    return Shard(file, raw, {name: len(raw) + start for name, start in starts.items()}, len(raw) + end)


class Writer:
    """The weight files of one output folder: preallocated, then filled."""

    def __init__(self, folder: Path, specs: Iterable[TensorSpec], shard_size: int, form: Form = MODEL) -> None:
        """Make the files at their full size, with their headers. OSError where the disk is full.

        Weight files of that size that are there already, and only they, keep what they hold.
        """
        self._folder = folder
        self._is_model = form.is_model
        every = tuple(specs)
        self._sizes = {spec.name: spec.nbytes for spec in every}
        self.shards = layout(every, shard_size, form)
        self._place: dict[str, tuple[PositionalFile, int]] = {}
        self._files: list[PositionalFile] = []
        kept = self._clear(folder)
        try:
            for shard in self.shards:
                (folder / shard.file).parent.mkdir(parents=True, exist_ok=True)
                file = PositionalFile(folder / shard.file, size=shard.size, again=shard.file in kept)
                self._files.append(file)
                file.write(shard.header, 0)
                self._place.update({name: (file, offset) for name, offset in shard.offsets.items()})
        except BaseException:
            self.close()
            raise

    def _clear(self, folder: Path) -> set[str]:
        """Remove what an earlier build left here beside whole weight files; give the names of these."""
        sizes, kept = {shard.file: shard.size for shard in self.shards}, set[str]()
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and path.stat().st_size == sizes.get(name):
                kept.add(name)
            elif not path.is_dir():
                path.unlink()
        return kept

    def digest(self, name: str, advance: Callable[[int], None]) -> str:
        """Read a tensor's bytes again, and give their digest."""
        file, offset = self._place[name]
        return digest_of_run(file, offset, self._sizes[name], advance)

    def put(self, name: str, data: memoryview, at: int) -> None:
        """Write some bytes of a tensor, at byte `at` of it."""
        file, offset = self._place[name]
        file.write(data, offset + at)

    def finish(self, *, forget: bool = False) -> list[str]:
        """Write the index where there are several shards, bring everything to the disk, give the names of the files.

        `forget`: let the system drop them from its cache then.
        """
        names = [shard.file for shard in self.shards]
        if self._is_model and len(names) > 1:
            size = sum(shard.size - len(shard.header) for shard in self.shards)
            weight_map = {name: shard.file for shard in self.shards for name in shard.offsets}
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            names.append(INDEX)
        self.sync()
        if forget:
            for file in self._files:
                file.forget()
        self.close()
        return names

    def sync(self) -> None:
        """Return when what was written has reached the disk, and the names of the files too."""
        for file in self._files:
            file.sync()
        for folder in {file.path.parent: None for file in self._files}:
            sync_folder(folder)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
