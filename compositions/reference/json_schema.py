"""A JSON Schema of recipes, for editors: what completes keys, shows meanings and marks mistakes while one writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from portmanteau.merge import Operator
from portmanteau.merge.operator import Setting
from portmanteau.merge.registry import operators

from ..composition import compositions
from ..recipe.reading import Output
from ..recipe.schema import schema_of

Schema = dict[str, Any]
TITLE = "A recipe of portmanteau"
_REFERENCE = "a name from `models` or `steps`, a folder or file (relative to the recipe), or a Hub id[@revision]"
_TEXT: Schema = {"type": "string"}
_RANGE: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2}


def schema() -> Schema:
    """Make the schema of a native recipe from the declarations of all compositions and operators."""
    names = [*compositions(), *operators()]
    described: dict[str, Schema] = {name: {"$ref": f"#/$defs/{name}", "description": _summary(name)} for name in names}
    for name, key in _listed().items():
        described[name] = {
            "description": _summary(name),
            "anyOf": [{"$ref": f"#/$defs/{name}"}, {"$ref": f"#/$defs/{name}/properties/{key}"}],
        }
    body = {"type": "object", "properties": described, "minProperties": 1, "maxProperties": 1}
    keys = {
        "models": _mapping(_ref("Reference"), "names for checkpoints, to be used below"),
        "steps": _mapping(_ref("Body"), "checkpoints that are made on the way, by name; never written"),
        "merge": {**_ref("Body"), "description": "the result: one composition, or one operator over every tensor"},
        "output": {**_ref("Output"), "description": "what the result is to be like on disk"},
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": TITLE,
        "type": "object",
        "properties": keys,
        "required": ["merge"],
        "additionalProperties": False,
        "$defs": {
            "Body": {**body, "additionalProperties": False},
            **_references(),
            **_of_compositions(),
            **{name: _of_operator(operator) for name, operator in operators().items()},
            "Rule": _rule(),
            **_values(),
        },
    }


def text() -> str:
    """Write the schema as a file."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def is_ours(path: Path) -> bool:
    """Tell whether a file is this schema, perhaps of another version."""
    return path.is_file() and f'"title": "{TITLE}"' in path.read_text(encoding="utf-8", errors="replace")[:1000]


def _summary(name: str) -> str:
    return compositions()[name].summary if name in compositions() else operators()[name].summary


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _mapping(value: Schema, description: str) -> Schema:
    return {"description": description, "type": ["object", "null"], "additionalProperties": value}


def _references() -> dict[str, Schema]:
    """Write the forms of references: text, or the long form; models alone take adapters."""
    weighted = {"type": "object", "additionalProperties": {"type": "number"}}
    adapters = [_ref("AdapterReference"), _array("AdapterReference"), weighted]
    long = {"path": {**_TEXT, "description": _REFERENCE}, "revision": {"type": ["string", "null"]}}
    lora = {"description": "adapters that are folded in: one, a list, or a mapping to weights", "anyOf": adapters}
    found = {"Reference": {**long, "lora": lora}}
    found |= dict.fromkeys(("AdapterReference", "BottleneckReference", "SparseReference"), long)
    return {
        name: {"description": _REFERENCE, "anyOf": [_TEXT, _object(keys, ["path"])]} for name, keys in found.items()
    }


def _object(properties: Mapping[str, Schema], required: Iterable[str] = ()) -> Schema:
    needed = list(required)
    return {
        "type": "object",
        "properties": dict(properties),
        **({"required": needed} if needed else {}),
        "additionalProperties": False,
    }


def _of_compositions() -> dict[str, Schema]:
    """Take the schemas that check recipes, put the forms that people write in the place of what they are read to."""
    bodies = [(schema_of(name), "validation") for name in compositions()]
    _, whole = models_json_schema([*bodies, (Output, "validation")])  # type: ignore[list-item]
    found = {name: _tidied(one) for name, one in whole["$defs"].items()}
    found["Output"]["properties"]["shard_size"]["type"] = ["integer", "string"]
    found["SliceBody"] = _slice()
    for name, key in _listed().items():
        listed = found[name]["properties"][key]
        if listed.get("items") == _ref("Reference"):  # one reference, or a pattern, may stand for a list
            meaning = {"description": listed.pop("description")}
            found[name]["properties"][key] = {**meaning, "anyOf": [_ref("Reference"), listed]}
    unwanted = {"_RuleBody", *_references()}
    return {name: one for name, one in found.items() if name not in unwanted}


