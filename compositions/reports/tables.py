"""Comparisons as plain rows, for tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

from portmanteau.merge.differences.changes import Change
from portmanteau.merge.differences.task_vectors import Meeting

from .rows import Changes, Comparison, MeetingRow, Meetings, Row, Spot

Level = Literal["layers", "modules", "tensors"]
MEASURES = {
    "mean_absolute": "mean |δ|",
    "relative": "relative",
    "relative_norm": "relative norm",
    "share_changed": "changed",
    "top_share": "top 1 % hold",
}
OF_PAIRS = {
    "cosine": "cosine",
    "sign_conflicts": "sign conflicts",
    "changed_by_both": "changed by both",
    "top_overlap": "top 1 % shared",
    "top_by_chance": "by chance",
}
_NOTHING = "–"


def document(found: Comparison, *, tensors: bool = False) -> dict[str, Any]:
    """Describe a comparison: of the whole, by layer, by layer × module, and by tensor if asked.

    One expert is described by itself; several as `experts`, and their pairs as `pairs`.
    """
    if len(found.changes) == 1:
        return {**_changes(found.changes[0], tensors=tensors), "notes": list(found.notes)}
    return {
        "base": found.base,
        "notes": list(found.notes),
        "experts": [_changes(one, tensors=tensors) for one in found.changes],
        "pairs": [_meetings(one, tensors=tensors) for one in found.pairs],
    }


def _changes(found: Changes, *, tensors: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "expert": found.expert,
        "base": found.base,
        "notes": list(found.notes),
        "whole": _measures(found.whole),
        "layers": [_plain(row, "module", "tensor") for row in found.layers],
        "modules": [_plain(row, "tensor") for row in found.modules],
    }
    if tensors:
        described["tensors"] = [_plain(row) for row in found.tensors]
    return described


def _meetings(found: Meetings, *, tensors: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "one": found.one,
        "other": found.other,
        "whole": _of_pair(found.whole),
        "layers": [_plain(row, "module", "tensor") for row in found.layers],
        "modules": [_plain(row, "tensor") for row in found.modules],
    }
    if tensors:
        described["tensors"] = [_plain(row) for row in found.tensors]
    return described


def csv_text(found: Comparison, level: Level) -> str:
    """Write rows as CSV, a heading first; a measure that does not exist is an empty field.

    Of several experts each row names the expert; after them come rows of pairs, which name the other too.
    """
    rows: Iterator[dict[str, Any]] = (_plain(row) for row in getattr(found.changes[0], level))
    head = ["where", "stack", "layer", "module", "tensor", *_measures(Change())]
    head += next((list(_rank(row)) for row in found.changes[0].tensors if row.rank), [])
    if len(found.changes) > 1:
        head = list(dict.fromkeys(["expert", "other", *head, *_of_pair(Meeting())]))
        rows = _of_several(found, level)
    text = io.StringIO()
    writer = csv.DictWriter(text, head, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _of_several(found: Comparison, level: Level) -> Iterator[dict[str, Any]]:
    for one in found.changes:
        yield from ({"expert": one.expert, **_plain(row)} for row in getattr(one, level))
    for pair in found.pairs:
        yield from ({"expert": pair.one, "other": pair.other, **_plain(row)} for row in getattr(pair, level))


def printed(found: Comparison, *, tensors: bool = False) -> Iterator[tuple[tuple[str, ...], list[tuple[str, ...]]]]:
    """Give the tables that a terminal shows, each as titles and rows.

    Of one expert a row for each layer. Of several what each and each pair does as wholes, then a row for each layer.
    """
    first, title = found.changes[0], "tensor" if tensors else "layer"
    if len(found.changes) == 1:
        shown = first.tensors if tensors else first.layers
        rows = [(_name(row), *row_cells(row, first)) for row in shown]
        yield (title, *titles_of(first)), [*rows, ("whole", *whole_cells(first))]
        return
    yield ("expert", *titles_of(first)), [(one.expert, *whole_cells(one)) for one in found.changes]
    yield ("pair", *OF_PAIRS.values()), [(f"{one.one} · {one.other}", *pair_cells(one.whole)) for one in found.pairs]
    pairs = [f"{i + 1}·{j + 1}" for i in range(len(found.changes)) for j in range(i + 1, len(found.changes))]
    titles = [f"relative {i + 1}" for i in range(len(found.changes))]
    titles += [f"{name} {pair}" for pair in pairs for name in ("cosine", "conflicts")]
    yield (title, *titles), list(_side_by_side(found, tensors=tensors))


def _side_by_side(found: Comparison, *, tensors: bool) -> Iterator[tuple[str, ...]]:
    level = "tensors" if tensors else "layers"
    columns: list[Sequence[Row | MeetingRow]] = [getattr(one, level) for one in (*found.changes, *found.pairs)]
    for rows in zip(*columns, strict=True):
        found_here = [
            (percent(row.change.relative),)
            if isinstance(row, Row)
            else (number(row.meeting.cosine), percent(row.meeting.sign_conflicts))
            for row in rows
        ]
        yield (_name(rows[0]), *(cell for cells in found_here for cell in cells))


def _name(row: Spot) -> str:
    return row.tensor or row.where


def cells(change: Change) -> tuple[str, ...]:
    """Give the measures as people read them."""
    shares = (change.relative, change.relative_norm, change.share_changed, change.top_share)
    mean = _NOTHING if change.mean_absolute is None else f"{change.mean_absolute:.4g}"
    return (mean, *map(percent, shares))


def titles_of(found: Changes) -> tuple[str, ...]:
    """Give the titles of the measures, with the rank where it was measured."""
    return (*MEASURES.values(), *_if_ranked(found, "rank"))


def row_cells(row: Row, found: Changes) -> tuple[str, ...]:
    """Give the measures of a row as people read them: of a matrix its rank, of several the mean as a share."""
    if row.rank is None:
        return (*cells(row.change), *_if_ranked(found, percent(row.rank_share)))
    rows = f" ({row.rank.rows} of {row.rank.of_rows} rows)" if row.rank.is_sampled else ""
    return (*cells(row.change), f"{row.rank.rank} of {row.rank.most}{rows}")


def whole_cells(found: Changes) -> tuple[str, ...]:
    """Give the measures of the whole as people read them."""
    return (*cells(found.whole), *_if_ranked(found, percent(found.rank_share)))


def _if_ranked(found: Changes, cell: str) -> tuple[str, ...]:
    return (cell,) if found.rank_share is not None else ()


def pair_cells(meeting: Meeting) -> tuple[str, ...]:
    """Give the measures of a pair as people read them."""
    shares = (meeting.sign_conflicts, meeting.changed_by_both, meeting.top_overlap, meeting.top_by_chance)
    return (number(meeting.cosine), *map(percent, shares))


def percent(share: float | None) -> str:
    """Write a share as people read it."""
    return _NOTHING if share is None else f"{100 * share:.4g} %"


def number(value: float | None) -> str:
    """Write a cosine as people read it."""
    return _NOTHING if value is None else f"{value:.3f}"


def _plain(row: Row | MeetingRow, *left_out: str) -> dict[str, Any]:
    place = {"where": row.where, "stack": row.stack, "layer": row.layer, "module": row.module, "tensor": row.tensor}
    found = {**_measures(row.change), **_rank(row)} if isinstance(row, Row) else _of_pair(row.meeting)
    return {key: value for key, value in place.items() if key not in left_out} | found


def _measures(change: Change) -> dict[str, Any]:
    """Give the measures, and the sums that they are made of."""
    sums = {f"sum_{key}" if key not in ("entries", "changed") else key: v for key, v in asdict(change).items()}
    return {name: getattr(change, name) for name in MEASURES} | sums


def _rank(row: Row) -> dict[str, Any]:
    """Give the rank, where it was measured."""
    if row.rank_share is None:
        return {}
    found = asdict(row.rank) if row.rank else dict.fromkeys(("rank", "most", "rows", "of_rows"))
    own = {"rank": found.pop("rank"), **{f"rank_{key}": value for key, value in found.items()}}
    return {**own, "rank_share": row.rank_share}


def _of_pair(meeting: Meeting) -> dict[str, Any]:
    return {name: getattr(meeting, name) for name in OF_PAIRS} | asdict(meeting)
