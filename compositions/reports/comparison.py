"""Where experts differ from their base, and where their changes meet: every tensor measured, part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from portmanteau.merge import Checkpoint, MergeError, Progress, Survey
from portmanteau.merge.differences.delta_ranks import Rank, Ranks, delta_ranks
from portmanteau.merge.differences.task_vectors import Measured, measure
from portmanteau.merge.dtypes import is_float
from portmanteau.merge.errors import Mistake, PortmanteauError, some
from portmanteau.merge.evaluate import Evaluation, Session, conduct, together
from portmanteau.merge.kernels import one_thread
from portmanteau.merge.limits import Limits
from portmanteau.merge.node import Inputs, surveys
from portmanteau.merge.operator import Parts

from ..matching import Matching, Met, match
from .rows import Changes, Comparison, MeetingRow, Meetings, Row, Spot, spot

if TYPE_CHECKING:
    from torch import Tensor

_FAR = 0.5  # a relative change of the whole above which an expert is hardly a fine-tune of its base
_MATRIX = 2

Unmatched = Literal["error", "drop"]


def changes(
    expert: Checkpoint,
    base: Checkpoint,
    *,
    unmatched: Unmatched = "error",
    session: Session | None = None,
    progress: Progress | None = None,
) -> Changes:
    """Measure how much every tensor of an expert changed from its base: reads both, part by part.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> base = InMemory("base", {"weight": torch.tensor([3.0, 4.0, 0.0])})
    >>> tuned = InMemory("tuned", {"weight": torch.tensor([3.0, 4.0, 0.5])})
    >>> changes(tuned, base).whole.relative_norm  # ‖Δ‖ / ‖base‖ = 0.5 / 5
    0.1

    Args:
        expert: a fine-tune of the base.
        base: what it was trained from; its names are the ones used.
        unmatched: tensors that only one of them has: refuse, or leave out.
        session: the size of parts; the result does not depend on it.
        progress: is told how far the work is.

    Raises MergeError for checkpoints that do not fit, and for a tensor with NaN or infinite entries.
    """
    return compare([expert], base, unmatched=unmatched, session=session, progress=progress).changes[0]


def compare(
    experts: Sequence[Checkpoint],
    base: Checkpoint,
    *,
    unmatched: Unmatched = "error",
    ranks: Ranks = "none",
    session: Session | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure how experts changed from one base, and for every pair of them where their task vectors meet.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> values = {"base": [1.0, 1.0], "math": [4.0, 5.0], "swahili": [1.0, 3.0]}
    >>> base, *experts = (InMemory(name, {"weight": torch.tensor(value)}) for name, value in values.items())
    >>> compare(experts, base).pairs[0].whole.cosine  # of (3, 4) and (0, 2)
    0.8

    Args:
        experts: fine-tunes of the base.
        base: what they were trained from; its names are the ones used.
        unmatched: tensors that not all of them have: refuse, or leave out.
        ranks: of the changes of matrices: `none`, `sampled` (exact where that is cheap, else of some rows, which is
            noted), or `exact`.
        session: the size of parts, and threads; the result does not depend on it. By default every processor.
        progress: is told how far the work is.

    Raises MergeError for checkpoints that do not fit, and for a tensor with NaN or infinite entries.
    """
    models = _named(experts, base)
    labels, own = list(models)[:-1], list(models)[-1]
    matching = _matched(models, own, unmatched)
    floats = {name: met for name, met in matching.tensors.items() if is_float(met.spec.dtype)}
    session = session or Session(threads=Limits.of(None, None).threads)
    measuring, told = _Measuring(session, labels, own, ranks), progress or Progress()
    told.begin("diff", sum(met.spec.nbytes for met in floats.values()), len(floats))
    found: list[tuple[Spot, Measured, tuple[Rank | None, ...]]] = []
    with one_thread():  # of torch's own, for each of ours
        for name, met in floats.items():
            found.append((spot(name, base.layers.place(name)), *measuring(name, met)))
            told.advance(met.spec.nbytes, 1)
    stacks = [stack.prefix for stack in base.layers.stacks]
    found.sort(key=lambda one: (len(stacks), 0) if one[0].layer is None else (stacks.index(one[0].stack), one[0].layer))
    per_expert = tuple(
        _with_notes(Changes(expert.label, base.label, _rows(found, i)), matching, several=len(experts) > 1)
        for i, expert in enumerate(experts)
    )
    pairs = tuple(
        Meetings(one.label, other.label, _meeting_rows(found, i))
        for i, (one, other) in enumerate(combinations(experts, 2))
    )
    notes = dict.fromkeys(note for changes in per_expert for note in changes.notes)
    return Comparison(base.label, per_expert, pairs, (*notes, *_sampling(found)))


def _rows(found: Sequence[tuple[Spot, Measured, tuple[Rank | None, ...]]], i: int) -> tuple[Row, ...]:
    made = []
    for at, one, ranks in found:
        rank = ranks[i]
        share = rank.share if rank else None
        made.append(Row(at.stack, at.layer, at.module, at.tensor, one.changes[i], rank, share))
    return tuple(made)


