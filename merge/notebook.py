"""What values look like in a notebook: tables and strips of layers in HTML, escaped; bars that need no widgets."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

from .origins import Cell, Strip, models_of
from .palette import MODELS
from .progress import Progress
from .shown import printable

_CELL = "display:inline-block;min-width:1.4em;height:1.6em;margin:1px;padding:0 .2em;text-align:center;"
_LABEL = "color:#000;background:#ffffffb0;padding:0 .15em"
_EVERY = 0.2  # seconds between two drawings of a bar


def table(title: str, titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a table with a caption; every text in it is escaped.

    >>> table("a < b", ["n"], [[1]])
    '<table><caption>a &lt; b</caption><tr><th>n</th></tr><tr><td>1</td></tr></table>'
    """
    head = "".join(f"<th>{_text(one)}</th>" for one in titles)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{_text(title)}</caption><tr>{head}</tr>{body}</table>"


def picture(strips: Sequence[Strip]) -> str:
    """Draw which model each layer comes from: a blend has the colours of its models."""
    models = models_of(strips)
    drawn = "".join(
        f"<p>{_text(strip.stack)}<br>{''.join(_cell(cell, models) for cell in strip.cells)}</p>" for strip in strips
    )
    legend = " ".join(f'<span style="{_CELL}{_background([i])}"></span> {_text(name)}' for i, name in enumerate(models))
    return f"{drawn}<p>{legend}</p>"


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


def _text(value: object) -> str:
    return html.escape(printable(str(value)))


def default_progress() -> Progress:
    """Give what a build tells its progress when nobody says: a bar in a notebook, else nothing."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return NotebookProgress() if hasattr(shell, "kernel") else Progress()


class NotebookProgress(Progress):
    """Draws a bar below the cell, and draws it over as the work goes on."""

    def __init__(self) -> None:
        """Draw nothing yet."""
        self._shown: Any = None
        self._title, self._whole, self._tensors, self._bytes, self._done = "", 1, 0, 0, 0
        self._drawn = 0.0

    def begin(self, title: str, nbytes: int, tensors: int) -> None:
        """Begin a bar."""
        self._shown, self._title, self._whole, self._tensors = None, title, max(1, nbytes), tensors
        self._bytes = self._done = 0
        self._draw()

    def advance(self, nbytes: int, tensors: int = 0) -> None:
        """Move the bar on; it is drawn a few times a second, and when all is done."""
        self._bytes += nbytes
        self._done += tensors
        if self._done == self._tensors or time.monotonic() - self._drawn > _EVERY:
            self._draw()

    def _draw(self) -> None:
        ipython: Any = import_module("IPython.display")  # only where a notebook runs, so no dependency
        self._drawn = time.monotonic()
        bar = f'<progress value="{self._bytes}" max="{self._whole}"></progress>'
        drawn = ipython.HTML(f"{html.escape(self._title)} {bar} {self._done}/{self._tensors} tensors")
        if self._shown is None:
            self._shown = ipython.display(drawn, display_id=True)
        else:
            self._shown.update(drawn)
