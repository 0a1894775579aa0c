"""Which row each token gets in each model: its own, one that a rule names, or what the other models have."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from portmanteau.merge import Checkpoint
from portmanteau.merge.errors import Mistake, nearest
from portmanteau.merge.rows import FILL, MEAN, ZERO, RowMap

from .target import Vocabulary
from .words import Words

Having = tuple[int, ...]  # numbers of owners
Map = tuple[RowMap, list[int]]  # and the numbers of the owners whose tables it reads


@dataclass(frozen=True)
class RowOf:
    """The row of a token of a model: named by the token, or by its id."""

    model: Checkpoint
    token: str | None = None
    id: int | None = None


@dataclass(frozen=True)
class TokenRule:
    """Which row a token gets.

    Attributes:
        source: a model, for its row of the same token; a row of another token; zero; None for what it would get anyway.
        force: also in models that have the token.

    """

    source: Checkpoint | RowOf | Literal["zero"] | None = None
    force: bool = False


@dataclass(frozen=True, eq=False)
class Owner:
    """A model as an owner of rows: its tokens, its rows, and for every row of the result its own, or −1."""

    model: Checkpoint
    words: Words
    rows: int
    owned: array[int]
    merged: bool  # false: only rules name it


def owned_rows(words: Words | None, rows: int, vocabulary: Vocabulary) -> array[int]:
    """Give, for every row of a vocabulary, the row that a model has for it, or −1.

    A row that stands for no token is one with the same number that stands for none in the model. Without words, rows
    are taken to stand for what they stand for in the vocabulary.
    """
    if words is None:
        return array("i", [i if i < rows else -1 for i in range(vocabulary.rows)])
    result = array("i", [-1]) * vocabulary.rows
    taken, named = set(words.ids.values()), set(vocabulary.ids.values())
    for i in range(min(rows, vocabulary.rows)):
        if i not in taken and i not in named:
            result[i] = i
    for word, i in vocabulary.ids.items():
        own = words.ids.get(word, -1)
        if own < rows:
            result[i] = own
    return result


@dataclass(frozen=True, eq=False)
class Fallback:
    """What every row is where a model has none of its own, and which rows are so even where it has one."""

    source: array[int]
    row: array[int]
    forced: frozenset[int]
    averaged: Sequence[int]  # the numbers of the owners whose rows a MEAN counts


@dataclass(frozen=True, eq=False)
class RowMaps:
    """The row maps of models of one vocabulary.

    Attributes:
        owners: the models that own rows, and those that rules name.
        base: the number of the one whose rows come first, if any.
        rules: token → where its row comes from.
        vocabulary: what the rows stand for.

    """

    owners: Sequence[Owner]
    base: int | None
    rules: Mapping[str, TokenRule]
    vocabulary: Vocabulary
    _fallbacks: dict[Having, Fallback] = field(default_factory=dict, init=False, repr=False)
    _maps: dict[tuple[int, Having], Map | None] = field(default_factory=dict, init=False, repr=False)

    def mistakes(self) -> Iterator[Mistake]:
        """Say which rules name what is not there."""
        for word, rule in self.rules.items():
            where = f"tokens.{word}"
            if rule.source is None and rule.force:
                yield Mistake(where, "force needs a source", "say whose row it is")
            elif isinstance(rule.source, RowOf):
                yield from self._of_row(rule.source, where)
            elif isinstance(rule.source, Checkpoint) and word not in (own := self._owner(rule.source)[1].words).ids:
                yield Mistake(where, f"{rule.source.label} has no token {word!r}", _known(word, own))

    def _of_row(self, row: RowOf, where: str) -> Iterator[Mistake]:
        owner = self._owner(row.model)[1]
        if row.token is not None and row.token not in owner.words.ids:
            yield Mistake(where, f"{row.model.label} has no token {row.token!r}", _known(row.token, owner.words))
        elif row.id is not None and not 0 <= row.id < owner.rows:
            yield Mistake(where, f"{row.model.label} has no row {row.id}", f"it has {owner.rows}")

    def _owner(self, model: Checkpoint) -> tuple[int, Owner]:
        return next((i, owner) for i, owner in enumerate(self.owners) if owner.model is model)

    def of(self, number: int, having: Having) -> Map | None:
        """Give the map of one model's rows, where only the owners of these numbers have the tensor.

        None where every row stays where it is.
        """
        if having not in self._fallbacks:
            self._fallbacks[having] = self._fallback(having)
        if (number, having) not in self._maps:
            self._maps[number, having] = self._map(number, self._fallbacks[having])
        return self._maps[number, having]

    def _fallback(self, having: Having) -> Fallback:
        """Say what missing rows are, where only the owners of these numbers have the tensor."""
        merged = [i for i in having if self.owners[i].merged]
        named = set(self.vocabulary.ids.values())
        source, row = array("i", [0]) * self.vocabulary.rows, array("i", [0]) * self.vocabulary.rows
        for i in range(self.vocabulary.rows):
            found = [k for k in merged if self.owners[k].owned[i] >= 0]
            if not found:
                source[i] = ZERO if i in named else FILL
            elif len(found) == 1 or self.base in found:
                source[i] = found[0] if len(found) == 1 or self.base is None else self.base
                row[i] = self.owners[source[i]].owned[i]
            else:
                source[i] = MEAN
        forced = set()
        for word, rule in self.rules.items():
            i = self.vocabulary.ids[word]
            if rule.source is not None:
                source[i], row[i] = self._ruled(rule.source, i)
            if rule.force:
                forced.add(i)
        return Fallback(source, row, frozenset(forced), merged if MEAN in source else ())

    def _ruled(self, source: Checkpoint | RowOf | str, i: int) -> tuple[int, int]:
        """Give table and row of a rule."""
        if isinstance(source, str):
            return ZERO, 0
        number, owner = self._owner(source.model if isinstance(source, RowOf) else source)
        if isinstance(source, Checkpoint):
            return number, owner.owned[i]
        return number, owner.words.ids[source.token] if source.token is not None else source.id or 0

    def _map(self, number: int, fallback: Fallback) -> Map | None:
        owned = self.owners[number].owned
        source, row = array("i", fallback.source), array("i", fallback.row)
        for i, own in enumerate(owned):
            if own >= 0 and i not in fallback.forced:
                source[i], row[i] = number, own
        own_rows = self.owners[number].rows
        if len(source) == own_rows and all(k == number and row[i] == i for i, k in enumerate(source)):
            return None
        averaged = fallback.averaged if MEAN in source else ()
        read = [i for i in range(len(self.owners)) if i in source or i in averaged]
        renumbered = array("i", [read.index(k) if k >= 0 else k for k in source])
        rows = [self.owners[i].owned if i in averaged else _none(len(row)) for i in read] if averaged else ()
        counted = bytearray(len(source))
        for i in self.vocabulary.ids.values():
            counted[i] = 1
        return RowMap(renumbered, row, rows, bytes(counted)), read


def _none(rows: int) -> array[int]:
    return array("i", [-1]) * rows


def _known(word: str, words: Words) -> str:
    """Name the token that was probably meant."""
    close = nearest(word, words.ids) if len(words.ids) < 20_000 else ""
    return close if close.startswith("did") else ""
