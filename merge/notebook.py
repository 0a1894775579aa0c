"""What values look like in a notebook: small tables in HTML, escaped, and bars that need no widgets."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

from .progress import Progress

_EVERY = 0.2  # seconds between two drawings of a bar


def table(title: str, titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a table with a caption; every text in it is escaped.

    >>> table("a < b", ["n"], [[1]])
    '<table><caption>a &lt; b</caption><tr><th>n</th></tr><tr><td>1</td></tr></table>'
    """
    head = "".join(f"<th>{html.escape(one)}</th>" for one in titles)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{html.escape(title)}</caption><tr>{head}</tr>{body}</table>"


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
