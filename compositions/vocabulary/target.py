"""The vocabulary that a result is to have: one model's, or the union of several, and the files that say it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portmanteau.merge import CheckpointError
from portmanteau.merge.companions import Companions
from portmanteau.merge.files.json_file import TABLE_BYTES, read_json

from .words import CONFIG, FILE, Words, definition, plain, words_of

_BESIDE = ("special_tokens_map.json", "chat_template.*", "additional_chat_templates/*", CONFIG, FILE)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a result, and how its tokenizer is written.

    Attributes:
        words: its tokens.
        rows: the rows of its tables: at least one for every token.
        tokenizer: the files of its tokenizer.

    """

    words: Words
    rows: int
    tokenizer: Companions = field(repr=False)

    @property
    def ids(self) -> Mapping[str, int]:
        """Token → id."""
        return self.words.ids


def union(words: Sequence[Words]) -> Words:
    """Put vocabularies together: the first one's ids, then what the others add, in their order and by their ids.

    As in mergekit 0.1.5, what the first lacks is matched in a text before it is cut into tokens.
    """
    first, others = words[0], words[1:]
    added = {word: token for one in words for word, token in one.added.items()}
    for one in reversed(words):  # of several, what the first says of a token
        added |= one.added
    new: dict[str, Mapping[str, Any]] = {}
    for one in others:
        for word, _ in sorted(one.ids.items(), key=lambda item: item[1]):
            if word not in first.ids and word not in added:
                new.setdefault(word, plain(word))
    ordered = dict.fromkeys(word for one in words for word in one.added)
    return first.with_added([*new.values(), *(added[word] for word in ordered)])


def vocabulary(words: Words, asked: Iterable[str], rows: int, multiple: int | None, donor: Companions) -> Vocabulary:
    """Make the vocabulary of a result.

    Args:
        words: its tokens.
        asked: tokens that it is to have beside these.
        rows: the rows that its tables have at least.
        multiple: its rows are a multiple of this.
        donor: the files of the tokenizer that has most of it; they are kept as they are where they say all of it.

    """
    words = words.with_added([plain(word) for word in asked if word not in words.ids])
    rows = max([rows, *(i + 1 for i in words.ids.values())])
    rows = -(-rows // multiple) * multiple if multiple else rows
    return Vocabulary(words, rows, _files(words, donor))


def _files(words: Words, donor: Companions) -> Companions:
    """Say how the tokenizer is written: the donor's files, or its tokenizer.json with other tokens."""
    files, own = donor.tokenizer_files, words_of(donor)
    if own is not None and own.ids == words.ids and own.added.keys() == words.added.keys():
        return Companions(files=files)
    kept = {name: path for name, path in files.items() if any(Path(name).match(one) for one in _BESIDE)}
    about = read_json(files[CONFIG], TABLE_BYTES) if CONFIG in files else {"tokenizer_class": "PreTrainedTokenizerFast"}
    if "added_tokens_decoder" in about:
        told = {str(one["id"]): {k: v for k, v in one.items() if k != "id"} for one in words.added.values()}
        about = {**about, "added_tokens_decoder": told}
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    return Companions(files=kept, texts={CONFIG: text}, derived={FILE: _Writer(words, donor)})


@dataclass(frozen=True)
class _Writer:
    """Writes the tokenizer.json of a donor with other tokens."""

    words: Words
    donor: Companions

    def __call__(self, path: Path) -> None:
        """Write it, and make sure that it gives the planned ids. Raises CheckpointError where it does not."""
        from tokenizers import Tokenizer

        found = definition(self.donor)
        assert found is not None  # its words were read
        found["model"] = _cut(found["model"], self.words)
        found["added_tokens"] = [*self.words.added.values()]
        path.write_text(json.dumps(found, ensure_ascii=False, indent=2), encoding="utf-8")
        made = Tokenizer.from_file(str(path)).get_vocab()
        wrong = [word for word, i in self.words.ids.items() if made.get(word) != i]
        if wrong or len(made) != len(self.words.ids):
            what = f"the tokenizer made of it gives other ids than were planned, first to {wrong[0]!r}"
            raise CheckpointError(str(path), what, "its ids have gaps: take the tokenizer of one model as it is")


def _cut(model: Mapping[str, Any], words: Words) -> dict[str, Any]:
    """Leave the words out of a tokenizer's model that are not meant, and what is merged with them."""
    table = model.get("vocab", {})
    if not isinstance(table, Mapping):  # a list of pieces, whose places are their ids
        return {**model, "vocab": [piece for piece in table if piece[0] in words.ids]}
    if all(word in words.ids for word in table):
        return dict(model)
    result = {**model, "vocab": {word: i for word, i in table.items() if word in words.ids}}
    if "merges" in model:
        pairs = [(merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        kept = [merge for merge, (one, two) in pairs if {one, two, one + two} <= words.ids.keys()]
        result["merges"] = kept
    return result
