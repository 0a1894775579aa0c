"""What was done: the recipe, what went in, what came out, by digest; written beside the weights as portmanteau.json."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import blake3

from . import notebook
from .node import Finding, Store, Survey, steps
from .origins import Strip, strips
from .plan import Plan
from .shown import json_text
from .units import readable

RECEIPT = "portmanteau.json"


@dataclass(frozen=True, repr=False)
class Receipt:
    """The record of one build.

    Attributes:
        recipe: the recipe's text and its digest; None for a build from Python.
        inputs: for each checkpoint its label, revision, repository, folder seen from the result's, and files with size,
            time (seconds) and header digest (BLAKE3).
        outputs: tensor → BLAKE3 digest of its bytes.
        choices: what each kind of step did, with its settings and how many tensors it made.
        surveys: what each survey found.
        notes: what was renamed, kept or left out because the recipe said so.
        seeds: the seeds of all random steps.
        versions: of portmanteau, Python and torch.
        device: where torch computed; on another one some operators may give other bits.
        seconds: the time that it took.
        layers: which models each layer comes from.

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
    layers: tuple[Strip, ...] = ()

    def __repr__(self) -> str:
        """What it is a record of."""
        inputs = ", ".join(str(one["checkpoint"]) for one in self.inputs)
        return f"<Receipt: {len(self.outputs)} tensors of {inputs or 'tensors in memory'}, {self.seconds:.1f} s>"

    def _repr_html_(self) -> str:
        """A table of what was done, for notebooks."""
        rows = [
            (row["operator"], ", ".join(row["models"]), row["tensors"], readable(row["bytes"])) for row in self.choices
        ]
        notes = [(f"note: {note}", "", "", "") for note in self.notes]
        return notebook.table(repr(self)[1:-1], ("operator", "of", "tensors", "bytes"), [*rows, *notes])

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        (folder / RECEIPT).write_text(json_text(asdict(self), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Done:
    """What carrying out a plan gave: a digest for every tensor, what the surveys found, and where torch computed."""

    digests: Mapping[str, str]
    found: Mapping[Survey, Any]
    device: str


def make_receipt(plan: Plan, done: Done, recipe: str | None, seconds: float, folder: Path) -> Receipt:
    """Put the record together; `folder` is the result's, or a sibling of it."""
    text = {"text": recipe, "digest": digest(recipe.encode())} if recipe is not None else None
    inputs = tuple(_input(checkpoint, folder) for checkpoint in plan.checkpoints)
    every = (inner for step in plan.steps for inner in steps(step))
    seeds = dict.fromkeys(step.settings["seed"] for step in every if "seed" in step.settings)
    surveys = {survey.title: _plain(value) for survey, value in done.found.items()}
    what, layers = choices(plan), strips(plan.steps, done.found)
    return Receipt(
        text,
        inputs,
        dict(done.digests),
        what,
        surveys,
        plan.notes,
        tuple(seeds),
        done.device,
        round(seconds, 3),
        layers=layers,
    )


def _plain(value: Any) -> Any:
    """Make a mapping's keys text, as JSON has them; of what has a summary take that."""
    value = getattr(value, "summary", value)
    return {str(key): one for key, one in value.items()} if isinstance(value, Mapping) else value


def digest(data: bytes) -> str:
    """Give the BLAKE3 digest in hexadecimal."""
    return blake3.blake3(data).hexdigest()


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
    return {"portmanteau": _version("portmanteau"), "python": platform.python_version(), "torch": _version("torch")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
