"""All that prints: data on stdout, everything else on stderr, and nothing that strangers wrote goes out raw."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from portmanteau.merge.shown import json_text, printable, printable_lines

if TYPE_CHECKING:
    from rich.text import Text

    from portmanteau.merge.origins import Strip

    from ..reports.maps import HeatMap
    from ..reports.rows import Table


def say(text: str) -> None:
    """Print on stderr."""
    typer.echo(printable_lines(text), err=True)


def notes(lines: Sequence[str]) -> None:
    """Print notes on stderr."""
    for line in lines:
        say(f"note: {line}")


def put(text: str) -> None:
    """Print data on stdout."""
    typer.echo(printable_lines(text))


def put_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    typer.echo(json_text(value, indent=2, default=str))


def put_table(table: Table) -> None:
    """Print a table on stdout; as wide as it needs to be where nobody's terminal limits it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text

    titles, rows = table
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    drawn = Drawn(*titles, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    console.print(drawn)


def is_drawn(picture: bool | None) -> bool:
    """Tell whether pictures are asked for; where nothing is said, on a terminal."""
    return sys.stdout.isatty() if picture is None else picture


def draw_strips(strips: Sequence[Strip]) -> None:
    """Draw which model each layer comes from."""
    from . import pictures

    _draw(partial(pictures.strip_lines, strips))


def draw_maps(maps: Iterable[HeatMap]) -> None:
    """Draw heat maps."""
    from . import pictures

    _draw(partial(pictures.map_lines, maps))


def _draw(lines: Callable[[int], Iterable[Text]]) -> None:
    """Draw a picture as wide as the terminal."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for line in lines(console.width):
        console.print(line, soft_wrap=True)
