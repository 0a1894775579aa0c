"""What notebooks show of checkpoints and plans: a line, a table, and strips of layers in their models' colours."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from .origins import Cell, Strip, models_of
from .palette import MODELS
from .shown import printable

_CELL = "display:inline-block;min-width:1.4em;height:1.6em;margin:1px;padding:0 .2em;text-align:center;"
_LABEL = "color:#000;background:#ffffffb0;padding:0 .15em"


def table(line: str, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a line and, below it, a table."""
    head = "".join(f"<th>{_text(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<p>{_text(line)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def picture(line: str, strips: Sequence[Strip]) -> str:
    """Write a line and, below it, which model each layer comes from: a blend has the colours of its models."""
    models = models_of(strips)
    drawn = "".join(
        f"<p>{_text(strip.stack)}<br>{''.join(_cell(cell, models) for cell in strip.cells)}</p>" for strip in strips
    )
    legend = " ".join(f'<span style="{_CELL}{_background([i])}"></span> {_text(name)}' for i, name in enumerate(models))
    return f"<p>{_text(line)}</p>{drawn}<p>{legend}</p>"


def _cell(cell: Cell, models: Sequence[str]) -> str:
    colours = _background([models.index(model) for model in cell.models])
    name = cell.name if cell.is_layer else cell.name[:4]
    says = f"{cell.name}: {cell}"
    return f'<span style="{_CELL}{colours}" title="{_text(says)}"><small style="{_LABEL}">{_text(name)}</small></span>'


def _background(numbers: Sequence[int]) -> str:
    """Give the style of some models' colours, one below the other."""
    share = 100 / max(1, len(numbers))
    stops = [
        f"{MODELS[number % len(MODELS)]} {share * i:.4g}% {share * (i + 1):.4g}%" for i, number in enumerate(numbers)
    ]
    return f"background:linear-gradient({', '.join(stops)});"


def _text(value: str) -> str:
    return html.escape(printable(value))
