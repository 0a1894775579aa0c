"""The heat map of changes: layers against modules, as a PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from portmanteau.merge import MergeError, PortmanteauError

from .rows import Changes

_WIDE = 100  # values that lie further apart are drawn on a logarithmic scale; two decades can be labelled
_LARGEST = 100  # inches: hundreds of experts are hundreds of modules


def check_plots() -> None:
    """Check that there is something to draw with. Raises PortmanteauError, with the cure, where there is not."""
    if find_spec("matplotlib") is None:
        raise PortmanteauError(
            "", "a heat map needs matplotlib, which is not installed", "install portmanteau[plots], or matplotlib alone"
        )


def draw(found: Sequence[Changes], path: Path) -> None:
    """Draw the change relative to the base of every layer × module into a PNG, experts side by side.

    What is outside the layers is not in it. Colours are on a logarithmic scale where modules differ by orders of
    magnitude; what has no value there is grey.

    Raises MergeError for checkpoints without layers.
    """
    check_plots()
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = [row for row in found[0].modules if row.layer is not None]
    if not rows:
        raise MergeError(found[0].base, "has no layers to draw", "--tensors lists its tensors")
    layers = list(dict.fromkeys((row.stack, row.layer) for row in rows))
    modules = list(dict.fromkeys(row.module for row in rows))
    grids = [_percent(one, layers, modules) for one in found]
    seen = [value for grid in grids for line in grid for value in line if not math.isnan(value)] or [1.0]
    norm = LogNorm(min(seen), max(seen)) if max(seen) > _WIDE * min(seen) else Normalize(0, max(seen))

    size = (min((1.5 + 0.5 * len(modules)) * len(found) + 1.5, _LARGEST), min(2.8 + 0.3 * len(layers), _LARGEST))
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    stacks = list(dict.fromkeys(stack for stack, _ in layers))
    for axes, grid, one in zip(every, grids, found, strict=True):
        image = axes.imshow(grid, norm=norm, aspect="auto", origin="lower", interpolation="nearest")
        axes.set_facecolor("lightgrey")
        axes.set_xticks(range(len(modules)), modules, rotation=45, ha="right", rotation_mode="anchor")
        if len(found) > 1:
            axes.set_title(_short(one.expert, 30), fontsize="small")
    every[0].set_yticks(range(len(layers)), [f"{s}.{i}" if len(stacks) > 1 else str(i) for s, i in layers])
    every[0].set_ylabel(f"layer of {', '.join(stacks)}")
    every[0].set_xlabel("grey: no such module, no change, or a base of zeros")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    bar = figure.colorbar(image, ax=list(every), label="mean |change| / mean |base|, %", format=plain)
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    who = _short(found[0].expert) if len(found) == 1 else f"{len(found)} experts"
    figure.suptitle(f"{who}\nagainst {_short(found[0].base)}", fontsize="medium")
    figure.savefig(path, format="png", dpi=150)


def _percent(found: Changes, layers: Sequence[tuple[str, int | None]], modules: Sequence[str]) -> list[list[float]]:
    """Lay the relative changes out by layer and module, in percent; NaN where there is none, or no change."""
    own = {(row.stack, row.layer, row.module): 100 * (row.change.relative or math.nan) for row in found.modules}
    return [[own.get((*layer, module), math.nan) for module in modules] for layer in layers]


def _short(label: str, most: int = 60) -> str:
    """Keep the end of a long path: that is what tells two of them apart."""
    return label if len(label) <= most else "…" + label[1 - most :]
