"""A reference (a folder, a file, a Hub id) to a checkpoint on disk. Only headers are read to open one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Self

from .checkpoint import Checkpoint
from .companions import Companions, gather
from .dtypes import torch_shape
from .errors import CheckpointError, Mistake, some
from .files import hub, places
from .files.json_file import INDEX_BYTES, INDEX_VALUES, read_json
from .files.remote_file import RemoteFile
from .files.safetensors_file import SafetensorsFile
from .files.weight_file import WeightFile
from .node import Source
from .tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_, _INDEX = hub.MODEL[0]
_LEGACY = (".bin", ".pt", ".pth")
_AGAIN = "download the folder again"
_MOST_NAMED = 50  # tensors in which an index and its shards differ
_MIXED = "index and shards come from different saves: download the folder again"


class StoredCheckpoint(Checkpoint):
    """A checkpoint on disk: weight files opened by their headers, and the companions in their folder."""

    def __init__(
        self,
        label: str,
        files: Sequence[WeightFile],
        companions: Companions,
        revision: str | None = None,
        repository: str | None = None,
    ) -> None:
        """Put the files of one checkpoint together. Raises CheckpointError for a tensor that two of them hold.

        `repository` and `revision` say where on the Hub they come from.
        """
        self.label = label
        self.files = tuple(files)
        self.companions = companions
        self.revision = revision
        self.repository = repository
        self._file: dict[str, WeightFile] = {}
        for file in files:
            for name in file.specs:
                if name in self._file:
                    raise CheckpointError(f"{file.path}: tensor {name}", f"also in {self._file[name].path.name}")
                self._file[name] = file
        self.specs: Mapping[str, TensorSpec] = {name: file.specs[name] for name, file in self._file.items()}

    @property
    def bytes_to_download(self) -> int:
        """The bytes of those files on the Hub of which only the headers are here."""
        return sum(file.size for file in self.files if isinstance(file, RemoteFile))

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.files[0].path.parent

    def beside(self, companions: Companions) -> Self:
        """Give the same checkpoint with other companions."""
        return type(self)(self.label, self.files, companions, self.revision, self.repository)

    def node(self, name: str) -> Source:
        """Give the stored tensor."""
        return Source(self, self.specs[name])

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """Read one tensor, or a flat run of its entries."""
        spec = self.specs[name]
        if part is None:
            return self._file[name].read(name, slice(0, spec.entries)).reshape(torch_shape(spec.dtype, spec.shape))
        return self._file[name].read(name, spec.run(part))

    def read_into(self, name: str, buffer: memoryview, at: int = 0) -> None:
        """Fill a buffer with the tensor's stored bytes, from its byte `at` on."""
        self._file[name].read_into(name, buffer, at)

    def forget(self, name: str) -> None:
        """Tell the system that a tensor is not read again."""
        self._file[name].forget(name)


def open(
    reference: str | Path, *, revision: str | None = None, label: str | None = None, weights: bool = True
) -> StoredCheckpoint:
    """Open a folder, a `.safetensors` or `.bin` file, or a Hub id `ORG/NAME[@REVISION]`, by its headers alone.

    What is on the Hub is downloaded; with `weights=False` only the headers of its `.safetensors` files, to plan with.

    >>> base = open("examples/models/base")
    >>> base
    <StoredCheckpoint examples/models/base: 75 tensors, 0.7 MB>
    >>> base.specs["model.norm.weight"]  # from the header
    TensorSpec(name='model.norm.weight', dtype='BF16', shape=(64,))
    >>> base["model.norm.weight"].shape  # read now
    torch.Size([64])

    Raises CheckpointError where there is nothing, or where what is there is not a whole checkpoint.
    """
    path = places.user_path(reference)
    label = label or str(reference)
    kind = places.kind(path)
    if kind == "folder":
        return StoredCheckpoint(label, _open_folder(path), gather(path), revision)
    if kind == "file":
        return StoredCheckpoint(label, [_open_file(path)], gather(path.parent), revision)
    text = str(reference)
    if kind == "other":
        raise CheckpointError(text, "is neither a file nor a folder", "devices and pipes are not opened")
    if not hub.is_on_hub(text, revision):
        raise CheckpointError(text, "no such file or folder", places.nearby(path))
    found = hub.fetched(text, revision, weights=weights)
    files = _open_folder(found.folder, found.missing)
    return StoredCheckpoint(label, files, gather(found.folder), found.folder.name, found.repository)


def _open_file(path: Path) -> WeightFile:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix in _LEGACY:
        from .files.torch_file import TorchFile

        return TorchFile(path)
    raise CheckpointError(
        str(path), f"not a weight file: {path.suffix or 'no suffix'}", "known: .safetensors, .bin, .pt"
    )


