"""The command line as Markdown: every command with its arguments and options, read from the app itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_MADE_ELSEWHERE = "do"  # its commands are made from compositions and operators, which have their own tables


def commands(group: Any, above: str = "portmanteau") -> Iterator[str]:
    """Write a section for each command of a Typer group: what it does, its usage, its options."""
    for name, command in group.commands.items():
        if name == _MADE_ELSEWHERE:
            yield f"### {above} {name}"
            yield command.help
            yield (
                f"`{above} {name} NAME --SETTING VALUE … OUT`: NAME is a composition or an operator, the settings are"
                f" its own (`{above} {name} NAME --help`); a list is an option given several times."
            )
        else:
            yield from _command(f"{above} {name}", command)


def _command(title: str, command: Any) -> Iterator[str]:
    options = [one for one in command.params if one.param_type_name == "option" and one.name != "help"]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    yield f"### {title}"
    yield " ".join((command.help or "").split())
    words = [title, *(_usage(one) for one in arguments), *(["[OPTIONS]"] if options else [])]
    yield f"`{' '.join(words)}`"
    rows = [f"| `{_usage(one)}` | {_cell(one.help or '')} | |" for one in arguments]
    rows += [f"| {_spelled(one)} | {_cell(one.help or '')} | {_default(one)} |" for one in options]
    if rows:
        yield "\n".join(["| | meaning | default |", "|---|---|---|", *rows])


def _usage(argument: Any) -> str:
    name = (argument.metavar or argument.name).upper()
    several = f"{name}…" if argument.nargs == -1 else name
    return several if argument.required else f"[{several}]"


def _spelled(option: Any) -> str:
    return ", ".join(f"`{one}`" for one in [*option.opts, *option.secondary_opts])


def _default(option: Any) -> str:
    if option.required:
        return "required"
    shown = option.show_default if isinstance(option.show_default, str) else option.default
    return "" if shown in (None, False, ()) or option.show_default is False else f"`{shown}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\\[", "[")
