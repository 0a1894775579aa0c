"""Folders with bottleneck adapters, alone or stacked, as plain values for tables and JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..adapters.bottleneck import SETUP, Bottleneck, module_of, open_bottleneck
from ..adapters.folder import CONFIG
from ..errors import CheckpointError
from ..files.json_file import read_json
from ..files.places import user_path
from ..tensor_spec import TensorSpec
from .tensors import described, group

_LAYER = re.compile(r"\.(\d+)(?=\.|$)")
_OUTSIDE = -1


def is_bottleneck(reference: str | Path) -> bool:
    """Tell whether a path is that of a folder which the library adapters reads: one adapter, or a composition."""
    folder = user_path(reference)
    if (folder / SETUP).is_file():
        return True
    return (folder / CONFIG).is_file() and "peft_type" not in read_json(folder / CONFIG)


def adapters(reference: str | Path, *, tensors: bool = False) -> dict[str, Any]:
    """Describe the adapters of a folder: what they are, sizes by the modules they stand at; every tensor if asked.

    Raises CheckpointError where one of them cannot be opened.
    """
    opened = _opened(user_path(reference))
    specs = {key: one.stored.specs[own] for one in opened for key, own in one.tensors.items()}
    groups = [row for one in opened for row in _groups(one, several=len(opened) > 1)]
    return {"about": [_adapter(one) for one in opened], **described(specs, groups, tensors=tensors)}


def _opened(folder: Path) -> list[Bottleneck]:
    """Open the one adapter of a folder, or those of a composition, which lie in folders of their names."""
    if not (folder / SETUP).is_file():
        return [open_bottleneck(folder)]
    setup = read_json(folder / SETUP).get("adapter_setup")
    names = list(dict.fromkeys(_names(setup)))
    if not names:
        raise CheckpointError(str(folder / SETUP), "names no adapters", "save the composition again with adapters")
    return [open_bottleneck(folder / name) for name in names]


def _names(block: Any) -> Iterable[str]:
    """Go through the adapters of a composition block: `{type, children}`, at the leaves `{type: single}`."""
    children = block.get("children") if isinstance(block, dict) else None
    for child in children if isinstance(children, list) else ():
        if isinstance(child, str) and Path(child).name == child:
            yield child
        else:
            yield from _names(child)


def _adapter(opened: Bottleneck) -> dict[str, Any]:
    """Describe what an adapter is."""
    architecture = opened.architecture
    reduction = architecture["reduction_factor"]
    described = {
        "kind": "bottleneck adapter",
        "name": opened.name,
        "model": opened.model["model_name"],
        "model_type": opened.model["model_type"],
        "hidden_size": opened.model["hidden_size"],
        "reduction_factor": reduction,
        "activation": architecture["non_linearity"],
    }
    if opened.is_invertible:
        factor = architecture["inv_adapter_reduction_factor"]
        described["invertible"] = f"{architecture['inv_adapter']}, reduction factor {factor}"
    if opened.head:
        described["head"] = "yes"
    return described


def _groups(opened: Bottleneck, *, several: bool) -> list[dict[str, Any]]:
    """Sort the tensors by the module that they stand at, layers taken together."""
    groups: dict[str, list[tuple[int, TensorSpec]]] = {}
    for key, own in opened.tensors.items():
        module = module_of(key)
        layer = _LAYER.search(module)
        where = _LAYER.sub(".*", module, count=1)
        number = int(layer[1]) if layer else _OUTSIDE
        groups.setdefault(where, []).append((number, opened.stored.specs[own]))
    prefix = f"{opened.name}: " if several else ""
    return [
        group(f"{prefix}{where}", runs(sorted({i for i, _ in found if i != _OUTSIDE})), (spec for _, spec in found))
        for where, found in groups.items()
    ]


def runs(numbers: Sequence[int]) -> str:
    """Write numbers in order as runs.

    >>> runs([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)