def _open_folder(folder: Path, missing: Mapping[str, RemoteFile] = MappingProxyType({})) -> list[WeightFile]:
    """Choose the weight files of a folder, in the order in which transformers would.

    `missing` are those that would be there if they were downloaded.
    """
    for whole, index in hub.MODEL:
        has_whole, has_index = whole in missing or (folder / whole).is_file(), (folder / index).is_file()
        if has_whole and has_index:
            hint = "one of them is left over from an earlier save: remove the one that is not meant"
            raise CheckpointError(str(folder), f"holds both {whole} and {index}", hint)
        if has_index:
            return _open_shards(folder, index, missing)
        if has_whole:
            return [missing[whole] if whole in missing else _open_file(places.refuse_link(folder / whole, folder))]
    if len(missing) == 1:
        return [*missing.values()]
    return [_open_file(places.refuse_link(_only_file(folder), folder))]


def _only_file(folder: Path) -> Path:
    """Find the one weight file of a folder that names it in a way of its own."""
    if (folder / "adapter_config.json").is_file():
        is_lora = "peft_type" in read_json(folder / "adapter_config.json")
        hint = f"name its base with it: {{path: BASE, lora: {folder}}}" if is_lora else "average_adapters takes it"
        raise CheckpointError(str(folder), "holds an adapter, not a model", hint)
    files = sorted(path for path in folder.glob("*") if places.kind(path) == "file")
    found = [path for path in files if path.suffix == ".safetensors"]
    found = found or [p for p in files if p.suffix in _LEGACY and not hub.NOT_WEIGHTS.fullmatch(p.name)]
    if not found:
        hint = "a checkpoint folder holds model.safetensors, or shards with model.safetensors.index.json"
        raise CheckpointError(str(folder), "holds no weights", hint)
    if len(found) > 1:
        hint = f"shards need their {_INDEX}; or name one of the files"
        names = some([path.name for path in found])
        raise CheckpointError(str(folder), f"holds {len(found)} weight files and no index: {names}", hint)
    return found[0]


def _open_shards(folder: Path, index: str, missing: Mapping[str, RemoteFile]) -> list[WeightFile]:
    """Open the shards that an index names. Every shard that is missing or not whole is reported, not only the first."""
    path = places.refuse_link(folder / index, folder)
    where_of = read_json(path, INDEX_BYTES, INDEX_VALUES).get("weight_map")
    if not isinstance(where_of, dict) or not all(isinstance(name, str) for name in where_of.values()):
        raise CheckpointError(str(path), "has no weight_map from tensor names to files", _AGAIN)
    if not where_of:
        raise CheckpointError(str(path), "names no tensors", _AGAIN)
    mistakes: list[Mistake] = []
    files: list[WeightFile] = []
    for name in sorted(set(where_of.values())):
        if Path(name).name != name or "\\" in name or "\0" in name or name == "..":
            hint = "shards lie beside their index: a checkpoint never reaches into other folders"
            mistakes.append(Mistake(str(path), f"names the file {name!r}, outside its folder", hint))
        elif name in missing:
            files.append(missing[name])
        elif places.kind(folder / name) != "file":
            mistakes.append(Mistake(str(path), f"names the file {name}, which is missing", _AGAIN))
        else:
            try:
                files.append(_open_file(places.refuse_link(folder / name, folder)))
            except CheckpointError as error:
                mistakes.extend(error.mistakes)
    if not mistakes:
        mistakes = _index_mistakes(path, where_of, files)
    if mistakes:
        raise CheckpointError.of(mistakes)
    return files


def _index_mistakes(path: Path, where_of: dict[str, str], files: list[WeightFile]) -> list[Mistake]:
    """Compare the index with the headers of its shards, in both directions."""
    held = {(name, shard) for file, shard in ((file, file.path.name) for file in files) for name in file.specs}
    named = set(where_of.items())
    lacking, unnamed = sorted(named - held), sorted(held - named)
    mistakes = [
        Mistake(str(path), f"names tensor {name} in {file}, which does not hold it", _MIXED)
        for name, file in lacking[:_MOST_NAMED]
    ]
    mistakes += [
        Mistake(str(path), f"does not name tensor {name}, which {file} holds", _MIXED)
        for name, file in unnamed[:_MOST_NAMED]
    ]
    left = len(lacking) + len(unnamed) - len(mistakes)
    return [*mistakes, *([Mistake(str(path), f"and {left} more tensors do not agree", _MIXED)] if left else [])]
