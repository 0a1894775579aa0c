"""The ids of special tokens in configs, as those of another vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Moved = Callable[[int], int | None]  # the id in the other vocabulary; None where the token is not in it
_KEYS = re.compile(r".*_token_(id|ids|index)|suppress_tokens|begin_suppress_tokens|bad_words_ids|force_words_ids")


def translated(config: Mapping[str, Any], moved: Moved, others: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Translate the ids in a config, and in the configs of parts inside it.

    A token that the other vocabulary lacks is left out of a list; alone, it gets what `others`, the config that goes
    with that vocabulary, has in its place, or null. Gives the config, and the keys that lost a token.
    """
    result: dict[str, Any] = {}
    lost: list[str] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith(("_config", "encoder", "decoder")):
            inner = others.get(key)
            result[key], inside = translated(value, moved, inner if isinstance(inner, Mapping) else {})
            lost += [f"{key}.{one}" for one in inside]
        elif _KEYS.fullmatch(key) and isinstance(value, int | list) and not isinstance(value, bool):
            result[key] = _one(value, moved)
            if _count(result[key]) < _count(value):
                lost.append(key)
                result[key] = result[key] or others.get(key)
        else:
            result[key] = value
    return result, lost


def _one(value: Any, moved: Moved) -> Any:
    if isinstance(value, list):
        return [found for one in value if (found := _one(one, moved)) is not None]
    return moved(value) if isinstance(value, int) and value >= 0 else value


def _count(value: Any) -> int:
    """Count the ids in a value."""
    return sum(map(_count, value)) if isinstance(value, list) else int(value is not None)
