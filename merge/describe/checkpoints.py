"""Checkpoints as plain values for tables and JSON: sizes by stack and by module, the vocabulary, what stands beside."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..companions import INPUT_EMBEDDINGS, vocabulary
from ..files.json_file import TABLE_BYTES, read_json
from ..names import matches
from ..origins import HEAD, outside_part
from ..receipt import RECEIPT
from ..stored import StoredCheckpoint
from ..tensor_spec import TensorSpec
from .bottleneck import runs
from .tensors import OUTSIDE, described, of_stack

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def checkpoint(opened: Checkpoint, *, tensors: bool = False) -> dict[str, Any]:
    """Describe a checkpoint: sizes by stack of layers, and of what is outside them; every tensor if asked."""
    rows = [of_stack(stack, opened.specs, names) for stack, names in opened.layers.by_stack(opened.specs).items()]
    return {
        **described(opened.specs, rows, tensors=tensors),
        "modules": _modules(opened),
        "vocabulary": _vocabulary(opened),
        "companions": sorted(opened.companions.files),
        "receipt": _receipt(opened.folder) if isinstance(opened, StoredCheckpoint) else None,
    }


def _modules(opened: Checkpoint) -> list[dict[str, Any]]:
    """Sum up the tensors of one name, shape and dtype over the layers, and experts, that have one."""
    found: dict[tuple[str, str, str, tuple[int, ...]], list[tuple[int, TensorSpec]]] = {}
    for name, spec in opened.specs.items():
        place = opened.layers.place(name)
        where, inner = (place.stack.prefix, place.inner) if place else (OUTSIDE, name)
        key = where, _NUMBER.sub("*", inner), spec.dtype, spec.shape
        found.setdefault(key, []).append((place.layer if place else -1, spec))
    return [
        {
            "where": where,
            "module": module,
            "layers": runs(sorted({layer for layer, _ in members if layer >= 0})),
            "tensors": len(members),
            "shape": list(shape),
            "dtype": dtype,
            "bytes": sum(spec.nbytes for _, spec in members),
        }
        for (where, module, dtype, shape), members in found.items()
    ]


def _vocabulary(opened: Checkpoint) -> dict[str, Any] | None:
    """Compare the rows of the embedding with the tokenizer, and say where the head is; None without an embedding."""
    rows = {
        spec.shape[0] for name, spec in opened.specs.items() if matches(INPUT_EMBEDDINGS, name) and len(spec.shape) == 2
    }
    if len(rows) != 1:
        return None
    tokens = vocabulary(opened.companions)
    last = max(tokens.values()) + 1 if tokens else None
    (count,) = rows
    return {
        "rows": count,
        "tokens": last,
        "padding": count - last if last is not None else None,
        "head": _head(opened),
    }


def _head(opened: Checkpoint) -> str:
    own = [name for name in opened.specs if not opened.layers.place(name) and outside_part(name) == HEAD]
    if own:
        return "of its own"
    return "tied to the embedding" if opened.companions.ties_head else "none"


def _receipt(folder: Path) -> dict[str, Any] | None:
    """Say what the receipt in a folder is of; None where there is none."""
    path = folder / RECEIPT
    if not path.is_file():
        return None
    found = read_json(path, TABLE_BYTES)
    recipe, inputs = found.get("recipe"), found.get("inputs")
    return {
        "recipe": recipe.get("digest") if isinstance(recipe, dict) else None,
        "inputs": [one.get("checkpoint") for one in inputs if isinstance(one, dict)]
        if isinstance(inputs, list)
        else [],
        "versions": found.get("versions"),
    }
