"""Changes as plain rows, for tables, JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from portmanteau.merge.changes import Change

from .changes import Changes, Row

MEASURES = {
    "mean_absolute": "mean |δ|",
    "relative": "relative",
    "relative_norm": "relative norm",
    "share_changed": "changed",
    "top_share": "top 1 % hold",
}


def document(found: Changes, *, tensors: bool = False) -> dict[str, Any]:
    """Describe all changes: of the whole, by layer, by layer × module, and by tensor if asked."""
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


def csv_text(rows: Iterable[Row]) -> str:
    """Write rows as CSV: one line each, a heading first; a measure that does not exist is an empty field."""
    plain = [_plain(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["where", "stack", "layer", "module", "tensor", *_measures(Change())])
    writer.writeheader()
    writer.writerows(plain)
    return text.getvalue()


def cells(change: Change) -> tuple[str, ...]:
    """Give the measures as people read them."""
    shares = (change.relative, change.relative_norm, change.share_changed, change.top_share)
    mean = "–" if change.mean_absolute is None else f"{change.mean_absolute:.4g}"
    return (mean, *("–" if share is None else f"{100 * share:.4g} %" for share in shares))


def _plain(row: Row, *left_out: str) -> dict[str, Any]:
    place = {"where": row.where, "stack": row.stack, "layer": row.layer, "module": row.module, "tensor": row.tensor}
    return {key: value for key, value in place.items() if key not in left_out} | _measures(row.change)


def _measures(change: Change) -> dict[str, Any]:
    """Give the measures, and the sums that they are made of."""
    sums = {f"sum_{key}" if key not in ("entries", "changed") else key: v for key, v in asdict(change).items()}
    return {name: getattr(change, name) for name in MEASURES} | sums
