"""Plans, and whatever a reference names, as plain values for tables and JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..companions import Companions
from ..origins import strips
from ..plan import Plan
from ..receipt import choices


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
        "layers": [asdict(strip) for strip in strips(made.steps)],
        "surveys": [{"title": survey.title, "bytes": survey.nbytes} for survey in made.surveys],
        "notes": made.notes,
        "tensors": None if made.pending else len(made.steps),
        "bytes_read": made.bytes_read,
        "bytes_written": made.bytes_written,
        "bytes_in_flight": bytes_in_flight,
    }


def lacks(beside: Companions) -> list[str]:
    """Say what keeps transformers from loading a result with these companions, if it is a model."""
    if not beside.form.is_model or beside.config is not None:
        return []
    return ["the result has no config.json, since the models have none: transformers will not load it"]


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
    from ..stored import open
    from .bottleneck import adapters, is_bottleneck
    from .checkpoints import checkpoint
    from .sparse import is_sparse, sparse_fine_tune

    if is_bottleneck(where):
        return adapters(where, tensors=tensors)
    if is_sparse(where):
        return sparse_fine_tune(where, tensors=tensors)
    return checkpoint(open(where, weights=False), tensors=tensors)
