"""What was found of experts and their base, by tensor, layer × module, layer and whole: plain frozen rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from portmanteau.merge.differences.changes import Change, added
from portmanteau.merge.differences.delta_ranks import Rank
from portmanteau.merge.differences.task_vectors import Meeting, met
from portmanteau.merge.names import Place

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # titles, and rows of cells
OUTSIDE = "outside the layers"


@dataclass(frozen=True, slots=True)
class Spot:
    """Where in a checkpoint something was found.

    Attributes:
        stack: the stack's prefix; empty outside the layers.
        layer: the number of the layer in its stack.
        module: the tensor's name inside the layer (outside: its whole name) without the last part: `self_attn.q_proj`.
        tensor: the tensor's name. Both are empty in rows that stand for several of them.

    """

    stack: str
    layer: int | None
    module: str
    tensor: str

    @property
    def where(self) -> str:
        """The layer as tables name it: `model.layers.3`."""
        return OUTSIDE if self.layer is None else f"{self.stack}.{self.layer}"


@dataclass(frozen=True, slots=True)
class Row(Spot):
    """A change and where it is.

    Attributes:
        change: what was measured.
        rank: of the one matrix that it stands for, where ranks were measured.
        rank_share: the rank as a share of what it could be; of several matrices the mean, weighted by their entries.

    """

    change: Change
    rank: Rank | None = None
    rank_share: float | None = None


@dataclass(frozen=True, slots=True)
class MeetingRow(Spot):
    """A meeting of two task vectors and where it is."""

    meeting: Meeting


S = TypeVar("S", bound=Spot)


@dataclass(frozen=True)
class Changes:
    """All changes from a base to an expert, by tensor; rows are in the order of the layers, what is outside them last.

    Groups add up the sums of their tensors; see Change for what that means for the concentration.
    """

    expert: str
    base: str
    tensors: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def modules(self) -> tuple[Row, ...]:
        """A row for each layer × module."""
        return _changes(self.tensors, _by_module)

    @cached_property
    def layers(self) -> tuple[Row, ...]:
        """A row for each layer, and one for all that is outside."""
        return _changes(self.tensors, _by_layer)

    @cached_property
    def whole(self) -> Change:
        """The change of the whole checkpoint."""
        return added(row.change for row in self.tensors)

    @cached_property
    def rank_share(self) -> float | None:
        """The mean rank of all matrices, as a share of what it could be; None where ranks were not measured."""
        return mean_rank(self.tensors)


@dataclass(frozen=True)
class Meetings:
    """Where the task vectors of two experts meet, by tensor; groups add up the sums of their tensors."""

    one: str
    other: str
    tensors: tuple[MeetingRow, ...]

    @cached_property
    def modules(self) -> tuple[MeetingRow, ...]:
        """A row for each layer × module."""
        return _meetings(self.tensors, _by_module)

    @cached_property
    def layers(self) -> tuple[MeetingRow, ...]:
        """A row for each layer, and one for all that is outside."""
        return _meetings(self.tensors, _by_layer)

    @cached_property
    def whole(self) -> Meeting:
        """The meeting of the task vectors as wholes."""
        return met(row.meeting for row in self.tensors)


@dataclass(frozen=True)
class Comparison:
    """Several experts of one base: the changes of each, and for every pair of them, in order, where they meet."""

    base: str
    changes: tuple[Changes, ...]
    pairs: tuple[Meetings, ...]
    notes: tuple[str, ...] = ()


def spot(name: str, place: Place | None) -> Spot:
    """Say where a tensor is."""
    inner = place.inner if place else name
    module = inner.rpartition(".")[0] or inner
    return Spot(place.stack.prefix if place else "", place.layer if place else None, module, name)


def grouped(rows: Iterable[S], group: Callable[[Spot], Spot]) -> dict[Spot, list[S]]:
    """Gather the rows that a group makes alike, in the order of their first."""
    members: dict[Spot, list[S]] = {}
    for row in rows:
        members.setdefault(group(Spot(row.stack, row.layer, row.module, row.tensor)), []).append(row)
    return members


def _by_module(found: Spot) -> Spot:
    return replace(found, tensor="")


def _by_layer(found: Spot) -> Spot:
    return replace(found, tensor="", module="")


def _changes(rows: Sequence[Row], group: Callable[[Spot], Spot]) -> tuple[Row, ...]:
    made = []
    for at, members in grouped(rows, group).items():
        ranked = [row for row in members if row.rank]
        rank = ranked[0].rank if len(ranked) == 1 else None
        change = added(row.change for row in members)
        made.append(Row(at.stack, at.layer, at.module, at.tensor, change, rank, mean_rank(ranked)))
    return tuple(made)


def mean_rank(rows: Sequence[Row]) -> float | None:
    """Give the mean of the ranks, as shares of what they could be, weighted by entries; None where there are none."""
    entries = sum(row.change.entries for row in rows if row.rank)
    ranks = math.fsum(row.rank.share * row.change.entries for row in rows if row.rank)
    return ranks / entries if entries else None


def _meetings(rows: Sequence[MeetingRow], group: Callable[[Spot], Spot]) -> tuple[MeetingRow, ...]:
    return tuple(
        MeetingRow(at.stack, at.layer, at.module, at.tensor, met(row.meeting for row in members))
        for at, members in grouped(rows, group).items()
    )
