"""A mergekit YAML, or a bundle of them, as a recipe of ours: every key read, or refused with its line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from portmanteau.merge import PortmanteauError
from portmanteau.merge.dtypes import parse
from portmanteau.merge.errors import Mistake

from ..recipe.lined import Lined, document_of
from ..recipe.lines import Document, KeyPath
from .merge import Merge
from .references import References
from .tokenizer import Tokenizer


def translated(document: Document) -> tuple[Document | None, list[Mistake]]:
    """Write a mergekit YAML as a recipe of ours, whose lines are those of the file.

    Gives the recipe, None where what is wrong leaves nothing to go on with, and every mistake that the text shows.
    """
    reader = _Reader(document)
    value = reader.recipe()
    if reader.broken:
        return None, reader.mistakes
    return replace(document_of(value, document), notes=tuple(reader.notes)), reader.mistakes


class _Reader:
    """Reads all documents of a file, and collects what is wrong with them."""

    def __init__(self, document: Document) -> None:
        self.mistakes: list[Mistake] = []
        self.notes: list[str] = []
        self.broken = False
        self._document = document
        values = document.value if document.bundle else [document.value]
        self._values = [(value, (i,) if document.bundle else ()) for i, value in enumerate(values)]
        names = tuple(value["name"] for value in values if isinstance(value, dict) and "name" in value)
        folder = Path(document.file).parent
        self._references = References(folder, self.wrong, names if document.bundle else ())

    def wrong(self, path: KeyPath, what: str, hint: str = "", *, broken: bool = False) -> None:
        """Note a mistake; `broken`: something is missing now in the recipe that would be written."""
        self.mistakes.append(Mistake(self._document.where(path), what, hint))
        self.broken |= broken

    def note(self, path: KeyPath, what: str) -> None:
        """Note what a user should know, and need not change."""
        self.notes.append(f"line {self._document.line(path)}: {what}")

    def recipe(self) -> dict[str, Any]:
        """Write the recipe."""
        steps: dict[str, Any] = {}
        results: list[tuple[dict[str, Any], KeyPath]] = []
        output: dict[str, Any] = {}
        for value, path in self._values:
            if not isinstance(value, dict):
                self.wrong(path, "is no mergekit document: a mapping with the key `merge_method`", broken=True)
                continue
            name = value.get("name") if self._document.bundle else None
            prefix = "" if name is None else f"{name}-"
            merged = Merge(value, path, self._references, self.wrong, self.note, prefix).result(steps)
            if name is None:
                results.append((merged, (*path, "merge_method")))
                output = self._output(value, path)
            elif not isinstance(name, str) or name in steps:
                self.wrong((*path, "name"), f"{name!r} is no name of its own", broken=True)
            else:
                steps[name] = Lined(merged, (*path, "merge_method"))
                self._refuse_output(value, path)
                self._note_dtypes(value, path, name)
        if len(results) != 1:
            what = "no document is without `name:`" if not results else "several documents are without `name:`"
            self.wrong(results[1][1] if results else (), what, "the one without it is the result", broken=True)
        found = {"models": self._references.models, "steps": {**self._references.steps, **steps}}
        merge = {"merge": Lined(results[0][0], results[0][1])} if results else {}
        return {**{key: one for key, one in found.items() if one}, **merge, **({"output": output} if output else {})}

    def _output(self, value: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
        """Write what the result is to be like on disk."""
        output: dict[str, Any] = {}
        key = "out_dtype" if value.get("out_dtype") is not None else "dtype"
        if value.get(key) is not None:
            output["dtype"] = Lined(value[key], (*path, key))
        tokenizer = Tokenizer(value, path, self._references, self.wrong).result()
        if tokenizer is not None:
            output["tokenizer"] = tokenizer
        if value.get("chat_template") is not None:
            output["chat_template"] = Lined(value["chat_template"], (*path, "chat_template"))
        return output

    def _refuse_output(self, value: Mapping[str, Any], path: KeyPath) -> None:
        """Refuse what says how a stage is written: it never is."""
        for key in ("tokenizer_source", "tokenizer", "chat_template"):
            if value.get(key) is not None:
                self.wrong((*path, key), f"{key} of a stage: only the last document's result is written", "move it")

    def _note_dtypes(self, value: Mapping[str, Any], path: KeyPath, name: str) -> None:
        """Say that a stage is not rounded, whatever its dtype: it is computed in float32 and never written."""
        for key in ("dtype", "out_dtype"):
            if value.get(key) is None:
                continue
            try:
                parse(str(value[key]))
            except PortmanteauError as error:
                self.wrong((*path, key), f"{key} is {value[key]!r}: {error.mistakes[0].what}", error.mistakes[0].hint)
                continue
            if value[key] != "float32":
                where = f"line {self._document.line((*path, key))}"
                self.notes.append(
                    f"{where}: {key}: {value[key]} of the stage {name!r} has no effect: no stage is rounded"
                )
