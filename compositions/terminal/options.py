"""The arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from portmanteau.merge.plugins.discovery import announce
from portmanteau.merge.units import byte_count


def _bytes(text: str) -> int:
    """Read a size given on the command line."""
    try:
        return byte_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _announce(modules: list[str] | None) -> list[str] | None:
    """Tell where operators are found that are none of ours; they are imported where a recipe names one."""
    for module in modules or ():
        announce(module)
    return modules


def completed(incomplete: str) -> list[tuple[str, str]]:
    """Complete the name of a composition or an operator."""
    from ..reference_page import overview

    return [(one["name"], one["summary"]) for one in overview() if one["name"].startswith(incomplete)]


_MEMORY_HELP = "Bytes in flight; the result does not depend on it."
_CHANGES_HELP = "Tell in the published card the change from each parent; reads the parents once more."
_DEVICE_HELP = "Where torch computes: cpu, cuda, cuda:1 …; bytes that are only copied never go there."
_NON_FINITE_HELP = "What to do where an input or the result has NaN or infinity."
_PICTURE_HELP = "Draw it in the terminal; by default on a terminal."
_PLUGIN_HELP = "A module, or a .py file, that registers operators or mergekit methods; may be given again."
_PUSH_HELP = "Publish the result on the Hub, privately."
_THREADS_HELP = "Tensors made at once; the result does not depend on it."

Recipe = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Built = Annotated[Path, typer.Argument(help="A folder that portmanteau built.", show_default=False)]
Beside = Annotated[Path, typer.Argument(help="The folder to make; its recipe is written as OUT.yaml.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Picture = Annotated[bool | None, typer.Option("--picture/--no-picture", help=_PICTURE_HELP)]
Rows = Annotated[bool, typer.Option("--tensors", help="A row for each tensor.")]
Threads = Annotated[int | None, typer.Option(min=1, help=_THREADS_HELP)]
Memory = Annotated[int, typer.Option(parser=_bytes, metavar="SIZE", help=_MEMORY_HELP, show_default="256 MiB")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help=_DEVICE_HELP)]
NonFinite = Annotated[Literal["error", "warn", "keep"], typer.Option("--non-finite", help=_NON_FINITE_HELP)]
Plugin = Annotated[list[str] | None, typer.Option("--plugin", metavar="MODULE", callback=_announce, help=_PLUGIN_HELP)]
Push = Annotated[str | None, typer.Option(metavar="ORG/NAME", help=_PUSH_HELP, show_default=False)]
Changes = Annotated[bool, typer.Option("--changes/--no-changes", help=_CHANGES_HELP)]
Public = Annotated[bool, typer.Option("--public", help="Let everyone see what is published.")]
