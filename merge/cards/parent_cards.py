"""What the model cards of parents say of licence and task: front matter that strangers wrote, read with care."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..files.hub import CARD
from ..node import Store

_MOST = 64 << 10  # bytes of a card that are looked at
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_WORD = re.compile(r"[\w.+-]{1,100}")  # what a licence or a task is called on the Hub
_LINK = re.compile(r"https?://[\w.~:/?#@!$&'()*+,;=%-]{1,500}|LICENSE[\w.-]{0,50}")


@dataclass(frozen=True)
class ParentCard:
    """What a parent's card says; "" where it says nothing.

    Attributes:
        label: what the parent is called.
        license: its licence, as the Hub calls it.
        license_name: the name of a licence that is called `other`.
        license_link: where that licence stands.
        pipeline_tag: the task that it is for.

    """

    label: str
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    pipeline_tag: str = ""

    @property
    def licence(self) -> tuple[str, str, str]:
        """All that makes its licence the same as another's."""
        return self.license, self.license_name, self.license_link


def read_cards(parents: Iterable[Store]) -> tuple[ParentCard, ...]:
    """Read the cards that stand beside the weights of parents; a parent from memory has none."""
    return tuple(_read(one.label, one.files[0].path.parent) for one in parents if one.files)


def _read(label: str, folder: Path) -> ParentCard:
    """Read one card: its first bytes, plain values only, nothing kept that does not look like what it should be."""
    try:
        with (folder / CARD).open("rb") as file:
            text = file.read(_MOST).decode("utf-8", errors="replace")
    except OSError:
        return ParentCard(label)
    front = _FRONT.match(text)
    try:
        found = _values(front[1]) if front else {}
    except (yaml.YAMLError, RecursionError, ValueError):
        return ParentCard(label)
    words = {key: _matching(found.get(key), _WORD) for key in ("license", "license_name", "pipeline_tag")}
    return ParentCard(label, license_link=_matching(found.get("license_link"), _LINK), **words)


def _values(text: str) -> dict[str, Any]:
    """Read the top of a YAML mapping: only keys and plain texts are made, so that nothing in it can grow."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return {key.value: one.value for key, one in pairs if isinstance(key, yaml.ScalarNode) and _is_text(one)}


def _is_text(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode)


def _matching(value: Any, pattern: re.Pattern[str]) -> str:
    return value if isinstance(value, str) and pattern.fullmatch(value) else ""


def carried(cards: Iterable[ParentCard]) -> dict[str, str]:
    """Give what a merge's card may take over: the licence if all parents have it, the task if all are for it.

    >>> carried([ParentCard("a", "mit", pipeline_tag="text-generation"), ParentCard("b", "apache-2.0")])
    {}
    >>> carried([ParentCard("a", "mit"), ParentCard("b", "mit")])
    {'license': 'mit'}
    """
    found = list(cards)
    result: dict[str, str] = {}
    if found and found[0].license and len({one.licence for one in found}) == 1:
        names = ("license", "license_name", "license_link")
        result |= {name: value for name, value in zip(names, found[0].licence, strict=True) if value}
    tags = {one.pipeline_tag for one in found}
    if len(tags) == 1 and (tag := tags.pop()):
        result["pipeline_tag"] = tag
    return result


def licence_note(cards: Iterable[ParentCard]) -> tuple[str, ...]:
    """Say that parents' licences differ, where some are known; the model card then states none.

    >>> licence_note([ParentCard("a", "mit"), ParentCard("b")])
    ('licences differ: a mit, b not stated; the result states none: look what each of them asks for',)
    """
    found = list(cards)
    if not any(one.license for one in found) or len({one.licence for one in found}) == 1:
        return ()
    shown = ", ".join(f"{one.label} {one.license_name or one.license or 'not stated'}" for one in found)
    return (f"licences differ: {shown}; the result states none: look what each of them asks for",)
