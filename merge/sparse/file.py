"""A sparse fine-tune on disk: which entries of which tensors of a base change, and by how much.

`sparse_fine_tune.safetensors` holds for every tensor NAME of the base that changes

    NAME:indices  int64 [k]   flat row-major positions, ascending
    NAME:values   float [k]   what is added to the entries there

and for every tensor that is stored whole `NAME:dense`. Its metadata say the shapes of the base's tensors and the base's
fingerprint. The published form `pytorch_diff.bin` is read too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..companions import Companions
from ..dtypes import is_float
from ..errors import CheckpointError, Mistake, nearest
from ..files import hub, places
from ..files.json_file import parsed
from ..form import Form
from ..in_memory import InMemory
from ..node import Source
from ..stored import StoredCheckpoint, open
from . import pytorch_diff

WEIGHTS = "sparse_fine_tune.safetensors"
PUBLISHED = pytorch_diff.WEIGHTS
KINDS: hub.Kinds = ((WEIGHTS, ""), (PUBLISHED, ""))
INDICES, VALUES, DENSE = ":indices", ":values", ":dense"
_KIND = "sparse_fine_tune"
_MOST_DIMENSIONS = 64
_FOLDER = f"a sparse fine-tune is a folder with {WEIGHTS} or {PUBLISHED}"


@dataclass(frozen=True, eq=False)
class SparseFineTune:
    """A sparse fine-tune: changes of single entries, and tensors that it stores whole.

    Attributes:
        label: what messages and receipts call it.
        stored: the tensors of its file.
        considered: for every tensor of the base that its entries were selected from, its shape there.
        base: the fingerprint of the base; empty where the file does not say.
        details: what else the file says of its making.

    """

    label: str
    stored: Checkpoint
    considered: Mapping[str, tuple[int, ...]]
    base: str = ""
    details: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """For every tensor of the base that changes in some entries, its shape there."""
        return {name: shape for name, shape in self.considered.items() if name + INDICES in self.stored.specs}

    @property
    def dense(self) -> tuple[str, ...]:
        """The names in the base of the tensors that it stores whole."""
        return tuple(name.removesuffix(DENSE) for name in self.stored.specs if name.endswith(DENSE))

    @property
    def count(self) -> int:
        """How many entries change."""
        return sum(self.stored.specs[name + VALUES].entries for name in self.shapes)

    def indices(self, name: str) -> Source:
        """Give the positions in one tensor of the base: int64 [k]."""
        return self._source(name + INDICES)

    def values(self, name: str) -> Source:
        """Give what is added there: [k]."""
        return self._source(name + VALUES)

    def whole(self, name: str) -> Source:
        """Give a tensor that is stored whole."""
        return self._source(name + DENSE)

    def _source(self, name: str) -> Source:
        node = self.stored.node(name)
        assert isinstance(node, Source)
        return node


def companions(
    shapes: Mapping[str, tuple[int, ...]], base: str = "", details: Mapping[str, str] | None = None
) -> Companions:
    """Say how a sparse fine-tune is laid out on disk: the form that `build` writes."""
    about = {"format": "pt", "kind": _KIND, "base": base, **(details or {})}
    about["shapes"] = json.dumps({name: list(shape) for name, shape in shapes.items()}, separators=(",", ":"))
    return Companions(form=Form(WEIGHTS, about, "portmanteau", "A sparse fine-tune"))


def in_memory(
    label: str,
    sparse: Mapping[str, tuple[Any, Any]],
    shapes: Mapping[str, tuple[int, ...]],
    dense: Mapping[str, Any] | None = None,
    base: str = "",
    details: Mapping[str, str] | None = None,
) -> SparseFineTune:
    """Make one of tensors in memory.

    Args:
        label: what messages call it.
        sparse: name in the base → (flat row-major positions, ascending, int64 [k]; values [k]).
        shapes: name in the base → shape there, for the same names.
        dense: name in the base → a tensor that is stored whole.
        base: the fingerprint of the base.
        details: how it was made, for its metadata.

    `build(found.stored, folder)` writes it.
    """
    tensors = {}
    for name, (indices, values) in sparse.items():
        tensors[name + INDICES], tensors[name + VALUES] = indices, values
    tensors |= {name + DENSE: tensor for name, tensor in (dense or {}).items()}
    kept = {name: tuple(shapes[name]) for name in sparse}
    stored = InMemory(label, tensors, companions(kept, base, details))
    return SparseFineTune(label, stored, kept, base, dict(details or {}))


def open_sparse(
    reference: str | Path, *, revision: str | None = None, label: str | None = None, weights: bool = True
) -> SparseFineTune:
    """Open a folder, or a Hub id `ORG/NAME[@REVISION]`, with a sparse fine-tune, in our form or the published one.

    With `weights=False` only the header of what is on the Hub is fetched, where its file has one.

    >>> task = open_sparse("examples/models/task-sparse")
    >>> task.count, len(task.shapes), task.details["maskable entries"]
    (4962, 57, '330816')
    >>> name = "model.layers.0.mlp.up_proj.weight"
    >>> len(task.stored[f"{name}:indices"]) == len(task.stored[f"{name}:values"])
    True

    Raises CheckpointError where there is none, or where the file contradicts itself.
    """
    path, text = places.user_path(reference), str(reference)
    label = label or text
    if places.kind(path) == "nothing" and hub.is_on_hub(text, revision):
        found = hub.fetched(text, revision, KINDS, weights=weights)
        path = found.folder
        if WEIGHTS in found.missing:
            missing = StoredCheckpoint(label, [found.missing[WEIGHTS]], Companions())
            return _ours(missing, path / WEIGHTS, label)
    if places.kind(path) == "nothing":
        known = places.neighbours(path)
        raise CheckpointError(text, "no such folder", nearest(path.name, known) if known else "")
    files = [path] if path.is_file() else [path / name for name, _ in KINDS]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise CheckpointError(str(path), f"holds no {WEIGHTS}", _FOLDER)
    if file != path:
        places.refuse_link(file, path)
    if file.suffix == ".safetensors":
        return _ours(open(file, label=label), file, label)
    decoded = pytorch_diff.read(file)
    return in_memory(label, decoded.sparse, decoded.shapes, decoded.dense)


def _ours(stored: StoredCheckpoint, file: Path, label: str) -> SparseFineTune:
    """Check that the tensors of a file are those that its metadata promise."""
    about = dict(stored.files[0].metadata)
    if about.pop("kind", None) != _KIND:
        raise CheckpointError(str(file), "is no sparse fine-tune: its metadata do not say so", _FOLDER)
    try:
        shapes = {name: _shape(shape) for name, shape in parsed(about.pop("shapes", "").encode()).items()}
    except (ValueError, AttributeError) as error:
        raise CheckpointError(str(file), f"its metadata give no shapes ({error})", "build it again") from error
    mistakes = []
    for name in stored.specs:
        own, _, part = name.rpartition(":")
        if part not in ("indices", "values", "dense") or (part != "dense" and own not in shapes):
            mistakes.append(Mistake(str(file), f"tensor {name} is of a kind that is not known", "build it again"))
    for name, shape in shapes.items():
        if name + INDICES in stored.specs:
            mistakes += _contradictions(stored, str(file), name, shape)
    if mistakes:
        raise CheckpointError.of(mistakes)
    about.pop("format", None)
    return SparseFineTune(label, stored, shapes, about.pop("base", ""), about)


def _shape(value: Any) -> tuple[int, ...]:
    """Read a shape. Raises ValueError for what is none."""
    if not isinstance(value, list) or len(value) > _MOST_DIMENSIONS:
        raise ValueError("a shape is a list of sizes")
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in value):
        raise ValueError("a shape is a list of sizes")
    return tuple(value)


def _contradictions(stored: StoredCheckpoint, where: str, name: str, shape: tuple[int, ...]) -> list[Mistake]:
    """Compare the positions and values of one tensor with each other and with its shape, by their specs."""
    indices, values = stored.specs[name + INDICES], stored.specs.get(name + VALUES)
    if values is None or values.shape != indices.shape or len(indices.shape) != 1:
        return [Mistake(where, f"{name}: positions {list(indices.shape)} and values do not go together")]
    if indices.dtype != "I64" or not is_float(values.dtype):
        return [Mistake(where, f"{name}: positions are {indices.dtype} and values {values.dtype}")]
    if indices.entries > math.prod(shape):
        return [Mistake(where, f"{name}: {indices.entries} positions in a tensor of {list(shape)}")]
    return []


def export(path: Path) -> None:
    """Write `pytorch_diff.bin` beside a finished sparse fine-tune, from its file."""
    found = open_sparse(path.parent / WEIGHTS)
    sparse = {name: (found.stored.read(name + INDICES), found.stored.read(name + VALUES)) for name in found.shapes}
    dense = {name: found.stored.read(name + DENSE) for name in found.dense}
    pytorch_diff.write(path, pytorch_diff.Decoded(sparse, found.shapes, dense))
