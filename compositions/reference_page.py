"""What there is to use in a recipe, read from the declarations: operators and compositions with their settings."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic.fields import FieldInfo

from portmanteau.merge import Adapter, Bottleneck, Checkpoint, RecipeError, SparseFineTune
from portmanteau.merge.operator import Setting
from portmanteau.merge.registry import exists, find, operators, unknown, with_plugins

from .composition import Composition, compositions

_NAMES = {Checkpoint: "model", Adapter: "adapter", Bottleneck: "bottleneck adapter", SparseFineTune: "sparse fine-tune"}


def overview() -> list[dict[str, str]]:
    """List every composition and operator with its first line."""
    found = [(c.name, "composition", c.summary) for c in compositions().values()]
    found += [(o.name, "operator", o.summary) for o in with_plugins().values()]
    return [{"name": name, "kind": kind, "summary": summary} for name, kind, summary in found]


def entry(name: str) -> dict[str, Any]:
    """Describe one of them. Raises RecipeError, naming the nearest, for an unknown name."""
    if name in compositions():
        made = compositions()[name]
        settings = [_key(key, annotation, default) for key, (annotation, default) in made.parameters.items()]
        return {"name": name, "kind": "composition", "text": _text(made), "source": made.source, "settings": settings}
    if not exists(name):
        raise RecipeError("", f"no operator or composition {name!r}", unknown(name, [*compositions(), *operators()]))
    operator = find(name)
    settings = [_setting(setting) for setting in operator.settings.values()]
    text = inspect.getdoc(operator.apply) or ""
    base = {"needs_base": operator.needs_base, "takes_base": operator.takes_base}
    takes = {"takes": operator.roles, **base, "models": operator.takes}
    return {"name": name, "kind": "operator", "text": text, "source": operator.source, "settings": settings, **takes}


def _text(made: Composition) -> str:
    return inspect.getdoc(made.compose) or ""


def _setting(setting: Setting) -> dict[str, str]:
    kind = f"{setting.type_name}; for each model" if setting.per_model else setting.type_name
    default = "" if setting.required else str(setting.default)
    return {"name": setting.name, "type": kind, "default": default, "description": setting.description}


def _key(name: str, annotation: Any, default: Any) -> dict[str, str]:
    description = ""
    if typing.get_origin(annotation) is Annotated:
        fields = typing.get_args(annotation)[1:]
        description = next((f.description for f in reversed(fields) if isinstance(f, FieldInfo) and f.description), "")
    shown = "" if default is inspect.Parameter.empty or default is None else str(default)
    return {"name": name, "type": _type(annotation), "default": shown, "description": description}


def _type(annotation: Any) -> str:
    """Write a type for people: `model`, `int`, `{bottom, top}`, `language | task`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _NAMES:
        return _NAMES[annotation]
    if hasattr(annotation, "recipe_form"):
        return "{" + ", ".join(annotation.recipe_form.model_fields) + ", settings of the operator}"
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type(one) for one in arguments if one is not type(None))
    if origin is not None and issubclass(origin, Mapping):
        return f"{{{_type(arguments[0])}: {_type(arguments[1])}}}"
    if origin in (Sequence, list):
        return f"[{_type(arguments[0])}, …]"
    if dataclasses.is_dataclass(annotation):
        return "{" + ", ".join(field.name for field in dataclasses.fields(annotation)) + "}"
    return str(getattr(annotation, "__name__", annotation))
