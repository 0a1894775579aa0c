"""What commands print as tables: titles and rows of plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portmanteau.merge.units import readable

if TYPE_CHECKING:
    from ..greedy_soup import Try
    from ..overlap import Overlap
    from ..reports.rows import Table

_NOTHING = "–"


def steps(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Give the steps of a plan: what makes which tensors, and why."""
    cells = [
        (one["operator"], one["of"], one["settings"], str(one["tensors"]), readable(one["bytes"]), one["why"])
        for one in rows
    ]
    return ("operator", "of", "settings", "tensors", "bytes", "because of"), cells


def overview(rows: Sequence[Mapping[str, str]]) -> Table:
    """Give the operators and compositions, each with what it does."""
    return ("name", "kind", "what it does"), [(one["name"], one["kind"], one["summary"]) for one in rows]


def settings(rows: Sequence[Mapping[str, str]]) -> Table:
    """Give the settings of an operator or a composition."""
    cells = [(one["name"], one["type"], one["default"], one["description"]) for one in rows]
    return ("setting", "type", "default", "meaning"), cells


def groups(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Give the stacks of a checkpoint as `inspect` describes them."""
    cells = [(one["where"], one["layers"], str(one["tensors"]), readable(one["bytes"]), one["dtypes"]) for one in rows]
    return ("where", "layers", "tensors", "bytes", "dtypes"), cells


def modules(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Give the modules of a checkpoint as `inspect` describes them: titles and rows."""
    cells_of = [
        (
            row["where"],
            row["module"],
            row["layers"],
            str(row["tensors"]),
            "×".join(map(str, row["shape"])),
            row["dtype"],
        )
        for row in rows
    ]
    sizes = [readable(row["bytes"]) for row in rows]
    titles = ("where", "module", "layers", "tensors", "shape", "dtype", "bytes")
    return titles, [(*row, size) for row, size in zip(cells_of, sizes, strict=True)]


def beside(found: Mapping[str, Any]) -> Iterator[str]:
    """Say what `inspect` found of the vocabulary, of files beside the weights, and of a receipt."""
    vocabulary, receipt = found.get("vocabulary"), found.get("receipt")
    if vocabulary:
        tokens = vocabulary["tokens"]
        shown = "no tokenizer" if tokens is None else f"{tokens:,} tokens, {vocabulary['padding']:,} rows of padding"
        yield f"vocabulary: {vocabulary['rows']:,} rows, {shown}; head: {vocabulary['head']}"
    if found.get("companions"):
        yield f"beside the weights: {', '.join(found['companions'])}"
    if receipt:
        recipe = f"recipe {receipt['recipe'][:12]}" if receipt["recipe"] else "no recipe"
        yield f"receipt: {recipe}, of {', '.join(map(str, receipt['inputs']))}; `portmanteau report` shows it"


def tensors(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Give every tensor of a checkpoint as `inspect` describes it."""
    cells = [(one["name"], one["dtype"], str(one["shape"]), readable(one["bytes"])) for one in rows]
    return ("tensor", "dtype", "shape", "bytes"), cells


def soup(tries: Sequence[Try]) -> Table:
    """Give every model's turn in a greedy soup."""
    cells = [(one.model, f"{one.alone:g}", f"{one.soup:g}", "yes" if one.taken else "no") for one in tries]
    return ("model", "alone", "soup with it", "taken"), cells


def overlaps(rows: Sequence[Overlap], *, tensors: bool) -> Table:
    """Give where sparse fine-tunes meet: a row for each pair, or of each pair for each tensor."""
    cells = [
        (
            f"{one.one} · {one.other}",
            *([one.tensor or "all"] if tensors else []),
            f"{one.counts[0]:,} · {one.counts[1]:,}",
            f"{one.shared:,}",
            f"{one.by_chance:,.0f}",
            _NOTHING if one.opposed_share is None else f"{one.opposed_share:.1%}",
            _NOTHING if one.cosine is None else f"{one.cosine:.3f}",
        )
        for one in rows
    ]
    return ("pair", *(["tensor"] if tensors else []), "entries", "shared", "by chance", "opposed", "cosine"), cells
