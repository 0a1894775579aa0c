"""Folders with sparse fine-tunes as plain values for tables and JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..files.places import user_path
from ..names import Layers
from ..sparse.file import DENSE, INDICES, PUBLISHED, VALUES, WEIGHTS, SparseFineTune, open_sparse
from .tensors import described, of_stack


def is_sparse(reference: str | Path) -> bool:
    """Tell whether a path is that of a sparse fine-tune, in our form or the published one."""
    path = user_path(reference)
    return path.name in (WEIGHTS, PUBLISHED) or any((path / name).is_file() for name in (WEIGHTS, PUBLISHED))


def sparse_fine_tune(reference: str | Path, *, tensors: bool = False) -> dict[str, Any]:
    """Describe a sparse fine-tune: how many entries of its base it changes, and where; every tensor if asked.

    Raises CheckpointError where it cannot be opened.
    """
    opened = open_sparse(reference)
    specs = opened.stored.specs
    considered = sum(math.prod(shape) for shape in opened.considered.values())
    about = {
        "kind": "sparse fine-tune",
        "changes": f"{opened.count:,} of {considered:,} entries ({opened.count / max(1, considered):.2%})",
        "fingerprint of its base": opened.base[:12] or "not stated",
        "stored whole": ", ".join(opened.dense) or "none",
    }
    return {"about": [about], **described(specs, _groups(opened), tensors=tensors)}


def _groups(opened: SparseFineTune) -> list[dict[str, Any]]:
    """Sum up its tensors by the stack of layers in the base that they change."""
    layers = Layers([*opened.considered, *opened.dense])
    groups = []
    for stack, names in layers.by_stack((*opened.shapes, *opened.dense)).items():
        own = [name + ending for name in names for ending in (INDICES, VALUES, DENSE)]
        groups.append(of_stack(stack, opened.stored.specs, [name for name in own if name in opened.stored.specs]))
    return groups
