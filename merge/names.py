"""What tensor names say: which layer of which stack, which module, and how two spellings of one model align.

Everything is learned from the names in a checkpoint; there is no table of architectures. A *stack* is a run of
layers: names `PREFIX.<n>.REST` whose first number counts 0, 1, 2 … and whose layers have modules of their own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

_MOST_LAYERS = 10_000  # a higher number in a name counts no layers
_LAYER = re.compile(r"(?P<prefix>(?:[^.]+\.)*?[^.\d][^.]*)\.(?P<index>[0-9]{1,9})\.(?P<rest>.+)")
_ATTENTION = re.compile(r"attn|attention|self_?att|encdecatt", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|[._])ln([._\d]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of layers: the name in front of the number, and how many layers there are."""

    prefix: str
    count: int

    def __str__(self) -> str:
        """The prefix, as messages show it."""
        return self.prefix


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: its stack, its layer in that stack, and its name inside the layer."""

    stack: Stack
    layer: int
    inner: str

    @property
    def depth(self) -> float:
        """Position between 0 (first layer) and 1 (last layer). A stack of one layer is all end."""
        return self.layer / (self.stack.count - 1) if self.stack.count > 1 else 1.0


class Layers:
    """The stacks of one checkpoint, and the place of each of its tensors."""

    def __init__(self, names: Iterable[str]) -> None:
        """Learn the stacks from the names."""
        self._found = {name: match for name in names if (match := _LAYER.fullmatch(name))}
        indices: dict[str, set[int]] = {}
        inside: dict[str, set[int]] = {}
        for match in self._found.values():
            indices.setdefault(match["prefix"], set()).add(int(match["index"]))
            if "." in match["rest"]:  # a layer holds modules; `classifier.0.weight` is a lone module
                inside.setdefault(match["prefix"], set()).add(int(match["index"]))
        runs = [Stack(p, len(ns)) for p, ns in inside.items() if ns == set(range(len(ns))) and ns == indices[p]]
        deep = [stack for stack in runs if stack.count > 1]
        self.stacks: tuple[Stack, ...] = tuple(deep or runs)
        self._by_prefix = {stack.prefix: stack for stack in self.stacks}

    def place(self, name: str) -> Place | None:
        """Give the tensor's place, or None for one outside the layers (embeddings, final norm, heads)."""
        match = self._found.get(name)
        stack = self._by_prefix.get(match["prefix"]) if match else None
        return Place(stack, int(match["index"]), match["rest"]) if match and stack else None

    def by_stack(self, names: Iterable[str]) -> dict[Stack | None, list[str]]:
        """Gather names by the stack in which they lie; None: outside the layers."""
        found: dict[Stack | None, list[str]] = {}
        for name in names:
            place = self.place(name)
            found.setdefault(place.stack if place else None, []).append(name)
        return found

    def find(self, word: str) -> Stack | None:
        """Find a stack by its prefix or by a part of it that no other stack has: `encoder` for `encoder.block`."""
        parts = word.split(".")
        hits = [s for s in self.stacks if s.prefix == word or _contains(s.prefix.split("."), parts)]
        return hits[0] if len(hits) == 1 else self._by_prefix.get(word)


def layers_up_to(names: Iterable[str], count: int | None = None) -> Layers:
    """Learn the stacks of a whole model from some of its names: layers up to the highest named, or so many.

    >>> layers_up_to(["h.1.attn.weight", "h.3.attn.weight"]).stacks
    (Stack(prefix='h', count=4),)
    """
    matched = {name: _LAYER.fullmatch(name) for name in names}
    found = [match for match in matched.values() if match]
    highest: dict[str, int] = {}
    for match in found:
        highest[match["prefix"]] = max(highest.get(match["prefix"], 0), int(match["index"]) + 1)
    counts = {prefix: max(deep, count or 0) for prefix, deep in highest.items() if deep <= _MOST_LAYERS}
    found = [match for match in found if match["prefix"] in counts]
    every = [f"{m['prefix']}.{i}.{m['rest']}" for m in found for i in range(counts[m["prefix"]])]
    return Layers([*every, *(name for name, match in matched.items() if not match)])


def _contains(components: list[str], part: list[str]) -> bool:
    """Tell whether the components hold the part as a run."""
    return any(components[i : i + len(part)] == part for i in range(len(components) - len(part) + 1))


def module(inner: str) -> str:
    """Tell which module of its layer a tensor belongs to: `attention`, `mlp` or `norm`.

    >>> module("self_attn.q_proj.weight"), module("mlp.experts.3.w1.weight"), module("input_layernorm.weight")
    ('attention', 'mlp', 'norm')
    >>> module("attention.output.LayerNorm.weight"), module("output.dense.weight")
    ('norm', 'mlp')
    """
    if _NORM.search(inner):
        return "norm"
    return "attention" if _ATTENTION.search(inner) else "mlp"


@lru_cache(maxsize=4096)
def _alternatives(pattern: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in pattern.split("|"))


def matches(pattern: str, name: str) -> bool:
    """Tell whether a shell pattern fits a tensor name; `|` separates alternatives.

    >>> matches("*norm*|lm_head.*", "model.norm.weight")
    True
    """
    return any(fnmatchcase(name, part) for part in _alternatives(pattern))


@dataclass(frozen=True, slots=True)
class Alignment:
    """How one checkpoint's names become another's: the prefix put in front or taken away, and the renamed names."""

    renamed: Mapping[str, str]  # this checkpoint's name → the reference's name
    added: str = ""
    removed: str = ""

    def note(self, label: str, reference: str) -> str:
        """Say what was done to the names of a checkpoint, as the plan notes it."""
        return f"{label}: {len(self.renamed)} tensors renamed to those of {reference}: {self}"

    def __str__(self) -> str:
        """What was done to the names."""
        return f"prefix {self.added!r} added" if self.added else f"prefix {self.removed!r} removed"


def align(names: Iterable[str], reference: Iterable[str]) -> Alignment | None:
    """Find the prefix that brings most names onto the reference's; None where they fit as they are, or two would do.

    `bert.encoder.layer.0…` and `encoder.layer.0…`, `module.` and `_orig_mod.` of wrapped models are such pairs.
    """
    own, wanted = list(names), dict.fromkeys(reference)
    taken = set(own)
    least = len(own) // 2 + 1  # so many names a prefix must bring together
    candidates = [(prefix, "") for prefix in _prefixes(wanted, least)]
    candidates += [("", prefix) for prefix in _prefixes(own, least)]
    best: list[Alignment] = []  # more than one: they rename as many, and nothing says which is meant
    for added, removed in candidates:
        renamed = {
            name: target
            for name in own
            if name.startswith(removed) and name not in wanted
            if (target := added + name.removeprefix(removed)) in wanted and target not in taken
        }
        if 2 * len(renamed) > len(own) and (not best or len(renamed) >= len(best[0].renamed)):
            found = Alignment(renamed, added, removed)
            best = [*best, found] if best and len(renamed) == len(best[0].renamed) else [found]
    return best[0] if len(best) == 1 else None


def _prefixes(names: Iterable[str], least: int) -> list[str]:
    """Give the one- and two-part prefixes that so many names have, the commonest first."""
    count: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        count.update(".".join(parts[:n]) + "." for n in (1, 2) if len(parts) > n)
    return [prefix for prefix, times in count.most_common() if times >= least]
