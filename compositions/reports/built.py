"""A finished build as its receipt tells it, and its change from each of its parents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from portmanteau.merge import CheckpointError, PortmanteauError, Progress, StoredCheckpoint
from portmanteau.merge import open as open_checkpoint
from portmanteau.merge.errors import some
from portmanteau.merge.files.json_file import TABLE_BYTES, read_json
from portmanteau.merge.origins import Strip
from portmanteau.merge.receipt import RECEIPT
from portmanteau.merge.units import readable

from .comparison import compare
from .rows import Comparison, Table


@dataclass(frozen=True)
class RecipeText:
    """The recipe as it was built, and its digest."""

    text: str
    digest: str


@dataclass(frozen=True)
class InputFile:
    """A weight file of an input: its name, size, and the digest of its header."""

    file: str
    bytes: int
    header: str


@dataclass(frozen=True)
class Input:
    """A checkpoint that went in; its folder is seen from the result's."""

    checkpoint: str
    files: tuple[InputFile, ...]
    revision: str | None = None
    repository: str | None = None
    folder: str | None = None


@dataclass(frozen=True)
class Choice:
    """What one kind of step did."""

    operator: str
    settings: Mapping[str, Any]
    models: tuple[str, ...]
    why: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Built:
    """A finished build. `name` is its folder's; the rest is what its receipt says."""

    name: str
    place: Path
    recipe: RecipeText | None
    inputs: tuple[Input, ...]
    outputs: Mapping[str, str]
    choices: tuple[Choice, ...]
    seconds: float
    versions: Mapping[str, str]
    plugins: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    surveys: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    layers: tuple[Strip, ...] = ()

    def document(self) -> dict[str, Any]:
        """Describe it as plain values."""
        return {key: value for key, value in asdict(self).items() if key != "place"}

    def steps(self) -> Table:
        """Give what was done as a table: titles and rows."""
        titles = ("operator", "models", "settings", "tensors", "bytes", "because of")
        rows = [
            (
                one.operator,
                ", ".join(one.models),
                _settings(one.settings),
                str(one.tensors),
                readable(one.bytes),
                one.why,
            )
            for one in self.choices
        ]
        return titles, rows

    def files(self) -> Table:
        """Give what went in as a table: titles and rows."""
        rows = [
            (one.checkpoint, file.file, readable(file.bytes), one.revision or "–", file.header[:16])
            for one in self.inputs
            for file in one.files
        ]
        return ("models", "file", "bytes", "revision", "header (BLAKE3)"), rows


def read(place: str | Path) -> Built:
    """Read the receipt of a finished build. Raises CheckpointError where there is none, or no such one."""
    folder = Path(place).expanduser()
    path = folder / RECEIPT
    if not path.is_file():
        hint = "a report needs what `portmanteau build` wrote; `portmanteau inspect` describes any checkpoint"
        raise CheckpointError(str(folder), f"holds no receipt ({RECEIPT})", hint)
    try:
        found = {**read_json(path, TABLE_BYTES), "name": folder.resolve().name, "place": folder}
        return TypeAdapter(Built).validate_python(found)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise CheckpointError(str(path), f"is no receipt of this version: {where}", "build it again") from error


def changes_from_parents(
    built: Built, progress: Progress | None = None
) -> tuple[tuple[Comparison, ...], tuple[str, ...]]:
    """Measure the result against every parent that is still there; notes say which could not be compared, and why."""
    found, notes = [], []
    try:
        result = open_checkpoint(built.place, label=built.name)
    except PortmanteauError as error:
        return (), (f"not compared with its parents: {error.mistakes[0].what}",)
    for one in built.inputs:
        try:
            parent = _parent(built, one)
            found.append(compare([result], parent, unmatched="drop", progress=progress))
            notes += [f"{one.checkpoint}: {note}" for note in found[-1].notes]
            notes += [f"{one.checkpoint}: {what}" for what in _moved_on(parent, one)]
        except PortmanteauError as error:
            notes.append(f"not compared with {one.checkpoint}: {error.mistakes[0].what}")
    return tuple(found), tuple(notes)


def _parent(built: Built, one: Input) -> StoredCheckpoint:
    """Open a parent where the receipt says that it was, or on the Hub."""
    folder = built.place / one.folder if one.folder else None
    if folder is not None and folder.is_dir():
        lone = folder / one.files[0].file if len(one.files) == 1 else folder
        return open_checkpoint(lone, label=one.checkpoint)
    if one.repository:
        return open_checkpoint(one.repository, revision=one.revision, label=one.checkpoint)
    gone = f"is no longer at {one.folder}, seen from the result" if folder else "was in memory only"
    raise CheckpointError(one.checkpoint, gone)


def _moved_on(parent: StoredCheckpoint, one: Input) -> Iterator[str]:
    """Say where a parent's files are others than those that went in."""
    now = {file.path.name: file.digest for file in parent.files}
    others = [file.file for file in one.files if now.get(file.file) != file.header]
    if others:
        yield f"{some(others)} changed since the build"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_short(value)}" for key, value in settings.items())


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)
