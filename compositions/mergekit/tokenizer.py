"""mergekit's `tokenizer` and `tokenizer_source` as the key `tokenizer` of our output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from portmanteau.merge.errors import nearest

from ..recipe.lined import Lined
from ..recipe.lines import KeyPath
from .references import References

_KEYS = ("source", "tokens", "pad_to_multiple_of")
_RULE = ("source", "force")
_KINDS: Mapping[str, tuple[str, ...]] = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}


class Tokenizer:
    """Reads whose tokenizer one document asks for."""

    def __init__(
        self, value: Mapping[str, Any], path: KeyPath, references: References, wrong: Callable[..., None]
    ) -> None:
        """Read the keys of a document that stands at `path`."""
        self._value, self._path, self._references, self._wrong = value, path, references, wrong

    def result(self) -> Any:
        """Write our key; None where nothing is asked for, or nothing is left of it."""
        given, source = self._value.get("tokenizer"), self._value.get("tokenizer_source")
        here: KeyPath = (*self._path, "tokenizer")
        if given is None:
            at = (*self._path, "tokenizer_source")
            return Lined(self._asked(source, at), at) if source is not None else None
        if source is not None:
            self._wrong(here, "tokenizer and tokenizer_source are both given", "leave out tokenizer_source")
        if not isinstance(given, Mapping):
            self._wrong(here, "is no mapping with the key `source`")
            return None
        self._unknown(given, _KEYS, here)
        asked = self._asked(given.get("source", "union"), (*here, "source"))
        if given.get("tokens"):
            asked["tokens"] = self._tokens(given["tokens"], (*here, "tokens"))
        if given.get("pad_to_multiple_of") is not None:
            asked["pad_to_multiple_of"] = Lined(given["pad_to_multiple_of"], (*here, "pad_to_multiple_of"))
        return Lined(asked, here)

    def _asked(self, source: Any, path: KeyPath) -> dict[str, Any]:
        """Write the source, and the base, whose rows come first."""
        base = self._value.get("base_model")
        label = self._references.label(base, (*self._path, "base_model")) if base is not None else None
        if source == "base":
            if base is None:
                self._wrong(path, "the tokenizer of the base is asked for, and there is no base_model")
            found = label
        else:
            found = source if source == "union" else self._references.label(source, path)
        asked = {"source": Lined(found, path)} if found is not None else {}
        return {**asked, "base": Lined(label, (*self._path, "base_model"))} if label is not None else asked

    def _tokens(self, value: Any, path: KeyPath) -> dict[str, Any]:
        """Write the rule of each token."""
        if not isinstance(value, Mapping):
            self._wrong(path, "is no mapping from tokens to where their rows come from")
            return {}
        return {token: Lined(self._rule(rule, (*path, token)), (*path, token)) for token, rule in value.items()}

    def _rule(self, value: Any, path: KeyPath) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            self._wrong(path, "is no mapping with the keys `source` and `force`")
            return {}
        self._unknown(value, _RULE, path)
        rule: dict[str, Any] = {}
        if value.get("source") is not None:
            rule["source"] = Lined(self._row(value["source"], (*path, "source")), (*path, "source"))
        if value.get("force"):
            rule["force"] = Lined(value["force"], (*path, "force"))
        return rule

    def _row(self, value: Any, path: KeyPath) -> Any:
        """Write a model, a row of it, or zero."""
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if kind is None:
            return self._references.label(value, path)
        if kind not in _KINDS:
            self._wrong((*path, "kind"), f"unknown kind {kind!r}", nearest(str(kind), _KINDS))
            return None
        self._unknown(value, _KINDS[kind], path)
        if kind == "zero":
            return "zero"
        if (value.get("token") is None) == (value.get("token_id") is None):
            self._wrong(path, "a model_token is named by one of token and token_id")
            return None
        row = {"model": self._references.label(value.get("model"), (*path, "model"))}
        name, key = ("token", "token") if value.get("token") is not None else ("id", "token_id")
        return {**row, name: Lined(value[key], (*path, key))}

    def _unknown(self, value: Mapping[str, Any], known: tuple[str, ...], path: KeyPath) -> None:
        for key in value:
            if key not in known:
                self._wrong((*path, key), f"unknown key {key!r}", nearest(key, known))
