"""What a tokenizer's files say: the id of every token, and which tokens are matched in a text before it is cut."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from portmanteau.merge import CheckpointError
from portmanteau.merge.companions import Companions
from portmanteau.merge.files.json_file import TABLE_BYTES, read_json

CONFIG = "tokenizer_config.json"
FILE = "tokenizer.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
_MOST = 1 << 24  # ids below; no vocabulary is nearly as large
_WITH_VOCABULARY = ("vocab.txt", "vocab.json", "*.model", "*.spm", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Words:
    """The tokens of a tokenizer.

    Attributes:
        ids: token → id, added tokens included.
        added: the added tokens, in the order of their ids: token → what tokenizer.json says of it.

    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]

    def below(self, rows: int) -> Words:
        """Leave out the tokens that a table of so many rows has no row for."""
        if all(i < rows for i in self.ids.values()):
            return self
        ids = {word: i for word, i in self.ids.items() if i < rows}
        return Words(ids, {word: about for word, about in self.added.items() if word in ids})

    def with_added(self, tokens: Sequence[Mapping[str, Any]]) -> Words:
        """Add tokens, in this order: one that is there already keeps its id, others get the next ones."""
        ids, added = dict(self.ids), dict(self.added)
        following = max(ids.values(), default=-1) + 1
        for token in tokens:
            word = token["content"]
            if word not in ids:
                ids[word], following = following, following + 1
            added.setdefault(word, {**token, "id": ids[word]})
        return Words(MappingProxyType(ids), dict(sorted(added.items(), key=lambda one: int(one[1]["id"]))))


def plain(word: str) -> dict[str, Any]:
    """Write an added token that is like any other word."""
    return {"content": word, **_FLAGS, "normalized": True}


def special(word: str) -> dict[str, Any]:
    """Write an added token that is no text."""
    return {"content": word, **_FLAGS, "special": True}


def words_of(companions: Companions) -> Words | None:
    """Read a tokenizer; None where there is none. Raises CheckpointError for one that cannot be read."""
    found = definition(companions)
    if found is None:
        return None
    try:
        words = _words(found, companions)
        odd = next((word for word, i in words.ids.items() if type(i) is not int or not 0 <= i < _MOST), None)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(_place(companions), f"is no tokenizer ({error!r})") from error
    if odd is not None:
        raise CheckpointError(_place(companions), f"gives {odd!r} the id {words.ids[odd]!r}")
    return words


def _words(found: Mapping[str, Any], companions: Companions) -> Words:
    table = found.get("model", {}).get("vocab", {})
    ids = dict(table) if isinstance(table, Mapping) else {str(piece[0]): i for i, piece in enumerate(table)}
    own = found.get("added_tokens") or ()
    ids |= {token["content"]: token["id"] for token in own}
    words = Words(ids, {token["content"]: token for token in sorted(own, key=lambda token: int(token["id"]))})
    return words.with_added([*_told(companions, words)])


def _place(companions: Companions) -> str:
    """Name the file, or the folder, of a tokenizer."""
    path = companions.files.get(FILE) or next(iter(companions.tokenizer_files.values()))
    return str(path)


def definition(companions: Companions) -> dict[str, Any] | None:
    """Give the tokenizer as tokenizer.json has it; other kinds of files are converted by transformers."""
    if FILE in companions.derived:
        what, hint = "the tokenizer is one that is made here", "give all models to one call, or build this one first"
        raise CheckpointError(FILE, what, hint)
    if FILE in companions.files:
        return read_json(companions.files[FILE], TABLE_BYTES)
    known = [path for name, path in companions.files.items() if any(Path(name).match(one) for one in _WITH_VOCABULARY)]
    return _converted(known[0].parent) if known else None


def _converted(folder: Path) -> dict[str, Any]:
    """Let transformers convert a tokenizer."""
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
        found: dict[str, Any] = json.loads(backend.to_str())
    except Exception as error:  # whatever a converter may raise
        hint = "save it with transformers' save_pretrained, so that there is a tokenizer.json"
        raise CheckpointError(str(folder), f"the tokenizer cannot be read ({error})", hint) from error
    return found


def _told(companions: Companions, words: Words) -> Iterator[dict[str, Any]]:
    """Go through the tokens that transformers adds when it loads the files, in its order."""
    about = read_json(companions.files[CONFIG], TABLE_BYTES) if CONFIG in companions.files else {}
    decoder = about.get("added_tokens_decoder") or {}
    for _, token in sorted(decoder.items(), key=lambda one: int(one[0])):
        yield {**_FLAGS, **token}
    for value in (*(about.get(key) for key in _SPECIAL), *(one for key in _MORE for one in _listed(about.get(key)))):
        word = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(word, str) and word not in words.added:
            flags = {key: value[key] for key in _FLAGS if key in value} if isinstance(value, Mapping) else {}
            yield {**special(word), **flags, "special": True}


def _listed(value: Any) -> Sequence[Any]:
    """Give the tokens of a list, or of a mapping from names to tokens."""
    return [*value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else ()
