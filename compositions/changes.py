"""Where an expert differs from its base: the change of every tensor, layer and module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from portmanteau.merge import Checkpoint, MergeError, Progress, Survey
from portmanteau.merge.changes import Change, added, measure
from portmanteau.merge.dtypes import is_float
from portmanteau.merge.errors import Mistake, PortmanteauError, some
from portmanteau.merge.evaluate import Session, conduct, together
from portmanteau.merge.names import Place
from portmanteau.merge.node import Inputs, surveys

from .matching import Matching, Met, match

OUTSIDE = "outside the layers"
_FAR = 0.5  # a relative change of the whole above which the expert is hardly a fine-tune of its base


@dataclass(frozen=True, slots=True)
class Row:
    """A change and where it is.

    Attributes:
        stack: the stack's prefix; empty outside the layers.
        layer: the number of the layer in its stack.
        module: the tensor's name inside the layer (outside: its whole name) without the last part: `self_attn.q_proj`.
        tensor: the tensor's name. Both are empty in rows that stand for several of them.
        change: what was measured.

    """

    stack: str
    layer: int | None
    module: str
    tensor: str
    change: Change

    @property
    def where(self) -> str:
        """The layer as tables name it: `model.layers.3`."""
        return OUTSIDE if self.layer is None else f"{self.stack}.{self.layer}"


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
        return _grouped(self.tensors, lambda row: replace(row, tensor=""))

    @cached_property
    def layers(self) -> tuple[Row, ...]:
        """A row for each layer, and one for all that is outside."""
        return _grouped(self.tensors, lambda row: replace(row, tensor="", module=""))

    @cached_property
    def whole(self) -> Change:
        """The change of the whole checkpoint."""
        return added(row.change for row in self.tensors)


def changes(
    expert: Checkpoint,
    base: Checkpoint,
    *,
    unmatched: Literal["error", "drop"] = "error",
    session: Session | None = None,
    progress: Progress | None = None,
) -> Changes:
    """Measure how much every tensor of an expert changed from its base: reads both, part by part.

    Args:
        expert: a fine-tune of the base.
        base: what it was trained from; its names are the ones used.
        unmatched: tensors that only one of them has: refuse, or leave out.
        session: the size of parts; the result does not depend on it.
        progress: is told how far the work is.

    Raises MergeError for checkpoints that do not fit, and for a tensor with NaN or infinite entries.
    """
    matching = _matched(expert, base, unmatched)
    floats = {name: met for name, met in matching.tensors.items() if is_float(met.spec.dtype)}
    measuring, told = _Measuring(session or Session()), progress or Progress()
    told.begin("diff", sum(met.spec.nbytes for met in floats.values()), len(floats))
    rows = []
    for name, met in floats.items():
        rows.append(_row(name, base.layers.place(name), measuring(name, met)))
        told.advance(met.spec.nbytes, 1)
    stacks = [stack.prefix for stack in base.layers.stacks]
    rows.sort(key=lambda row: (len(stacks), 0) if row.layer is None else (stacks.index(row.stack), row.layer))
    found = Changes(expert.label, base.label, tuple(rows))
    return replace(found, notes=(*matching.notes, *_notes(matching, found.whole)))


def _matched(expert: Checkpoint, base: Checkpoint, unmatched: str) -> Matching:
    """Bring both together under the base's names."""
    models = {"expert": expert, "base": base}
    matching = match(models, "base", "keep")
    partial = [name for name, met in matching.tensors.items() if not met.complete]
    if not partial:
        return matching
    if unmatched == "error":
        lacking = {label: [n for n in partial if label not in matching.tensors[n].nodes] for label in models}
        hint = "unmatched: drop (--unmatched drop) leaves them out"
        raise MergeError.of(
            Mistake("", f"{label} lacks {len(names)} tensors that the other has: {some(names)}", hint)
            for label, names in lacking.items()
            if names
        )
    return match(models, "base", "drop")


class _Measuring:
    """The measuring of tensors, with what inner surveys found on the way."""

    def __init__(self, session: Session) -> None:
        self._found: dict[Survey, Any] = dict(session.found)
        self._session = replace(session, found=self._found)

    def __call__(self, name: str, met: Met) -> Change:
        for node in met.nodes.values():
            for inner in surveys(node):
                if inner not in self._found:
                    self._found[inner] = conduct(inner, self._session)
        inputs = Inputs((met.nodes["expert"],), met.nodes["base"])
        try:
            return measure(together((inputs,), self._session))
        except PortmanteauError as error:
            if error.mistakes[0].where:
                raise
            raise MergeError.of(Mistake(f"tensor {name}", m.what, m.hint) for m in error.mistakes) from error


def _row(name: str, place: Place | None, change: Change) -> Row:
    inner = place.inner if place else name
    module = inner.rpartition(".")[0] or inner
    return Row(place.stack.prefix if place else "", place.layer if place else None, module, name, change)


def _grouped(rows: tuple[Row, ...], group: Callable[[Row], Row]) -> tuple[Row, ...]:
    """Add up the rows that a group makes alike, in the order of their first."""
    members: dict[Row, list[Change]] = {}
    for row in rows:
        members.setdefault(replace(group(row), change=Change()), []).append(row.change)
    return tuple(replace(key, change=added(parts)) for key, parts in members.items())


def _notes(matching: Matching, whole: Change) -> Iterator[str]:
    """Say what is not measured, and what makes the measures mean less."""
    met = matching.tensors
    others = [name for name, one in met.items() if not is_float(one.spec.dtype)]
    if others:
        yield f"{len(others)} tensors that are no floats are not measured: {some(others)}"
    recast = [name for name, one in met.items() if len({node.output.dtype for node in one.nodes.values()}) > 1]
    if recast:
        yield f"{len(recast)} tensors have another dtype than the base's; rounding counts as change: {some(recast)}"
    if whole.relative_norm is not None and whole.relative_norm > _FAR:
        yield f"the relative change of the whole is {whole.relative_norm:.2g}: this may not be a fine-tune of that base"
