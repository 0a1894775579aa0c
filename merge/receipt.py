"""What was done: the recipe, what went in, what came out, by digest; written beside the weights as portmanteau.json."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from .errors import OutputError
from .files.digests import digest, digest_of_file
from .files.json_file import TABLE_BYTES, parsed, read_bytes
from .node import Finding, Store, Survey, steps
from .origins import Strip, strips
from .plan import Plan
from .plugins.source_files import Plugins
from .results.identity import Identity, package_version
from .shown import json_text
from .units import readable
from .writer import Shard

RECEIPT = "portmanteau.json"
_NO_SEAL = "0" * 64
_UNWRITTEN = ("outcome",)
Outcome = Literal["built", "continued", "up to date"]


@dataclass(frozen=True, repr=False)
class Receipt:
    """The record of one build.

    Attributes:
        recipe: the recipe's text, its digest and its folder, seen from the result's; None for a build from Python.
        inputs: for each checkpoint its label, revision, repository, folder seen from the result's, and files with size,
            time (seconds) and header digest (BLAKE3).
        outputs: tensor → BLAKE3 digest of its bytes.
        choices: what each kind of step did, with its settings and how many tensors it made.
        surveys: what each survey found.
        notes: what was renamed, kept or left out because the recipe said so.
        seeds: the seeds of all random steps.
        device: where torch computed; on another one some operators may give other bits.
        seconds: the time that it took.
        versions: of portmanteau, Python and torch.
        plugins: for each plugin whose operators were used the files of its source, with their digests.
        layers: which models each layer comes from.
        files: every file but this one: its size and digest; of a weight file the length and digest of its header.
        made_from: what decides about the bytes, by digest; None where that cannot be told.
        non_finite: what was to be done about NaN and infinity.
        changes: what its card tells of its change from each parent, once that was measured (card_changes.py).
        seal: the digest of this record as it is written, with zeros in this place.
        outcome: what the build had to do; not written.

    """

    recipe: Mapping[str, str] | None
    inputs: tuple[Mapping[str, Any], ...]
    outputs: Mapping[str, str]
    choices: tuple[Mapping[str, Any], ...]
    surveys: Mapping[str, Any]
    notes: tuple[str, ...]
    seeds: tuple[int, ...]
    device: str
    seconds: float
    versions: Mapping[str, str] = field(default_factory=lambda: _versions())
    plugins: Plugins = field(default_factory=dict)
    layers: tuple[Strip, ...] = ()
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    made_from: Identity | None = None
    non_finite: str = "error"
    changes: Mapping[str, Any] = field(default_factory=dict)
    seal: str = _NO_SEAL
    outcome: Outcome = "built"

    def __repr__(self) -> str:
        """What it is a record of."""
        inputs = ", ".join(str(one["checkpoint"]) for one in self.inputs)
        return f"<Receipt: {len(self.outputs)} tensors of {inputs or 'tensors in memory'}, {self.seconds:.1f} s>"

    def _repr_html_(self) -> str:
        """A table of what was done, for notebooks."""
        from . import notebook

        rows = [
            (row["operator"], ", ".join(row["models"]), row["tensors"], readable(row["bytes"])) for row in self.choices
        ]
        notes = [(f"note: {note}", "", "", "") for note in self.notes]
        return notebook.table(repr(self)[1:-1], ("operator", "of", "tensors", "bytes"), [*rows, *notes])

    def write(self, folder: Path) -> Self:
        """Write it into a folder; give it with its seal."""
        found = replace(self, seal=_NO_SEAL)
        text = {name: value for name, value in asdict(found).items() if name not in _UNWRITTEN}
        raw = (json_text(text, indent=2) + "\n").encode()
        sealed = replace(self, seal=digest(raw))
        (folder / RECEIPT).write_bytes(_with_seal(raw, _NO_SEAL, sealed.seal))
        return sealed


def read(folder: Path) -> Receipt:
    """Read the record of a finished build. Raises OutputError where there is none, or a byte of it has changed."""
    path = folder / RECEIPT
    if not path.is_file():
        raise OutputError(str(folder), f"holds no {RECEIPT}", "only what portmanteau built has a receipt")
    try:
        raw = read_bytes(path, TABLE_BYTES)
        found = parsed(raw)
        receipt = Receipt(**{key: found[key] for key in (f.name for f in fields(Receipt)) if key not in _UNWRITTEN})
        whole = _is_one(receipt) and digest(_with_seal(raw, receipt.seal, _NO_SEAL)) == receipt.seal
    except (ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        hint = "build it again: nothing can be said about a result without its receipt"
        raise OutputError(str(path), "is damaged, was edited, or comes from another version of portmanteau", hint)
    return receipt


def _is_one(receipt: Receipt) -> bool:
    """Tell whether what a stranger sealed has the parts of a receipt that are relied on."""
    texts = [receipt.outputs, receipt.made_from or {}, receipt.recipe or {}, receipt.versions]
    lists = [receipt.inputs, receipt.choices, receipt.notes, receipt.seeds, receipt.layers]
    return (
        all(isinstance(one, dict) and all(type(value) is str for value in one.values()) for one in texts)
        and all(isinstance(one, list) for one in lists)
        and {"text"} <= (receipt.recipe or {"text": ""}).keys()
        and isinstance(receipt.files, dict)
        and all(map(_is_record, receipt.files.values()))
        and all(type(one) is str for one in (receipt.seal, receipt.non_finite))
    )


def _is_record(record: Any) -> bool:
    """Tell whether this says of a file how large it is, and its digest or that of its header."""
    marks = [record.get(key) for key in ("header", "digest") if key in record] if isinstance(record, dict) else []
    return bool(marks) and all(type(mark) is str for mark in marks) and type(record.get("bytes")) is int


def _with_seal(raw: bytes, before: str, after: str) -> bytes:
    """Put another seal in the place of the last one."""
    head, _, tail = raw.rpartition(before.encode())
    return head + after.encode() + tail


def file_records(folder: Path, shards: Iterable[Shard]) -> dict[str, dict[str, Any]]:
    """Give size and digest of every file in a folder; of weight files, whose tensors have their own, of the header."""
    weights = {shard.file: shard for shard in shards}
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in weights:
            header = weights[name].header
            found[name] = {"bytes": weights[name].size, "header_bytes": len(header), "header": digest(header)}
        elif name != RECEIPT:
            found[name] = {"bytes": path.stat().st_size, "digest": digest_of_file(path)}
    return found


@dataclass(frozen=True)
class Done:
    """What carrying out a plan gave: a digest for every tensor, what the surveys found, and where torch computed."""

    digests: Mapping[str, str]
    found: Mapping[Survey, Any]
    device: str


def make_receipt(plan: Plan, done: Done, recipe: Mapping[str, str] | None, seconds: float, folder: Path) -> Receipt:
    """Put the record together; `folder` is the result's, or a sibling of it."""
    inputs = tuple(_input(checkpoint, folder) for checkpoint in plan.checkpoints)
    every = (inner for step in plan.steps for inner in steps(step))
    seeds = dict.fromkeys(step.settings["seed"] for step in every if "seed" in step.settings)
    return Receipt(
        recipe,
        inputs,
        dict(done.digests),
        choices(plan),
        surveys(done.found),
        plan.notes,
        tuple(seeds),
        done.device,
        round(seconds, 3),
        layers=strips(plan.steps, done.found),
    )