def _meeting_rows(found: Sequence[tuple[Spot, Measured, Any]], i: int) -> tuple[MeetingRow, ...]:
    return tuple(MeetingRow(at.stack, at.layer, at.module, at.tensor, one.meetings[i]) for at, one, _ in found)


def _named(experts: Sequence[Checkpoint], base: Checkpoint) -> dict[str, Checkpoint]:
    """Give what messages call the models, the base last."""
    if len(experts) == 1 and experts[0].label == base.label:
        return {"expert": experts[0], "base": base}
    labels = [one.label for one in (*experts, base)]
    twice = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
    if twice:
        raise MergeError.of(Mistake(label, "is named twice", "name every model once") for label in twice)
    return dict(zip(labels, (*experts, base), strict=True))


def _matched(models: Mapping[str, Checkpoint], base: str, unmatched: str) -> Matching:
    """Bring all together under the base's names."""
    matching = match(models, base, "keep")
    partial = [name for name, met in matching.tensors.items() if not met.complete]
    if not partial:
        return matching
    if unmatched == "error":
        lacking = {label: [n for n in partial if label not in matching.tensors[n].nodes] for label in models}
        hint = "unmatched: drop (--unmatched drop) leaves them out"
        others = "the other has" if len(models) == _MATRIX else "others have"
        raise MergeError.of(
            Mistake("", f"{label} lacks {len(names)} tensors that {others}: {some(names)}", hint)
            for label, names in lacking.items()
            if names
        )
    return match(models, base, "drop")


class _Measuring:
    """The measuring of tensors, with what inner surveys found on the way."""

    def __init__(self, session: Session, labels: Sequence[str], base: str, ranks: Ranks) -> None:
        self._found: dict[Survey, Any] = dict(session.found)
        self._session = replace(session, found=self._found)
        self._labels, self._base, self._ranks = labels, base, ranks

    def __call__(self, name: str, met: Met) -> tuple[Measured, tuple[Rank | None, ...]]:
        for node in met.nodes.values():
            for inner in surveys(node):
                if inner not in self._found:
                    self._found[inner] = conduct(inner, self._session)
        inputs = Inputs(tuple(met.nodes[label] for label in self._labels), met.nodes[self._base])
        try:
            return measure(self._parts(inputs)), self._ranks_of(name, met, inputs)
        except PortmanteauError as error:
            if error.mistakes[0].where:
                raise
            raise MergeError.of(Mistake(f"tensor {name}", m.what, m.hint) for m in error.mistakes) from error

    def _parts(self, inputs: Inputs) -> Parts:
        """Give the tensor's parts; those of a small one are read once and kept for the next pass."""
        parts = together((inputs,), self._session)
        if parts.entries * (parts.models + 1) * 8 > self._session.keep:
            return parts
        kept = [partial(_same, part) for part in parts]
        return replace(parts, runs=lambda: kept)

    def _ranks_of(self, name: str, met: Met, inputs: Inputs) -> tuple[Rank | None, ...]:
        if self._ranks == "none" or len(met.spec.shape) != _MATRIX:
            return (None,) * len(self._labels)

        def read(span: slice) -> Tensor:
            return Evaluation(self._session).gather(inputs, span, deltas=True)[0]

        exact = self._ranks == "exact"
        rows, columns = met.spec.shape
        return delta_ranks(read, (rows, columns), experts=len(self._labels), name=name, exact=exact)


def _same(part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return part


def _with_notes(found: Changes, matching: Matching, *, several: bool) -> Changes:
    return replace(found, notes=(*matching.notes, *_notes(found, matching, f"{found.expert}: " if several else "")))


def _notes(found: Changes, matching: Matching, who: str) -> Iterator[str]:
    """Say what is not measured, and what makes the measures mean less."""
    met, norm = matching.tensors, found.whole.relative_norm
    others = [name for name, one in met.items() if not is_float(one.spec.dtype)]
    if others:
        yield f"{len(others)} tensors that are no floats are not measured: {some(others)}"
    recast = [name for name, one in met.items() if len({node.output.dtype for node in one.nodes.values()}) > 1]
    if recast:
        yield f"{len(recast)} tensors have another dtype than the base's; rounding counts as change: {some(recast)}"
    if norm is not None and norm > _FAR:
        yield f"{who}the relative change of the whole is {norm:.2g}: this may not be a fine-tune of that base"


def _sampling(found: Sequence[tuple[Spot, Measured, tuple[Rank | None, ...]]]) -> Iterator[str]:
    """Say where ranks are those of a sample."""
    sampled = {at.tensor: ranks[0] for at, _, ranks in found if ranks[0] and ranks[0].is_sampled}
    if sampled:
        rows = sorted({rank.rows for rank in sampled.values()})
        counts = str(rows[0]) if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
        yield (
            f"the ranks of {len(sampled)} matrices are estimates from {counts} of their rows, drawn at random: "
            f"{some(sampled)}; --ranks exact measures them whole"
        )
