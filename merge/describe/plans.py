"""Plans and checkpoints as plain values for tables and JSON."""

from __future__ import annotations

from typing import Any

from ..checkpoint import Checkpoint
from ..names import Stack
from ..plan import Plan
from ..receipt import choices
from ..stored import open
from ..tensor_spec import TensorSpec
from .bottleneck import adapters, is_bottleneck
from .sparse import is_sparse, sparse_fine_tune
from .tensors import OUTSIDE, described, group


def plan(made: Plan, bytes_in_flight: int) -> dict[str, Any]:
    """Describe a plan: what kinds of steps it has, its surveys, and its bytes."""
    steps = [
        {
            "operator": row["operator"],
            "of": ", ".join(row["models"]),
            "settings": ", ".join(f"{key}={_short(value)}" for key, value in row["settings"].items()),
            "tensors": row["tensors"],
            "bytes": row["bytes"],
            "why": row["why"],
        }
        for row in choices(made)
    ]
    return {
        "steps": steps,
        "surveys": [{"title": survey.title, "bytes": survey.nbytes} for survey in made.surveys],
        "notes": made.notes,
        "tensors": None if made.pending else len(made.steps),
        "bytes_read": made.bytes_read,
        "bytes_written": made.bytes_written,
        "bytes_in_flight": bytes_in_flight,
    }


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)


def reference(where: str, *, tensors: bool = False) -> dict[str, Any]:
    """Describe what a reference stands for: a checkpoint, or what is no model, with what it is under `about`.

    Of a model on the Hub only the headers are fetched.

    Raises CheckpointError where it cannot be opened.
    """
    if is_bottleneck(where):
        return adapters(where, tensors=tensors)
    if is_sparse(where):
        return sparse_fine_tune(where, tensors=tensors)
    return checkpoint(open(where, weights=False), tensors=tensors)


def checkpoint(opened: Checkpoint, *, tensors: bool = False) -> dict[str, Any]:
    """Describe a checkpoint: sizes by stack of layers, and of what is outside them; every tensor if asked."""
    groups: dict[Stack | None, list[TensorSpec]] = {}
    for name, spec in opened.specs.items():
        place = opened.layers.place(name)
        groups.setdefault(place.stack if place else None, []).append(spec)
    rows = [
        group(stack.prefix if stack else OUTSIDE, str(stack.count) if stack else "", specs)
        for stack, specs in groups.items()
    ]
    return {**described(opened.specs, rows, tensors=tensors), "companions": sorted(opened.companions.files)}
