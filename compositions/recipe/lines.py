"""YAML text to plain values, each remembered by its line; strict where YAML is lenient."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from portmanteau.merge import RecipeError
from portmanteau.merge.errors import Mistake
from portmanteau.merge.files.json_file import read_bytes, text_of
from portmanteau.merge.files.places import nearby

KeyPath = tuple[str | int, ...]
_MOST_BYTES = 96 << 10  # a recipe of 2500 slices has 90 kB; PyYAML reads some 150 kB in a second
_MOST_NODES = 20_000
_DEEPEST = 40
_HEAD = 1024  # bytes that tell whether a file is text
_LONGEST_NUMBER = 100  # signs
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_PLAIN = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null"))
_CURES = {
    "'\\t'": "YAML allows no tabs here: indent with spaces",
    "expected <block end>": "keys of one mapping begin in the same column; what belongs to a key is indented further",
    "mapping values are not allowed": "put text that has a colon in quotes; or the line above is not finished",
    "expected ',' or ": "a bracket or a comma is missing, in this line or above",
}


class _Loader(yaml.SafeLoader):
    """Safe YAML, in which `1e-5` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


@dataclass(frozen=True)
class Document:
    """A parsed file: its values, the line (from 1) of every key and list item, and what a user should know of it."""

    file: str
    text: str
    value: Any
    lines: Mapping[KeyPath, int]
    bundle: bool = False  # several documents: the value is their list
    notes: tuple[str, ...] = ()

    @property
    def is_mergekit(self) -> bool:
        """Tell whether it is a mergekit YAML, or a bundle of them."""
        values = self.value if self.bundle else [self.value]
        return any(isinstance(value, dict) and "merge_method" in value for value in values)

    def where(self, path: KeyPath) -> str:
        """Give `file:line` of a path of keys, or of the nearest thing around it; keys that may be left out may be."""
        return f"{self.file}:{self.line(path)}"

    def line(self, path: KeyPath) -> int:
        """Give the line of a path of keys, or of the nearest thing around it."""
        here: KeyPath = ()
        for key in path:
            here = (*here, key) if (*here, key) in self.lines else here
        return self.lines.get(here, 1)


def read(path: Path, text: str | None = None) -> Document:
    """Read a YAML file, or a text that stood in one.

    Raises RecipeError for what is not YAML, for keys given twice, for tags, and without bounds.
    """
    return parsed(_text(path) if text is None else text, str(path))


def _text(path: Path) -> str:
    """Read the text of a recipe. Raises RecipeError, with the cure, for what is none."""
    if not path.exists():
        raise RecipeError(str(path), "no such file", nearby(path))
    if path.is_dir():
        raise RecipeError(
            str(path), "is a folder, not a recipe", "a recipe is a YAML file; `portmanteau new` writes one"
        )
    try:
        return text_of(read_bytes(path, _MOST_BYTES))
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError) or _is_binary(path):
            hint = "a recipe is a YAML file; `portmanteau inspect` shows what a weight file holds"
            raise RecipeError(str(path), "is no text", hint) from error
        raise RecipeError(str(path), f"cannot be read ({error})") from error


def _is_binary(path: Path) -> bool:
    """Tell whether a file begins as no text does."""
    try:
        with path.open("rb") as file:
            return b"\0" in file.read(_HEAD)
    except OSError:
        return False


def parsed(text: str, file: str) -> Document:
    """Read YAML text that stands, or is to stand, in a file. Raises RecipeError as `read` does."""
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{file}:{line}", f"not valid YAML: the character {chr(error.character)!r}") from error
    try:
        nodes = [node for node in _documents(loader) if node.tag != "tag:yaml.org,2002:null"]
        builder = _Builder(file, loader)
        bundle = len(nodes) > 1
        values = [builder.build(node, (i,) if bundle else ()) for i, node in enumerate(nodes)]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = str(error.problem or error)
        hint = next((cure for sign, cure in _CURES.items() if sign in problem), "")
        raise RecipeError(f"{file}:{line}", f"not valid YAML: {problem}", hint) from error
    except RecursionError as error:
        raise RecipeError(file, "not valid YAML: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(file, f"not valid YAML: {error}") from error
    finally:
        loader.dispose()
    if builder.mistakes:
        raise RecipeError.of(builder.mistakes)
    return Document(file, text, values if bundle else values[0] if values else None, builder.lines, bundle)


def _documents(loader: _Loader) -> Iterator[yaml.Node]:
    """Go through the documents of a file, which `---` separates."""
    while loader.check_node():
        node = loader.get_node()
        assert node is not None  # there is one: it was looked
        yield node


def _wrong(node: yaml.Node, what: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)


class _Builder:
    """Turns YAML nodes into values, noting lines and keys given twice."""

    def __init__(self, file: str, loader: _Loader) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.mistakes: list[Mistake] = []
        self._file, self._loader, self._left = file, loader, _MOST_NODES

    def build(self, node: yaml.Node, path: KeyPath) -> Any:
        """Build the value of one node; `path` leads to it."""
        self._left -= 1
        if self._left < 0:
            raise _wrong(node, f"more than {_MOST_NODES} values, aliases counted each time")
        if len(path) > _DEEPEST:
            raise _wrong(node, "nested too deeply")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN or self._is_forced(node):
            raise _wrong(node, f"tags such as {node.tag} are not read")
        return self._scalar(node)

    def _is_forced(self, node: yaml.ScalarNode) -> bool:
        """Tell whether a tag makes a text a number, a truth value or nothing, which it does not look like."""
        plain = node.style is None
        looks: str = self._loader.resolve(yaml.ScalarNode, node.value, (plain, not plain))  # type: ignore[no-untyped-call]
        return node.tag not in (looks, _PLAIN[0])

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            raise _wrong(node, f"a number of {len(node.value)} signs")
        try:
            return self._loader.construct_object(node)
        except (ValueError, OverflowError) as error:  # in base 60, or of signs that make none
            raise _wrong(node, "a number that is none") from error

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            line = key_node.start_mark.line + 1
            if key in result:
                self.mistakes.append(Mistake(f"{self._file}:{line}", f"the key {key!r} is given twice"))
            self.lines[(*path, key)] = line
            result[key] = self.build(value_node, (*path, key))
        return result
