"""The commands of `portmanteau do`: one for each composition and operator, made from its declaration when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .options import Option

Run = Callable[..., None]  # name, out, options of every build, and by key what the own options were given


def group(run: Run) -> type[typer.core.TyperGroup]:
    """Make the group of all that can be done; `run` does it.

    Args:
        run: takes the name of a composition or an operator, the place of the result, the options of every build, and
            as `**given` the own options. Its annotations say how all but the first and the last are written.

    """

    class Group(typer.core.TyperGroup):
        """The group whose commands are `_Commands`."""

        def __init__(self, **attributes: Any) -> None:
            super().__init__(**attributes)
            self.commands = _Commands(run)  # type: ignore[assignment]  # typer only reads it

    return Group


class _Commands(Mapping[str, Any]):
    """The commands, by the names of what they do."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __getitem__(self, name: str) -> Any:
        """Make the command of one of them."""
        from .options import names, summary

        if name not in names():
            raise KeyError(name)
        only = typer.Typer(add_completion=False)
        only.command(name, help=f"{summary(name)}\n\n`portmanteau show {name}` says more.")(_doing(name, self._run))
        return typer.main.get_command(only)

    def __iter__(self) -> Iterator[str]:
        """Go through their names."""
        from .options import names

        return iter(names())

    def __len__(self) -> int:
        """Count them."""
        return sum(1 for _ in self)


def _doing(name: str, run: Run) -> Any:
    """Make the function behind `do NAME`, its parameters the options of NAME and those of every build."""
    from .options import options

    declared = signature(run, eval_str=True)
    _, place, *common = (one for one in declared.parameters.values() if one.kind is not one.VAR_KEYWORD)
    own = map(_parameter, options(name))
    of_build = (one.replace(kind=Parameter.KEYWORD_ONLY) for one in common)
    do: Any = partial(run, name)
    do.__signature__ = declared.replace(parameters=[place, *own, *of_build])
    do.__annotations__ = {}
    do.__name__ = name
    return do


def _parameter(option: Option) -> Parameter:
    """Make the parameter that typer reads an option from."""
    annotated: Any = Annotated
    kind: Any = list[str] if option.repeats else bool if option.kind == "flag" else str
    told = typer.Option(
        *([f"{option.flag}/--no-{option.flag[2:]}"] if option.kind == "flag" else option.spellings),
        help=option.help.replace("[", "\\["),
        metavar=None if option.kind == "flag" else option.metavar,
        show_default=False,
    )
    default = Parameter.empty if option.required else None
    annotation = annotated[kind if option.required else kind | None, told]
    return Parameter(option.key, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
