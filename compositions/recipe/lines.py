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

KeyPath = tuple[str | int, ...]
_MOST_NODES = 100_000


class _Loader(yaml.SafeLoader):
    """Safe YAML, in which `1e-5` is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


@dataclass(frozen=True)
class Document:
    """A parsed file: its values, and the line (from 1) of every key and list item."""

    file: str
    text: str
    value: Any
    lines: Mapping[KeyPath, int]
    bundle: bool = False  # several documents: the value is their list

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
    """Read a YAML file, or a text that once stood in it. Raises RecipeError for what is not YAML, keys twice, tags."""
    try:
        text = path.read_text(encoding="utf-8") if text is None else text
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), f"cannot be read ({error})") from error
    loader = _Loader(text)
    try:
        nodes = [node for node in _documents(loader) if node.tag != "tag:yaml.org,2002:null"]
        builder = _Builder(str(path), loader)
        bundle = len(nodes) > 1
        values = [builder.build(node, (i,) if bundle else ()) for i, node in enumerate(nodes)]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}", f"not valid YAML: {error.problem or error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise RecipeError(str(path), f"not valid YAML: {error}") from error
    finally:
        loader.dispose()
    if builder.mistakes:
        raise RecipeError.of(builder.mistakes)
    return Document(str(path), text, values if bundle else values[0] if values else None, builder.lines, bundle)


def _documents(loader: _Loader) -> Iterator[yaml.Node]:
    """Go through the documents of a file, which `---` separates."""
    while loader.check_node():
        node = loader.get_node()
        assert node is not None  # there is one: it was looked
        yield node


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
            raise ValueError(f"more than {_MOST_NODES} values")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
            raise yaml.MarkedYAMLError(problem=f"tags such as {node.tag} are not read", problem_mark=node.start_mark)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
        return self._loader.construct_object(node)

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
