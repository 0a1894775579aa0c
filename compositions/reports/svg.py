"""Pictures as inline SVG: heat maps and strips of layers. Colours are classes, so that the page's style decides."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from portmanteau.merge.origins import Cell, Strip
from portmanteau.merge.palette import MODELS
from portmanteau.merge.units import readable

from .maps import HeatMap

_CELL, _ROW, _LETTER = 22, 20, 6.6
_STRIP, _END = 40, 72
_DENSE = 40  # layers; where there are more, cells are narrower
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def text(value: object) -> str:
    """Escape what is shown in a page: names come from strangers; control characters are not shown."""
    return html.escape(_UNSAFE.sub("\N{REPLACEMENT CHARACTER}", str(value)), quote=True)


def heat_map(one: HeatMap) -> str:
    """Draw a heat map: a row for each module, a column for each layer. Every cell can be focused and says its value."""
    wide = _CELL if len(one.layers) <= _DENSE else _CELL // 2
    left = 10 + _LETTER * max((len(module) for module in one.modules), default=0)
    width, height = left + wide * len(one.layers) + 4, _ROW * (len(one.modules) + 1) + 4
    parts = [_open(width, height, f"{one.title}, {one.stack}: {one.measure}")]
    for column, layer in enumerate(one.layers):
        if layer % _every(len(one.layers)) == 0:
            at = left + wide * (column + 0.5)
            parts.append(f'<text class="tick mid" x="{at:g}" y="{_ROW - 6}">{layer}</text>')
    for row, (module, values) in enumerate(zip(one.modules, one.values, strict=True)):
        top = _ROW * (row + 1)
        parts.append(f'<text class="tick end" x="{left - 6:g}" y="{top + 14}">{text(module)}</text>')
        for column, (layer, value) in enumerate(zip(one.layers, values, strict=True)):
            says = f"layer {layer}, {module}: {one.shown(value)}"
            box = f'x="{left + wide * column:g}" y="{top}" width="{wide - 1}" height="{_ROW - 1}"'
            parts.append(_focusable(f'<rect class="{_colour(one, value)}" {box}/>', says, row, column))
    return "".join([*parts, "</g></svg>"])


def scale(one: HeatMap) -> str:
    """Draw what the colours of a heat map stand for."""
    kind, ends = "d" if one.scale == "diverging" else "s", (one.shown(one.low), one.shown(one.high))
    cells = "".join(f'<rect class="{kind}{i}" x="{16 * i}" y="2" width="16" height="10"/>' for i in range(9))
    how = ", logarithmic" if one.scale == "logarithmic" else ""
    picture = f'<svg class="scale" width="144" height="14" aria-hidden="true">{cells}</svg>'
    empty = f'<span class="legend">{_square("none")} no change, or nothing there</span>' if _has_gaps(one) else ""
    return f'<span class="legend">{text(ends[0])} {picture} {text(ends[1])}{how}</span>{empty}'


def _has_gaps(one: HeatMap) -> bool:
    return any(one.colour(value) is None for values in one.values for value in values)


def strip(one: Strip, models: Sequence[str]) -> str:
    """Draw which model each layer comes from: a blend is striped, what lies side by side is split."""
    wide, gap = (_STRIP, 2) if len(one.cells) <= _DENSE else (12, 1)
    sizes = [wide if cell.is_layer else _END for cell in one.cells]
    parts = [_open(sum(sizes) + 4, 62, f"which model each layer comes from: {one.stack}")]
    left = 2
    for column, (cell, size) in enumerate(zip(one.cells, sizes, strict=True)):
        shown = cell.name if not cell.is_layer or int(cell.name) % _every(len(one.cells)) == 0 else ""
        parts.append(f'<text class="tick mid" x="{left + size / 2:g}" y="14">{text(shown)}</text>')
        shapes = "".join(_shares(cell, models, left, size - gap))
        frame = f'<rect class="frame" x="{left}" y="20" width="{size - gap}" height="36"/>'
        parts.append(_focusable(shapes + frame, described(cell), 0, column))
        left += size
    return "".join([*parts, "</g></svg>"])


def described(cell: Cell) -> str:
    """Say where a cell comes from, with the tensors and bytes of each kind."""
    name = f"layer {cell.name}" if cell.is_layer else cell.name
    kinds = [
        f"{' × '.join(one.models)} ({one.operator}, {one.tensors} tensors, {readable(one.nbytes)})"
        for one in cell.origins
    ]
    return f"{name}: {'; '.join(kinds)}"


def swatch(index: int) -> str:
    """Draw the colour of a model."""
    return _square(f"m{index % len(MODELS)}")


def _square(kind: str) -> str:
    shape = f'<rect class="{kind}" width="14" height="14"/>'
    return f'<svg class="swatch" width="14" height="14" aria-hidden="true">{shape}</svg>'


def _shares(cell: Cell, models: Sequence[str], left: float, width: float) -> Iterator[str]:
    """Split a cell by the bytes of its origins, and stripe those that are blends."""
    whole = sum(one.nbytes for one in cell.origins) or 1
    for one in cell.origins:
        own = width * (one.nbytes / whole if len(cell.origins) > 1 else 1.0)
        bands = list(one.models) * (1 if len(one.models) == 1 else 2 if len(one.models) < 5 else 1)
        high = 36 / max(1, len(bands))
        for i, model in enumerate(bands):
            box = f'x="{left:.6g}" y="{20 + high * i:.6g}" width="{own:.6g}" height="{high:.6g}"'
            yield f'<rect class="m{models.index(model) % len(MODELS)}" {box}/>'
        left += own


def _open(width: float, height: float, says: str) -> str:
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    return f'<svg {size} role="group" aria-label="{text(says)}"><g class="cells">'


def _focusable(shape: str, says: str, row: int, column: int) -> str:
    first = 0 if row == column == 0 else -1
    at = f'data-row="{row}" data-column="{column}" tabindex="{first}" role="img"'
    return f'<g class="cell" {at}><title>{text(says)}</title>{shape}</g>'


def _colour(one: HeatMap, value: float | None) -> str:
    number = one.colour(value)
    kind = "d" if one.scale == "diverging" else "s"
    return "none" if number is None else f"{kind}{number}"


def _every(count: int) -> int:
    return 1 if count <= _DENSE else 5
