"""The command-line options of a composition or an operator: its keys in a recipe, as `portmanteau do` takes them."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any, Literal

from portmanteau.merge import Operator, RecipeError
from portmanteau.merge.errors import nearest
from portmanteau.merge.operator import Setting
from portmanteau.merge.registry import operators

from ..composition import compositions
from ..reference_page import NAMES, description, type_name

Kind = Literal[
    "model",  # one reference
    "models",  # references, one each time
    "weighted",  # references, one each time, perhaps with a value of its own: MODEL=VALUE
    "parts",  # a mapping to references, one each time: PATTERN=MODEL
    "items",  # a list, one item each time, in YAML
    "flag",  # --name or --no-name
    "text",  # as it stands
    "value",  # YAML
]
_METAVARS = {"models": "MODEL", "weighted": "MODEL[=VALUE]", "parts": "PATTERN=MODEL", "items": "YAML", "text": "TEXT"}


@dataclass(frozen=True)
class Option:
    """One key as an option.

    Attributes:
        key: its name in the recipe.
        kind: how its text becomes the key's value.
        type: type and bounds, for people.
        required: whether it must be given.
        default: what holds without it, for people; "" where nothing does.
        description: what it means.

    """

    key: str
    kind: Kind
    type: str
    required: bool
    default: str
    description: str

    @property
    def flag(self) -> str:
        """The option as it is written.

        >>> Option("skip_first", "value", "float, ≥ 0", False, "0.0", "").flag
        '--skip-first'
        """
        return "--" + self.key.replace("_", "-")

    @property
    def repeats(self) -> bool:
        """Tell whether it is given once for each item."""
        return self.kind in ("models", "weighted", "parts", "items")

    @property
    def spellings(self) -> tuple[str, ...]:
        """The option, and where it is given once for each item its singular too."""
        return (self.flag, self.flag.removesuffix("s")) if self.repeats and self.flag.endswith("s") else (self.flag,)

    @property
    def metavar(self) -> str:
        """What stands for its value in help."""
        if self.kind == "model":
            return self.type.upper().replace(" ", "-")
        return _METAVARS.get(self.kind, "VALUE")

    @property
    def meaning(self) -> str:
        """What it means, and where that is no reference, type and bounds."""
        if self.repeats:
            return f"{self.description}; once for each"
        return self.description if self.kind in ("model", "flag") else f"{self.description}; {self.type}"

    @property
    def help(self) -> str:
        """What help says of it: meaning and default."""
        return f"{self.meaning}; default: {self.default}" if self.default else self.meaning


def names() -> list[str]:
    """List what can be done: every composition, and every operator that a recipe may name by itself."""
    return [*compositions(), *(name for name, one in operators().items() if "importances" not in one.roles)]


def summary(name: str) -> str:
    """Give the first line of what is said of one of them."""
    return compositions()[name].summary if name in compositions() else operators()[name].summary


def options(name: str) -> tuple[Option, ...]:
    """Give the options of a composition or an operator, required ones first. Raises RecipeError for an unknown name."""
    if name not in names():
        raise RecipeError("", f"no operator or composition {name!r}", nearest(name, names()))
    if name in compositions():
        found = [_of_key(key, *one) for key, one in compositions()[name].parameters.items()]
    else:
        found = _of_operator(operators()[name])
    return tuple(sorted(found, key=lambda option: not option.required))


def _of_key(key: str, annotation: Any, default: Any) -> Option:
    required = default is Parameter.empty
    shown = "" if required or default is None else str(default)
    return Option(key, _kind(annotation), type_name(annotation), required, shown, description(annotation))


def _of_operator(operator: Operator) -> list[Option]:
    """Give the keys of an operator's body: models, base, settings, rules."""
    found = [Option("models", "weighted", "model", True, "", "a model; after = its weight, or {SETTING: VALUE}")]
    if operator.takes_base:
        found.append(Option("base", "model", "model", operator.needs_base, "", "what the models were trained from"))
    found += map(_of_setting, operator.settings.values())
    found.append(Option("rules", "items", "rule", False, "", "an exception: {tensors: PATTERN, SETTING: VALUE}"))
    meaning = "tensors that not every model has: refuse, keep from the first that has it, or drop"
    return [*found, Option("unmatched", "text", "error | keep | drop", False, "error", meaning)]


def _of_setting(setting: Setting) -> Option:
    found = _kind(setting.annotation)
    kind = found if (found == "flag" and not setting.per_model) or setting.annotation is str else "value"
    shown = "" if setting.required else str(setting.default)
    return Option(setting.name, kind, setting.type_name, setting.required, shown, setting.description)


def _kind(annotation: Any) -> Kind:
    """Tell how the text of an option becomes a value of this type."""
    members = list(_members(annotation))
    if any(one in NAMES for one in members):
        return "model"
    of = [(one, typing.get_origin(one), typing.get_args(one)) for one in members]
    mappings = [arguments for _, origin, arguments in of if _is(origin, Mapping)]
    lists = [arguments[0] for _, origin, arguments in of if _is(origin, Sequence)]
    if any(key in NAMES for key, _ in mappings):
        return "weighted"
    if any(value in NAMES for _, value in mappings):
        return "parts"
    if any(one in NAMES for one in lists):
        return "models"
    if any(hasattr(one, "recipe_form") for one in lists):
        return "items"
    if members == [bool]:
        return "flag"
    is_text = all(one is str or (origin is Literal and isinstance(choices[0], str)) for one, origin, choices in of)
    return "text" if is_text else "value"


def _is(origin: Any, kind: type) -> bool:
    return isinstance(origin, type) and issubclass(origin, kind)


def _members(annotation: Any) -> Iterator[Any]:
    """Go through the members of a union, without None and without what is annotated."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from _members(arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for one in arguments:
            yield from _members(one)
    elif annotation is not type(None):
        yield annotation
