"""How far the work is, drawn as bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from portmanteau.merge import Progress
from portmanteau.merge.shown import printable, printable_lines

from .printing import say

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID


@contextmanager
def drawn_progress() -> Iterator[Progress]:
    """Draw bars, where stderr is a terminal; what draws them is not even imported where it is none.

    They stand there from the first stretch of work on: a download before it draws its own.
    """
    try:
        with ExitStack() as ending:
            bars = _bars() if sys.stderr.isatty() else None
            if bars is not None:
                ending.callback(bars.stop)
            yield _Telling() if bars is None else _Drawn(bars)
    except KeyboardInterrupt as error:
        say(": ".join(["interrupted", *added(error)]))
        raise


def added(error: BaseException) -> list[str]:
    """Give what was added to an error on its way: what stays of a build."""
    return getattr(error, "__notes__", [])


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[done]}/{task.fields[tensors]} tensors"),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class _Telling(Progress):
    """Tells, where nothing is drawn, what the user should know."""

    def tell(self, text: str) -> None:
        """Say it."""
        say(f"note: {text}")


class _Drawn(_Telling):
    """Draws what a build tells."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._done = 0

    def begin(self, title: str, nbytes: int, tensors: int) -> None:
        """Begin a bar."""
        self._done = 0
        self._bars.start()
        self._task = self._bars.add_task(printable(title), total=nbytes, done=0, tensors=tensors)

    def tell(self, text: str) -> None:
        """Say it above the bars."""
        self._bars.console.print(f"note: {printable_lines(text)}", markup=False, highlight=False, soft_wrap=True)

    def advance(self, nbytes: int, tensors: int = 0) -> None:
        """Move the bar on."""
        assert self._task is not None
        self._done += tensors
        self._bars.update(self._task, advance=nbytes, done=self._done)
