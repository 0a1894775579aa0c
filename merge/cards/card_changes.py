"""The section of a model card that tells how a result changed from each of its parents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..errors import OutputError
from ..shown import markdown

LAST = "\n`portmanteau.json` is the receipt"  # begins the last line of a card
_NOTHING = "–"


@dataclass(frozen=True)
class ParentChange:
    """How a result changed from one parent, δ being its entry minus the parent's; None where nothing can be divided by.

    Attributes:
        parent: what the parent is called.
        tensors: how many tensors were compared.
        relative_norm: ‖δ‖ / ‖parent‖.
        share_changed: the share of the entries that differ at all.
        mean_absolute: mean |δ|.
        modules: module, of all layers together → its relative norm.

    """

    parent: str
    tensors: int
    relative_norm: float | None
    share_changed: float | None
    mean_absolute: float | None
    modules: Mapping[str, float | None]


@dataclass(frozen=True)
class CardChanges:
    """What a card tells of changes: those that were measured, and notes on what could not be."""

    parents: tuple[ParentChange, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> CardChanges:
        """Read what stands in a receipt: nothing where none were measured. OutputError for what is no such thing."""
        try:
            return TypeAdapter(cls).validate_python(document)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise OutputError("the receipt", f"tells changes that cannot be read: {where}", "build it again") from error


def with_changes(card: str, earlier: CardChanges, found: CardChanges) -> str:
    r"""Give a card with the section of what was found, in the place of an earlier one.

    >>> one = ParentChange("./math", 1, 0.5, 1.0, 0.25, {})
    >>> print(with_changes(f"# A merged model\n{LAST}.", CardChanges(), CardChanges((one,))))
    # A merged model
    <BLANKLINE>
    ## Changes from each parent
    <BLANKLINE>
    | parent | relative norm | entries changed | mean \|δ\| | tensors |
    |---|---|---|---|---|
    | ./math | 50 % | 100 % | 0.25 | 1 |
    <BLANKLINE>
    δ: entry of the result minus that of the parent; relative norm: ‖δ‖ / ‖parent‖.
    <BLANKLINE>
    `portmanteau.json` is the receipt.
    """
    text = card.replace(_section(earlier), "") if earlier != CardChanges() else card
    above, last, below = text.rpartition(LAST)
    return above + _section(found) + last + below if last else text + _section(found)


def _section(found: CardChanges) -> str:
    """Write the section; it begins with an empty line, and there is none where there is nothing to tell."""
    if found == CardChanges():
        return ""
    lines = ["", "## Changes from each parent", ""]
    if found.parents:
        titles = ("parent", "relative norm", "entries changed", "mean |δ|", "tensors")
        lines += [*_table(titles, map(_cells, found.parents)), ""]
        lines += ["δ: entry of the result minus that of the parent; relative norm: ‖δ‖ / ‖parent‖.", ""]
    modules = list(dict.fromkeys(module for one in found.parents for module in one.modules))
    if modules:
        rows = ((module, *(_percent(one.modules.get(module)) for one in found.parents)) for module in modules)
        lines += ["The relative norm by module, all layers together:", ""]
        lines += [*_table(("module", *(one.parent for one in found.parents)), rows), ""]
    if found.notes:
        lines += [*(f"- {markdown(note)}" for note in found.notes), ""]
    return "\n".join(lines)


def _cells(one: ParentChange) -> Sequence[str]:
    mean = _NOTHING if one.mean_absolute is None else f"{one.mean_absolute:.4g}"
    return (one.parent, _percent(one.relative_norm), _percent(one.share_changed), mean, str(one.tensors))


def _table(titles: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield _row(titles)
    yield "|" + "---|" * len(titles)
    yield from map(_row, rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(markdown, cells))} |"


def _percent(share: float | None) -> str:
    return _NOTHING if share is None else f"{100 * share:.4g} %"
