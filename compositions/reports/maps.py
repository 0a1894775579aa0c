"""Heat maps as values, layers against modules: what is drawn in the terminal, in a page and in a notebook."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from portmanteau.merge.differences.changes import added
from portmanteau.merge.differences.task_vectors import met

from .rows import Changes, Comparison, Meetings, S, Spot, grouped, mean_rank

Scale = Literal["linear", "logarithmic", "diverging"]
Values = Mapping[tuple[str, int, str], float]  # by stack, layer and module
STEPS = 9  # colours of a scale
_WIDE = 100  # values that lie further apart are drawn on a logarithmic scale
_MANY = 40  # modules; where there are more (experts), those that differ in a number alone are one row
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class HeatMap:
    """One measure of every layer × module of a stack.

    Attributes:
        title: of what.
        measure: what the colours mean.
        stack: the stack's prefix.
        layers: the columns.
        modules: the rows.
        values: by module, then by layer; None where there is none.
        scale: how values become colours.
        low: the value of the first colour.
        high: the value of the last.
        decimals: shown as a plain number, not as a share.

    """

    title: str
    measure: str
    stack: str
    layers: tuple[int, ...]
    modules: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    scale: Scale
    low: float
    high: float
    decimals: bool = False

    def colour(self, value: float | None) -> int | None:
        """Give the number of a value's colour, from 0 to STEPS - 1; None where there is none."""
        if value is None or (self.scale == "logarithmic" and value <= 0):
            return None
        if self.low == self.high:
            return STEPS - 1
        if self.scale == "logarithmic":
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return max(0, min(STEPS - 1, int(share * STEPS)))

    def shown(self, value: float | None) -> str:
        """Write a value as people read it."""
        if value is None:
            return "–"
        return f"{value:.3f}" if self.decimals else f"{100 * value:.3g} %"


def of_comparison(found: Comparison, *, brief: bool = False) -> tuple[HeatMap, ...]:
    """Give the heat maps of a comparison: of every expert, then of every pair; `brief`: of pairs the cosine only."""
    made: list[HeatMap] = []
    for one in found.changes:
        made += of_changes(one)
    for pair in found.pairs:
        made += of_meetings(pair) if not brief else _cosines(pair)
    return tuple(made)


def of_changes(found: Changes) -> Iterator[HeatMap]:
    """Give the change relative to the base, and where ranks were measured these, as shares of what they could be."""
    yield from _relative(found)
    ranks = _there({key: mean_rank(rows) for key, rows in _grouped(found.tensors).items()})
    if ranks:
        title = f"rank of the change of {found.expert}"
        yield from _maps(
            title,
            "rank that keeps 90 % of the energy, of full rank",
            ranks,
            "linear",
            (0.0, max(ranks.values()) or 1.0),
        )


def _relative(found: Changes) -> Iterator[HeatMap]:
    groups = _grouped(found.tensors)
    shares = {key: added(row.change for row in rows).relative for key, rows in groups.items()}
    values = {key: share for key, share in shares.items() if share is not None}
    seen = [share for share in values.values() if share] or [1.0]
    wide = max(seen) > _WIDE * min(seen)
    scale: Scale = "logarithmic" if wide else "linear"
    bounds = (min(seen) if wide else 0.0, max(seen))
    yield from _maps(f"change of {found.expert}", "mean |change| / mean |base|", values, scale, bounds, tuple(groups))


def of_meetings(found: Meetings) -> Iterator[HeatMap]:
    """Give the cosines, the sign conflicts and the overlap of the top 1 %."""
    yield from _cosines(found)
    meetings = {key: met(row.meeting for row in rows) for key, rows in _grouped(found.tensors).items()}
    who = f"{found.one} and {found.other}"
    conflicts = {key: one.sign_conflicts for key, one in meetings.items()}
    what = "share of the entries changed by both whose signs differ (50 % by chance)"
    shares = _there(conflicts)
    off = max([0.05, *(abs(share - 0.5) for share in shares.values())])
    yield from _maps(f"sign conflicts of {who}", what, shares, "diverging", (0.5 + off, 0.5 - off), tuple(meetings))
    overlap = _there({key: one.top_overlap for key, one in meetings.items()})
    chance = found.whole.top_by_chance or 0.0
    what = f"share of the most changed 1 % that both have in common ({100 * chance:.2g} % by chance)"
    high = max([*overlap.values(), chance, 0.01])
    yield from _maps(f"top 1 % of {who}", what, overlap, "linear", (0.0, high), tuple(meetings))


def _cosines(found: Meetings) -> Iterator[HeatMap]:
    groups = _grouped(found.tensors)
    values = _there({key: met(row.meeting for row in rows).cosine for key, rows in groups.items()})
    title = f"cosine of {found.one} and {found.other}"
    most = max([0.1, *map(abs, values.values())])
    for made in _maps(title, "cosine between the task vectors", values, "diverging", (-most, most), tuple(groups)):
        yield replace(made, decimals=True)


def _there(values: Mapping[tuple[str, int, str], float | None]) -> dict[tuple[str, int, str], float]:
    return {key: value for key, value in values.items() if value is not None}


def _key(row: Spot) -> tuple[str, int, str]:
    assert row.layer is not None
    return row.stack, row.layer, row.module


def _grouped(rows: Sequence[S]) -> dict[tuple[str, int, str], list[S]]:
    """Gather the rows of every layer × module; where modules are many, those that differ in a number alone together."""
    inside = [row for row in rows if row.layer is not None]
    many = len({row.module for row in inside}) > _MANY
    group: Callable[[Spot], Spot] = partial(_merged, many=many)
    return {_key(at): members for at, members in grouped(inside, group).items()}


def _merged(at: Spot, *, many: bool) -> Spot:
    return replace(at, tensor="", module=_NUMBER.sub("*", at.module) if many else at.module)


def _maps(
    title: str,
    measure: str,
    values: Values,
    scale: Scale,
    bounds: tuple[float, float],
    every: Sequence[tuple[str, int, str]] = (),
) -> Iterator[HeatMap]:
    """Lay values out in a grid for every stack."""
    keys = every or tuple(values)
    for stack in dict.fromkeys(key[0] for key in keys):
        layers = tuple(dict.fromkeys(layer for own, layer, _ in keys if own == stack))
        modules = tuple(dict.fromkeys(module for own, _, module in keys if own == stack))
        grid = tuple(tuple(values.get((stack, layer, module)) for layer in layers) for module in modules)
        yield HeatMap(title, measure, stack, layers, modules, grid, scale, *bounds)
