"""The reference as Markdown: recipes, compositions and operators from their declarations, and the commands."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..recipe.reading import Output
from ..reference_page import entry, overview, type_name
from .commands import commands

_RECIPE = {
    "models": "names for checkpoints: a folder, a file, a Hub id[@revision], or {path: , revision: , lora: }",
    "steps": "checkpoints that are made on the way, by name; never written",
    "merge": "the result: one composition, or one operator over every tensor",
    "output": "what the result is to be like on disk",
}
_OF_OPERATORS = """\
Every operator stands in a recipe as `NAME: {models: , SETTING: }`: `models` is a list, or a mapping to weights or to
settings of their own; `base` is what deltas are taken from; `rules` are exceptions by tensor name; `unmatched` is
`error`, `keep` or `drop`. A setting is one value, a list (a gradient over depth), choices by tensor name
(`[{tensors: PATTERN, value: }, …, {value: }]`), and where it is *for each model* also a mapping from models to any of
these."""
_MADE = "Made by `portmanteau show --markdown` from the declarations in the code; not edited by hand."


def page(command_line: Any) -> str:
    """Write the whole page; `command_line` is the Typer app as a command."""
    every = [entry(one["name"]) for one in overview()]
    kinds = {"Compositions": "composition", "Operators": "operator"}
    of_kind = {title: [one for one in every if one["kind"] == kind] for title, kind in kinds.items()}
    parts = ["# Reference", _MADE, _contents(of_kind)]
    parts += ["## Recipes", _table(("key", "meaning"), [(f"`{k}`", v) for k, v in _RECIPE.items()])]
    parts += ["### output", _settings(_output())]
    parts += ["## Compositions", *(part for one in of_kind["Compositions"] for part in _entry(one))]
    parts += ["## Operators", _OF_OPERATORS, *(part for one in of_kind["Operators"] for part in _entry(one))]
    parts += ["## Commands", *commands(command_line)]
    return "\n\n".join(parts) + "\n"


def _contents(of_kind: Mapping[str, Iterable[Mapping[str, Any]]]) -> str:
    lines = ["- [Recipes](#recipes)"]
    for title, entries in of_kind.items():
        links = ", ".join(f"[{one['name']}](#{one['name']})" for one in entries)
        lines.append(f"- [{title}](#{title.lower()}): {links}")
    return "\n".join([*lines, "- [Commands](#commands)"])


def _output() -> list[dict[str, str]]:
    return [
        {
            "name": name,
            "type": {"shard_size": "bytes", "tokenizer": "model"}.get(name) or type_name(field.annotation),
            "default": "" if field.default is None else str(field.default),
            "description": field.description or "",
        }
        for name, field in Output.model_fields.items()
    ]


def _entry(one: Mapping[str, Any]) -> list[str]:
    """Write one composition or operator."""
    parts = [f"### {one['name']}", *_text(one["text"])]
    if one["example"]:
        parts.append(f"```yaml\nmerge:\n  {one['example']}\n```")
    if one["settings"]:
        parts.append(_settings(one["settings"]))
    return [*parts, f"Source: {one['source']}."]


def _settings(settings: Sequence[Mapping[str, str]]) -> str:
    titles = ("setting", "type and bounds", "default", "meaning")
    rows = [(f"`{s['name']}`", s["type"], s["default"] and f"`{s['default']}`", s["description"]) for s in settings]
    return _table(titles, rows)


def _text(text: str) -> list[str]:
    """Turn a docstring into paragraphs, its examples into code."""
    parts = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        start = next((i for i, line in enumerate(lines) if line.lstrip().startswith(">>>")), len(lines))
        if start:
            parts.append("\n".join(_marked(line) for line in lines[:start]))
        if lines[start:]:
            parts.append("```python\n" + textwrap.dedent("\n".join(lines[start:])) + "\n```")
    return parts


def _marked(line: str) -> str:
    """Keep signs of formulas from being read as Markdown; what stands in backquotes is code already."""
    pieces = line.split("`")
    return "`".join(p if i % 2 else p.replace("*", "\\*").replace("<", "\\<") for i, p in enumerate(pieces))


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
