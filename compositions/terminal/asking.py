"""What is asked for on a terminal where no option says it."""

from __future__ import annotations

import typer

from ..one_off import starter
from .printing import say


def first_recipe(kind: str | None, models: list[str] | None, base: str | None) -> tuple[str, list[str], str | None]:
    """Ask for what a first recipe is to do, its models and their base, as far as they are not named."""
    if kind is None:
        say(f"known: {', '.join(starter.names())}")
        kind = str(typer.prompt("What is to be done", default="linear", err=True))
    named = models or list(iter(_model, ""))
    if base is None and not models and starter.needs_base(kind):
        base = typer.prompt("The base that they were trained from", err=True)
    return kind, named, base


def _model() -> str:
    """Ask for one more model."""
    named: str = typer.prompt("A model (enter ends)", default="", show_default=False, err=True)
    return named
