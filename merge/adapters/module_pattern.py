"""The patterns of PEFT configs for modules: the regular expressions that people write, matched without backtracking.

A regular expression from a stranger can keep Python's matcher busy for years. Here a pattern is followed by all the
places that it may have reached, at once, so that no text takes longer than its length times the pattern's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

_LITERAL = re.compile(r"(?:\w|\\?[.-])+")
_MOST_PATTERNS = 64  # beside names of modules
_DEEPEST = 20
_CLASS = re.compile(r"\^?[\w.-]+")
Places = set[int]
Part = Callable[[str, Places], Places]  # of a text, and where in it to begin: where the part may end


class ModulePatterns:
    """Values by patterns of module paths, looked up as peft does: the first that fits the end of a path, after a dot.

    A dot in what is otherwise a name stands for a dot.
    """

    def __init__(self, patterns: Mapping[str, Any]) -> None:
        """Read them. Raises ValueError for a pattern that is beyond those that people write."""
        self._values = list(patterns.values())
        self._names: dict[str, int] = {}
        self._patterns: list[tuple[int, Part]] = []
        for i, key in enumerate(patterns):
            if _LITERAL.fullmatch(key):
                self._names.setdefault(key.replace("\\", ""), i)
            else:
                self._patterns.append((i, _parsed(key)))
        if len(self._patterns) > _MOST_PATTERNS:
            raise ValueError(f"{len(self._patterns)} patterns; at most {_MOST_PATTERNS} are read")

    def of(self, path: str, default: Any) -> Any:
        r"""Look a module up.

        >>> ModulePatterns({"q_proj": 4, r"layers\.1\..*": 8}).of("model.layers.1.self_attn.q_proj", 2)
        4
        >>> ModulePatterns({r"layers\.(0|1)\.[^.]+\.k": 8}).of("model.layers.1.attn.k", 2)
        8
        """
        begins = {0, *(found.end() for found in re.finditer(r"\.", path))} if self._patterns else set()
        fits = [i for i, part in self._patterns if len(path) in part(path, begins)]
        parts = path.split(".") if self._names else []
        ends = (".".join(parts[i:]) for i in range(len(parts)))
        fits += [self._names[end] for end in ends if end in self._names]
        return self._values[min(fits)] if fits else default


def _parsed(key: str) -> Part:
    part, rest = _choice(key, _DEEPEST)
    if rest:
        raise ValueError(f"{key!r} is no regular expression")
    return part


def _choice(text: str, depth: int) -> tuple[Part, str]:
    """Read alternatives."""
    if depth == 0:
        raise ValueError("it is nested too deeply")
    parts = []
    while True:
        part, text = _sequence(text, depth)
        parts.append(part)
        if not text.startswith("|"):
            return lambda where, at: set().union(*(part(where, at) for part in parts)), text
        text = text[1:]


def _sequence(text: str, depth: int) -> tuple[Part, str]:
    parts: list[Part] = []
    while text and text[0] not in "|)":
        part, text = _atom(text, depth)
        if text and text[0] in "*+?":
            part, text = _repeated(part, text[0]), text[1:].removeprefix("?")
        parts.append(part)

    def follow(where: str, at: Places) -> Places:
        for part in parts:
            at = part(where, at)
        return at

    return follow, text


def _atom(text: str, depth: int) -> tuple[Part, str]:
    sign, rest = text[0], text[1:]
    if sign == "(":
        part, rest = _choice(rest.removeprefix("?:"), depth - 1)
        if not rest.startswith(")"):
            raise ValueError("a bracket is not closed")
        return part, rest[1:]
    if sign == "[":
        body, closed, rest = rest.partition("]")
        if not closed or not _CLASS.fullmatch(body):
            raise ValueError(f"the class [{body}] is not read")
        return _sign(f"[{body}]"), rest
    if sign == "\\":
        if not rest or (rest[0].isalnum() and rest[0] not in "dDwW"):
            raise ValueError(f"the escape \\{rest[:1]} is not read")
        return _sign(f"\\{rest[0]}"), rest[1:]
    if sign in "^$":
        return (lambda where, at: at & {0 if sign == "^" else len(where)}), rest
    if sign in "*+?{}":
        raise ValueError(f"the sign {sign} has nothing to repeat, or is not read")
    return _sign("." if sign == "." else re.escape(sign)), rest


def _sign(pattern: str) -> Part:
    """Match one sign by a pattern of one sign."""
    try:
        fits = re.compile(pattern).match
    except re.error as error:
        raise ValueError(str(error)) from error
    return lambda where, at: {i + 1 for i in at if fits(where, i)}


def _repeated(part: Part, sign: str) -> Part:
    def follow(where: str, at: Places) -> Places:
        reached = set() if sign == "+" else set(at)
        while at:
            at = part(where, at) - reached
            reached |= at
            if sign == "?":
                break
        return reached

    return follow
