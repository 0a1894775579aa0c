"""The heat map of changes: layers against modules, as a PNG."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from portmanteau.merge import MergeError, PortmanteauError

from .changes import Changes


def check_plots() -> None:
    """Check that there is something to draw with. Raises PortmanteauError, with the cure, where there is not."""
    if find_spec("matplotlib") is None:
        raise PortmanteauError("", "a heat map needs matplotlib, which is not installed", "pip install matplotlib")


def draw(found: Changes, path: Path) -> None:
    """Draw the change relative to the base of every layer × module into a PNG; what is outside the layers is not in it.

    Colours are on a logarithmic scale, where modules differ by orders of magnitude. Grey: no change or no such module.

    Raises MergeError for checkpoints without layers.
    """
    check_plots()
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    rows = [row for row in found.modules if row.layer is not None]
    if not rows:
        raise MergeError(found.base, "has no layers to draw", "--tensors lists its tensors")
    layers = list(dict.fromkeys((row.stack, row.layer) for row in rows))
    modules = list(dict.fromkeys(row.module for row in rows))
    values = [[math.nan] * len(modules) for _ in layers]
    for row in rows:
        relative = row.change.relative
        values[layers.index((row.stack, row.layer))][modules.index(row.module)] = 100 * relative if relative else math.nan
    several = len({stack for stack, _ in layers}) > 1
    labels = [f"{stack}.{layer}" if several else str(layer) for stack, layer in layers]

    figure = Figure(figsize=(3 + 0.5 * len(modules), 2.6 + 0.3 * len(layers)), layout="constrained")
    axes = figure.subplots()
    finite = [value for line in values for value in line if not math.isnan(value)]
    norm = LogNorm(min(finite), max(finite)) if finite and max(finite) > min(finite) else None
    image = axes.imshow(values, norm=norm, aspect="auto", origin="lower", interpolation="nearest")
    axes.set_facecolor("lightgrey")
    axes.set_xticks(range(len(modules)), modules, rotation=45, ha="right", rotation_mode="anchor")
    _label_layers(axes, labels)
    axes.set_ylabel("layer" if several else f"layer of {layers[0][0]}")
    figure.colorbar(image, label="mean |change| / mean |base|, %")
    figure.suptitle(f"{_short(found.expert)}\nagainst {_short(found.base)}", fontsize="medium")
    figure.savefig(path, format="png", dpi=150)


def _label_layers(axes: Any, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)


def _short(label: str, most: int = 60) -> str:
    """Keep the end of a long path: that is what tells two of them apart."""
    return label if len(label) <= most else "…" + label[1 - most :]