def surveys(found: Mapping[Survey, Any]) -> dict[str, Any]:
    """Give what surveys found, by their titles, in what JSON has."""
    return {survey.title: _plain(value) for survey, value in found.items()}


def _plain(value: Any) -> Any:
    """Make a mapping's keys text, as JSON has them; of what has a summary take that."""
    value = getattr(value, "summary", value)
    return {str(key): one for key, one in value.items()} if isinstance(value, Mapping) else value


def choices(plan: Plan) -> tuple[dict[str, Any], ...]:
    """Group the steps by what was done: operator, settings, models and the reason."""
    groups: dict[str, dict[str, Any]] = {}
    for step in plan.steps:
        settings = {key: str(value) if isinstance(value, Finding) else value for key, value in step.settings.items()}
        row = {"operator": step.operator.name, "settings": settings, "models": step.labels, "why": step.why}
        found = groups.setdefault(json.dumps(row, sort_keys=True, default=str), {**row, "tensors": 0, "bytes": 0})
        found["tensors"] += 1
        found["bytes"] += step.output.nbytes
    return tuple(groups.values())


def _input(checkpoint: Store, folder: Path) -> dict[str, Any]:
    files = []
    for file in checkpoint.files:
        status = file.path.stat()
        files.append(
            {"file": file.path.name, "bytes": status.st_size, "modified": status.st_mtime, "header": file.digest}
        )
    where = {"repository": checkpoint.repository, "folder": _seen_from(folder, checkpoint)}
    return {"checkpoint": checkpoint.label, "revision": checkpoint.revision, **where, "files": files}


def _seen_from(folder: Path, checkpoint: Store) -> str | None:
    """Give the way from the result to a checkpoint: it says nothing of the machine, and holds where both are moved."""
    if not checkpoint.files:
        return None
    home = checkpoint.files[0].path.absolute().parent
    try:
        return Path(os.path.relpath(home, folder.absolute())).as_posix()
    except ValueError:  # on another drive
        return str(home)


def _versions() -> dict[str, str]:
    packages = {name: package_version(name) for name in ("portmanteau", "torch")}
    return {"portmanteau": packages["portmanteau"], "python": platform.python_version(), "torch": packages["torch"]}
