"""A first recipe for someone who has models and a method: complete, checked, every other setting there as a comment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from portmanteau.merge import RecipeError
from portmanteau.merge.errors import Mistake, nearest
from portmanteau.merge.results.output import check_file

from ..reference import json_schema
from ..reference_page import entry
from .options import Option, options, summary
from .options import names as all_names
from .written import OneOff, one_off

SCHEMA = "recipe.schema.json"


def names() -> list[str]:
    """List what a first recipe can be written for: what takes single models, or one list of them."""
    return [name for name in all_names() if _slots(name) is not None]


def needs_base(name: str) -> bool:
    """Tell whether a base must be named."""
    return any(option.key == "base" and option.required for option in options(name))


def starter(name: str, models: Sequence[str], base: str | None, file: Path) -> OneOff:
    """Write a first recipe for models, in the order in which its keys ask for them, and check it.

    Raises RecipeError with what is wrong with the models, under the option that named them.
    """
    if name not in all_names():
        raise RecipeError("--kind", f"no operator or composition {name!r}", nearest(name, names()))
    slots = _slots(name)
    if slots is None:
        raise RecipeError("--kind", f"{name} needs more than models", f"write it by hand, as `portmanteau show {name}`")
    given = {**_values(name), **_shared_out(name, slots, models)}
    if base is not None:
        if not any(option.key == "base" for option in options(name)):
            raise RecipeError("--base", f"{name} takes no base", "name it as a --model if it is to be merged")
        given["base"] = base
    elif needs_base(name):
        raise RecipeError("--base", f"{name} needs a base", "name the model that the others were trained from")
    made = one_off(name, given, file, {})
    try:
        made.check()
    except RecipeError as error:
        raise RecipeError.of(_as_given(mistake, slots) for mistake in error.mistakes) from error
    return replace(made, text=_commented(name, made, set(given)))


def check_places(recipe: Path, *, force: bool) -> None:
    """Check that a first recipe and the schema beside it can be written. Raises OutputError where they cannot."""
    schema = recipe.with_name(SCHEMA)
    check_file(recipe, force=force)
    check_file(schema, force=force or json_schema.is_ours(schema))


def write(made: OneOff) -> None:
    """Write a first recipe, and beside it the schema by which editors help with it."""
    made.file.write_text(made.text, encoding="utf-8")
    made.file.with_name(SCHEMA).write_text(json_schema.text(), encoding="utf-8")


def _slots(name: str) -> list[Option] | None:
    """Give the keys that models fill: single ones, and one list at the most; None where that is not enough."""
    needed = [option for option in options(name) if option.required and option.key != "base"]
    known = _values(name)
    lists = [option for option in needed if option.kind in ("models", "weighted")]
    other = [option for option in needed if option.kind in ("parts", "items")]
    missing = [one for one in needed if one.kind in ("text", "value", "flag") and one.key not in known]
    if other or missing or len(lists) > 1:
        return None
    return [option for option in needed if option.kind in ("model", "models", "weighted")]


def _values(name: str) -> dict[str, Any]:
    """Take the settings of the example, which are no models, as the first values."""
    example = entry(name)["example"]
    body = yaml.safe_load(example)[name] if example else {}
    plain = {option.key for option in options(name) if option.kind in ("text", "value")}
    return {key: str(value) for key, value in body.items() if key in plain} if isinstance(body, dict) else {}


def _shared_out(name: str, slots: Sequence[Option], models: Sequence[str]) -> dict[str, Any]:
    """Give the single keys a model each, in order, and the list the rest."""
    singles = [option for option in slots if not option.repeats]
    lists = [option for option in slots if option.repeats]
    if len(models) < len(slots) or (len(models) > len(singles) and not lists):
        keys = ", ".join(option.key for option in slots)
        hint = f"{name} takes, in this order: {keys}"
        raise RecipeError("--model", f"{len(models)} models are named", hint)
    given: dict[str, Any] = {option.key: model for option, model in zip(singles, models, strict=False)}
    return given | {option.key: list(models[len(singles) :]) for option in lists}


def _as_given(mistake: Mistake, slots: Sequence[Option]) -> Mistake:
    """Name the option of `new` that a model came by."""
    flag, *rest = mistake.where.split(": ", 1)
    return replace(mistake, where=": ".join(["--model", *rest])) if flag in {one.flag for one in slots} else mistake


def _commented(name: str, made: OneOff, given: set[str]) -> str:
    """Say on top what to do with it, and below the keys what else there is to set."""
    _, *lines = made.text.splitlines()
    place = lines.index(f"  {name}:")
    above = [f"# yaml-language-server: $schema=./{SCHEMA}", f"# {summary(name)}", *_next_steps(made.file)]
    lines.insert(place, f"  # every setting: portmanteau show {name}")
    other = [line for option in options(name) if option.key not in given for line in _comment(option)]
    output = ["# output: {dtype: bfloat16, shard_size: 5GB}"]
    return "\n".join([*above, *lines, *other, *output]) + "\n"


def _next_steps(file: Path) -> Iterator[str]:
    yield f"# Check it: portmanteau check {file.name}   Build it: portmanteau build {file.name} OUT"


def _comment(option: Option) -> Iterator[str]:
    """Write a setting that is not given as a comment: its default, and what it means."""
    yield f"    # {option.key}: {option.default or '…'}  # {option.meaning}"