def _tidied(value: Any) -> Any:
    """Leave out titles, which are only the names again, and defaults that are nothing."""
    if isinstance(value, list):
        return [_tidied(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {
        key: {name: _tidied(one) for name, one in inner.items()} if key == "properties" else _tidied(inner)
        for key, inner in value.items()
        if not (key == "title" or (key == "default" and inner is None))
    }


def _listed() -> dict[str, str]:
    """Give the first key of the compositions that may be written as a list alone."""
    firsts = {name: next(iter(one.parameters)) for name, one in compositions().items()}
    return {name: key for name, key in firsts.items() if key in ("models", "parts") and name != "assemble"}


def _of_operator(operator: Operator) -> Schema:
    """Write an operator's body: models with what is theirs, the base, settings, rules."""
    own = {one.name: _ref(_slug(one)) for one in operator.settings.values() if one.per_model}
    of_each = [{"type": "null"}, _object(own), *([own["weight"]] if "weight" in own else [])]
    models = {
        "description": "a list, or a mapping to weights or to settings of their own",
        "anyOf": [{"type": "object", "additionalProperties": {"anyOf": of_each}}, _array("Reference")],
    }
    base = {"base": {"description": "what deltas are taken from", **_ref("Reference")}} if operator.takes_base else {}
    rules = {"description": "exceptions: the first that fits a tensor holds", **_array("Rule")}
    unmatched = {"description": "tensors that not every model has", "enum": ["error", "keep", "drop"]}
    settings = {name: _setting(one) for name, one in operator.settings.items()}
    keys = {"models": models, **base, **settings, "rules": rules, "unmatched": unmatched}
    return {"description": operator.summary, **_object(keys, ["models", *(["base"] if operator.needs_base else [])])}


def _array(name: str) -> Schema:
    return {"type": "array", "items": _ref(name)}


def _setting(setting: Setting) -> Schema:
    """Write a setting: a value, a gradient over depth, choices by tensor name, or any of these for each model."""
    told = {"description": f"{setting.description} ({setting.type_name})"}
    if not setting.required:
        told["default"] = setting.default
    one = _ref(_slug(setting))
    of_each = [{"type": "object", "additionalProperties": one}] if setting.per_model else []
    return {**told, "anyOf": [one, *of_each]}


def _slug(setting: Setting) -> str:
    """Name the values that a setting takes.

    >>> from portmanteau.merge.registry import find
    >>> _slug(find("ties").settings["density"]), _slug(find("ties").settings["rescale"])
    ('float-gt-0-le-1', 'l1-none')
    """
    text = setting.type_name
    for sign, word in {"≥": "ge", "≤": "le", ">": "gt", "<": "lt"}.items():
        text = text.replace(sign, word)
    return "-".join(re.findall(r"[\w.+]+", text))


def _values() -> dict[str, Schema]:
    """Write the values of all settings: each one value, a gradient of them, or choices by tensor name."""
    found: dict[str, Schema] = {}
    for setting in (setting for operator in operators().values() for setting in operator.settings.values()):
        value = {key: one for key, one in _plain(setting).items() if key != "description"}
        gradient = {"type": "array", "items": value, "minItems": 1}
        choice = _object({"tensors": _TEXT, "value": {"anyOf": [value, gradient]}}, ["value"])
        found[_slug(setting)] = {"anyOf": [value, gradient, {"type": "array", "items": choice, "minItems": 1}]}
    return dict(sorted(found.items()))


def _plain(setting: Setting) -> Schema:
    found: Schema = _tidied(TypeAdapter(setting.annotation).json_schema())
    return found


def _rule() -> Schema:
    """Write a rule: a pattern of tensors, and what is otherwise for them."""
    tensors = {**_TEXT, "description": "a shell pattern of tensor names; | between alternatives"}
    other = {"description": "another operator for them", "enum": list(operators())}
    labels = {"description": "only these of the models", "type": "array", "items": _TEXT}
    keys = {"tensors": tensors, "operator": other, "models": labels}
    return {"type": "object", "properties": keys, "required": ["tensors"], "propertyNames": _with_settings(keys)}


def _slice() -> Schema:
    """Write a slice: layers of one model, or an operator over layers of several."""
    mapping = {"type": "object", "additionalProperties": True}
    keys = {
        "model": {"description": "the model whose layers these are", **_ref("Reference")},
        "models": {
            "description": "instead: the models that are merged",
            "anyOf": [mapping, _array("Reference")],
        },
        "layers": {
            "description": "the first layer and the one behind the last, for all models or by their names",
            "anyOf": [_RANGE, {"type": "object", "additionalProperties": _RANGE}],
        },
        "operator": {"description": "what merges the models", "enum": list(operators())},
        "base": {"description": "what deltas are taken from", **_ref("Reference")},
        "rules": {"description": "exceptions by tensor name", **_array("Rule")},
    }
    either = [{"required": ["model"]}, {"required": ["models"]}]
    return {"type": "object", "properties": keys, "oneOf": either, "propertyNames": _with_settings(keys)}


def _with_settings(keys: Iterable[str]) -> Schema:
    """Allow these keys, and the settings of all operators."""
    settings = (name for operator in operators().values() for name in operator.settings)
    return {"enum": list(dict.fromkeys([*keys, *settings]))}
