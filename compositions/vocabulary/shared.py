"""Models of several vocabularies, seen as models of one: rows re-ordered and filled in, ids in configs translated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar

import blake3

from portmanteau.merge import Checkpoint, Composed, MergeError, PortmanteauError
from portmanteau.merge.companions import GENERATION_CONFIG, Companions
from portmanteau.merge.dtypes import promote
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.node import Node
from portmanteau.merge.rows import rows_of

from .row_maps import Owner, RowMaps, RowOf, TokenRule, owned_rows
from .special_ids import translated
from .tables import Table, Tables, tables_of
from .target import Vocabulary, union, vocabulary
from .words import FILE, Words, words_of

Source = Checkpoint | Literal["union"]
T = TypeVar("T")


def with_vocabulary(
    models: Sequence[Checkpoint],
    source: Source = "union",
    *,
    base: Checkpoint | None = None,
    tokens: Mapping[str, TokenRule] | None = None,
    pad_to_multiple_of: int | None = None,
) -> tuple[Checkpoint, ...]:
    """Give the same models with one vocabulary: whatever is made of them has its tokenizer.

    A model that lacks a token gets the base's row for it, else that of the only model that has it, else the mean of
    those that have it, else zeros. Rows beyond the tokens are kept where all models have them; those that no model has
    are the mean of the model's rows. A model whose rows stay where they are keeps their bytes.

    >>> from portmanteau import merge
    >>> base = merge.open("examples/models/base")
    >>> (wider,) = with_vocabulary([base], tokens={"<swahili>": TokenRule(RowOf(base, "<s>"))})
    >>> table = "model.embed_tokens.weight"
    >>> [one.specs[table].shape for one in (base, wider)]
    [(49, 64), (50, 64)]
    >>> bool((wider[table][49] == base[table][1]).all())  # <s> has the id 1
    True

    Args:
        models: the models.
        source: whose tokenizer it is to be, or the union of all: the first model's (the base's, if there is one), and
            what the others have beside it.
        base: the model whose rows come first where another lacks them.
        tokens: token → where its row comes from; tokens that the vocabulary lacks are added to it.
        pad_to_multiple_of: the number of rows is rounded up to a multiple of this.

    Raises MergeError for models whose rows cannot be told, and rules that name what is not there.

    """
    return Shared(tuple(models), source, base, tokens or {}, pad_to_multiple_of).models


@dataclass(frozen=True, eq=False)
class Shared:
    """Models that get one vocabulary; see `with_vocabulary`."""

    given: tuple[Checkpoint, ...]
    source: Source
    base: Checkpoint | None
    rules: Mapping[str, TokenRule]
    multiple: int | None

    @cached_property
    def models(self) -> tuple[Checkpoint, ...]:
        """The models, with the vocabulary."""
        if not self.given:
            raise MergeError("models", "there are none")
        if self._equal or self._untold:
            return self.given
        self._refuse()
        return tuple(self._seen(model) for model in self.given)

    @property
    def donor(self) -> Checkpoint:
        """The model whose tokenizer it is, with the vocabulary's files."""
        return self._first if self._equal or self._untold else self._dressed[self._first][0]

    @cached_property
    def _equal(self) -> bool:
        """Tell whether there is nothing to do: all have the same tokenizer and as many rows."""
        alike = {(_digest(model.companions), self._tables[model].rows) for model in self._every}
        padded = self.multiple is None or self._tables[self._first].rows % self.multiple == 0
        known = bool(self._first.companions.tokenizer_files) and not self._first.companions.derived
        return len(alike) == 1 and padded and known and not self.rules

    @cached_property
    def _untold(self) -> bool:
        """Tell whether only files are asked for: the donor's, which do not show its tokens."""
        asked = self.rules or self.multiple
        return isinstance(self.source, Checkpoint) and self._words[self.source] is None and not asked

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of it."""
        if self._equal:
            return ()
        if self._untold:
            return (f"the files of {self._first.label} do not show its tokens: their ids are taken to be the models'",)
        told = [note for model in self.given for note in self._told(model)]
        whole = self._written[self._first]
        cut = [word for word in whole.ids if word not in self.vocabulary.ids] if whole is not None else []
        if cut:
            shown = some(map(repr, cut))
            told.append(f"{self._first.label} has no rows for {len(cut)} tokens, which are left out: {shown}")
        missing = [word for word in self.vocabulary.ids if all(word not in self._ids(model) for model in self.given)]
        missing = [word for word in missing if word not in self.rules]
        if missing:
            told.append(f"no model has rows for {len(missing)} tokens, which get zeros: {some(map(repr, missing))}")
        return tuple(told)

    def _told(self, model: Checkpoint) -> Iterator[str]:
        """Say what becomes of one model."""
        tables, words, rows = self._tables[model], self._words[model], self.vocabulary.rows
        if words is None and tables.rows:
            yield f"{model.label} has no tokenizer: its rows are taken to stand for the result's tokens"
        owned = self._maps.owners[self._every.index(model)].owned
        if tables.rows and any(own != i for i, own in enumerate(owned)):
            count = sum(1 for own in owned if own >= 0)
            yield f"{model.label}: {count} of {rows} rows are its own, in the order of the result's vocabulary"
        if words is not None and tables.rows > rows and len(words.ids) < tables.rows:
            yield f"{model.label} has {tables.rows - rows} rows more than the result: not every model is padded so far"
        for key in self._dressed[model][1]:
            yield f"{model.label}: {key} names tokens that the result lacks"
        beside = tables.beside() if self._moved(model) is not None else []
        if beside:
            yield f"{model.label}: taken for no tables of tokens, and left as they are: {some(beside)}"

    # ---- what is there

    @cached_property
    def _every(self) -> tuple[Checkpoint, ...]:
        """All models that are looked into: base and merged ones, then those that are only named."""
        named = [self.source] if isinstance(self.source, Checkpoint) else []
        for rule in self.rules.values():
            one = rule.source.model if isinstance(rule.source, RowOf) else rule.source
            named += [one] if isinstance(one, Checkpoint) else []
        first = [self.base] if self.base is not None else []
        return tuple(dict.fromkeys([*first, *self.given, *named]))

    @cached_property
    def _tables(self) -> dict[Checkpoint, Tables]:
        return dict(zip(self._every, _each(self._every, tables_of), strict=True))

    @cached_property
    def _written(self) -> dict[Checkpoint, Words | None]:
        """The tokens of each model's tokenizer."""
        known: dict[bytes, Words | None] = {}

        def words(model: Checkpoint) -> Words | None:
            digest = _digest(model.companions)
            if digest not in known or FILE in model.companions.derived:
                known[digest] = words_of(model.companions)
            return known[digest]

        return dict(zip(self._every, _each(self._every, words), strict=True))

    @cached_property
    def _words(self) -> dict[Checkpoint, Words | None]:
        """The tokens that each model has rows for."""
        rows = {model: tables.rows for model, tables in self._tables.items()}
        return {
            model: found and (found.below(rows[model]) if rows[model] else found)
            for model, found in self._written.items()
        }

    def _ids(self, model: Checkpoint) -> Mapping[str, int]:
        words = self._words[model]
        return words.ids if words is not None else self.vocabulary.ids

    @cached_property
    def _first(self) -> Checkpoint:
        """The model whose tokenizer the result's is made of."""
        if isinstance(self.source, Checkpoint):
            return self.source
        return self.base if self.base is not None else self.given[0]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary. Raises MergeError where the model that it is taken from has no tokenizer."""
        first, words = self._first, self._words[self._first]
        if words is None:
            raise MergeError("source", f"{first.label} has no tokenizer", "name a model that has one")
        rows = self._tables[first].rows
        if self.source == "union":
            others = [found for model in self._every if model is not first and (found := self._words[model])]
            words = union([words, *others])
            counts = {self._tables[model].rows for model in self.given}
            rows = counts.pop() if len(counts) == 1 else 0
        return vocabulary(words, self.rules, rows, self.multiple, first.companions)

    def _refuse(self) -> None:
        """Refuse models whose rows cannot be told, and rules that name what is not there. Raises MergeError."""
        mistakes = []
        for model in self._every:
            rows, known = self._tables[model].rows, self._words[model] is not None
            if not known and rows not in (0, self.vocabulary.rows):
                hint = "put its tokenizer.json beside it"
                mistakes.append(Mistake("", f"{model.label} has no tokenizer to tell what its rows stand for", hint))
            elif known and not rows and self._ids(model) != self.vocabulary.ids and model in self.given:
                what = f"{model.label} has another vocabulary, and no embedding is found in it"
                mistakes.append(Mistake("", what, f"its tensors: {some(model.specs)}"))
        mistakes += self._maps.mistakes()
        if mistakes:
            raise MergeError.of(mistakes)

    # ---- the models as models of the vocabulary

    @cached_property
    def _dressed(self) -> dict[Checkpoint, tuple[Checkpoint, list[str]]]:
        """Every model with the result's tokenizer and its ids in the configs, and the keys that lost a token."""
        return {model: self._dress(model) for model in self._every}

    def _dress(self, model: Checkpoint) -> tuple[Checkpoint, list[str]]:
        own, new = model.companions, self.vocabulary.tokenizer
        others = {name: path for name, path in own.files.items() if name not in own.tokenizer_files}
        found = replace(
            own,
            files={**others, **new.files},
            texts={**own.texts, **new.texts},
            derived={**own.derived, **new.derived},
        )
        lost: list[str] = []
        moved = self._moved(model)
        if moved is not None:
            if own.config is not None:
                config, lost = translated(own.config, moved, self._first.companions.config or {})
                found = replace(found, config=config)
            generation = own.json(GENERATION_CONFIG)
            if generation is not None:
                config, more = translated(generation, moved, self._first.companions.json(GENERATION_CONFIG) or {})
                text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
                found = replace(found, texts={**found.texts, GENERATION_CONFIG: text})
                lost += [f"{GENERATION_CONFIG}: {key}" for key in more]
        same = found.files == own.files and found.texts == own.texts and moved is None and not new.derived
        return (model if same else model.beside(found)), lost

    def _moved(self, model: Checkpoint) -> Callable[[int], int | None] | None:
        """Give the function from a model's ids to the result's; None where none moves."""
        words, new = self._words[model], self.vocabulary.ids
        if words is None or all(new.get(word) == i for word, i in words.ids.items()):
            return None
        names = {i: word for word, i in words.ids.items()}
        named = set(new.values())
        return lambda i: new.get(names[i]) if i in names else i if i not in named else None

    @cached_property
    def _maps(self) -> RowMaps:
        owners = []
        for model in self._every:
            words, rows = self._words[model], self._tables[model].rows
            merged = model in self.given or model is self.base
            known = words or Words(self.vocabulary.ids, {})
            owners.append(Owner(model, known, rows, owned_rows(words, rows, self.vocabulary), merged))
        base = self._every.index(self.base) if self.base is not None else None
        return RowMaps(owners, base, self.rules, self.vocabulary)

    def _seen(self, model: Checkpoint) -> Checkpoint:
        """Give a model with the vocabulary: itself, where no row moves."""
        dressed = self._dressed[model][0]
        number = self._every.index(model)
        nodes: dict[str, Node] = {}
        for table in self._tables[model].found:
            node = self._table(number, table)
            if node is not None:
                nodes[table.spec.name] = node
        if not nodes:
            return dressed
        every = {name: nodes[name] if name in nodes else dressed.node(name) for name in dressed.specs}
        return Composed(dressed.label, every, dressed.companions, dressed.notes)

    def _table(self, number: int, table: Table) -> Node | None:
        """Give a table with the vocabulary's rows; None where it stays as it is."""
        alike = {i: like for i, one in enumerate(self._every) if (like := self._tables[one].like(table))}
        alike[number] = table
        found = self._maps.of(number, tuple(sorted(alike)))
        if found is None:
            return None
        rows, read = found
        lacking = [self._every[i].label for i in read if i not in alike]
        if lacking:
            raise MergeError("tokens", f"{lacking[0]} has no tensor like {table.spec.name} of that width")
        nodes = [self._dressed[self._every[i]][0].node(alike[i].spec.name) for i in read]
        dtype = promote([table.spec.dtype, *(alike[i].spec.dtype for i in read)])
        return rows_of(table.resized(len(rows.source), dtype), rows, nodes)


def _each(models: Iterable[Checkpoint], look: Callable[[Checkpoint], T]) -> list[T]:
    """Look into every model, and report together what is wrong."""
    found: list[T] = []
    mistakes: list[Mistake] = []
    for model in models:
        try:
            found.append(look(model))
        except PortmanteauError as error:
            mistakes += error.mistakes
    if mistakes:
        raise MergeError.of(mistakes)
    return found


def _digest(companions: Companions) -> bytes:
    """Give a digest of the tokenizer's files, so that equal ones are read once."""
    found = blake3.blake3()
    for name, path in sorted(companions.tokenizer_files.items()):
        found.update(f"{name} {path.stat().st_size} ".encode()).update(path.read_bytes())
    return found.digest()
