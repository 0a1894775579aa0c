"""A recipe's value as YAML text: short lists and mappings on one line, as people write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

_WIDTH = 100


class _Dumper(yaml.SafeDumper):
    """Block style, but for what is short and holds only plain values."""


def written(value: Any) -> str:
    """Write a recipe.

    >>> print(written({"merge": {"linear": {"models": {"a": 0.5, "b": [0.0, 1.0]}}}}), end="")
    merge:
      linear:
        models: {a: 0.5, b: [0.0, 1.0]}
    """
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _is_short(value: Any) -> bool:
    """Tell whether a value is to stand on one line."""
    return _depth(value) <= 2 and len(str(value)) <= _WIDTH


def _depth(value: Any) -> int:
    """Count how deep lists and mappings are nested."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _mapping(dumper: _Dumper, value: dict[str, Any]) -> yaml.Node:
    is_root = not dumper.represented_objects
    return dumper.represent_mapping("tag:yaml.org,2002:map", value, flow_style=_is_short(value) and not is_root)


def _sequence(dumper: _Dumper, value: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=_is_short(value))


def _text(dumper: _Dumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(dict, _mapping)
_Dumper.add_representer(list, _sequence)
_Dumper.add_representer(str, _text)
