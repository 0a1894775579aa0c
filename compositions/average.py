"""Checkpoint and run averaging: the mean of a run's snapshots, and of several runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from portmanteau.merge import Checkpoint, CheckpointError, Composed, MergeError, Step, StoredCheckpoint
from portmanteau.merge.dtypes import is_float
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.files.json_file import TABLE_BYTES, read_json
from portmanteau.merge.names import matches
from portmanteau.merge.node import Inputs, copy_of
from portmanteau.merge.registry import find

from .composition import composition
from .matching import TASK_HEADS, Met, Unmatched, match
from .random_order import random_order

_STATISTICS = "*.running_mean|*.running_var"
_FAR = 1.5  # the first snapshot's loss over the last one's, above which it is worth a note


@dataclass(frozen=True)
class Exponential:
    """Weights that fall by a factor from each snapshot to the one before it."""

    exponential: Annotated[float, Field(gt=0, le=1)]
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


@composition(
    source="Schmidt et al. 2023 (arXiv 2305.16834), checkpoint and run averaging; fdschmidt93/free-lunch-xlt, 0d4a647",
    example="average: {models: run/checkpoint-*, skip_first: 0.1}",
)
def average(
    *,
    models: Annotated[
        Sequence[Checkpoint], Field(description="snapshots: a pattern such as run/checkpoint-*, or a list")
    ],
    weights: Annotated[
        Literal["uniform"] | list[float] | Exponential,
        Field(description="one for each snapshot kept, or {exponential: factor}, where the last weighs most"),
    ] = "uniform",
    skip_first: Annotated[
        float, Field(ge=0, description="leave out this share of each run's snapshots, or, from 1 on, so many")
    ] = 0.0,
    last: Annotated[int | None, Field(gt=0, description="keep only so many of each run, the last ones")] = None,
    first_runs: Annotated[
        int | None, Field(gt=0, description="take only so many runs: the first, as listed or as shuffled")
    ] = None,
    shuffle_runs: Annotated[
        int | None, Field(ge=0, description="the seed by which runs are shuffled before the first are taken")
    ] = None,
    over: Annotated[
        Literal["snapshots", "runs"], Field(description="where runs differ in length: what all weigh the same")
    ] = "snapshots",
    shared: Annotated[
        str | None, Field(description="tensors that must be equal in all runs; default with several runs: their heads")
    ] = None,
    unmatched: Unmatched = "error",
) -> Composed:
    """Average the snapshots of a run, or of several runs that share their head.

    Formula: Σ wᵢ xᵢ / Σ wᵢ, in fp32, in the order of the snapshots. Snapshots of one folder are one run. Tensors that
    are no floats come from the last snapshot. Several runs must share the head (`shared`): coordinates of heads that
    were initialised apart have nothing to do with each other.

    `first_runs` with `shuffle_runs` is one point of an accumulative average (Schmidt et al. 2023b, arXiv 2310.10532):
    a seed has one order of the runs, and a larger number takes more of the same order. See `accumulative_averages`.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> first, last = (InMemory(name, {"weight": torch.tensor([x])}) for name, x in (("first", 2.0), ("last", 4.0)))
    >>> average(models=[first, last], weights=[1, 3])["weight"]
    tensor([3.5000])

    Raises MergeError for snapshots that do not fit, weights of another number, or nothing left to average.
    """
    every = _runs(models)
    _refuse(len(every), first_runs, shuffle_runs, weights)
    taken = _shuffled(every, shuffle_runs)[:first_runs]
    runs = _kept(taken, skip_first, last)
    kept = {label: model for run in runs for label, model in run.items()}
    if not kept:
        raise MergeError("models", f"of {len(models)} snapshots none is left", "skip_first leaves out too many")
    matching = match(kept, list(kept)[-1], unmatched)
    job = _Job(
        tuple(kept), _weights(runs, weights, over), TASK_HEADS if shared is None and len(runs) > 1 else shared or ""
    )
    nodes = {name: job.step(met) for name, met in matching.tensors.items()}
    notes = (*matching.notes, *_notes(matching.tensors, runs), *_taken(taken, len(every), first_runs, shuffle_runs))
    return Composed("average", nodes, list(kept.values())[-1].companions, notes)


def accumulative_averages(
    *, models: Sequence[Checkpoint], shuffle_runs: int | None = None, first_runs: int | None = None, **settings: Any
) -> Iterator[Composed]:
    """Give the averages over the first run, the first two … up to `first_runs` (default: all); nothing is read yet.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> runs = [InMemory(f"run {i}", {"weight": torch.tensor([value])}) for i, value in enumerate((2.0, 4.0, 9.0))]
    >>> [one["weight"].item() for one in accumulative_averages(models=runs)]
    [2.0, 3.0, 5.0]

    The i-th is `average(models=models, shuffle_runs=shuffle_runs, first_runs=i, **settings)`. Raises as that does.
    """
    for count in range(1, 1 + (first_runs or len(_runs(models)))):
        yield average(models=models, shuffle_runs=shuffle_runs, first_runs=count, **settings)


Run = Mapping[str, Checkpoint]


def _refuse(count: int, first_runs: int | None, shuffle_runs: int | None, weights: Any) -> None:
    """Refuse an order of runs where it has nothing to decide, or contradicts what is given in the order of a list."""
    mistakes = []
    if first_runs is not None and first_runs > count:
        hint = "snapshots in one folder are one run" if count == 1 else ""
        mistakes.append(Mistake("first_runs", f"of {count} runs the first {first_runs} cannot be taken", hint))
    if shuffle_runs is not None and first_runs is None:
        what = "the average of all runs does not depend on their order"
        mistakes.append(Mistake("shuffle_runs", what, "add first_runs: how many are taken"))
    if shuffle_runs is not None and isinstance(weights, list | tuple):
        what = "are in the order of the list, and the runs are shuffled"
        mistakes.append(Mistake("weights", what, "leave one of both out"))
    if mistakes:
        raise MergeError.of(mistakes)


def _shuffled(runs: list[dict[str, Checkpoint]], seed: int | None) -> list[dict[str, Checkpoint]]:
    """Put the runs into the random order of a seed, where there is one."""
    return runs if seed is None else [runs[i] for i in random_order(seed, len(runs))]


def _taken(runs: Sequence[Run], count: int, first_runs: int | None, shuffle_runs: int | None) -> list[str]:
    """Say which runs were taken, in their order."""
    if first_runs is None:
        return []
    how = "" if shuffle_runs is None else f", shuffled with seed {shuffle_runs}"
    return [f"of {count} runs{how}, these are taken: {', '.join(_name(run) for run in runs)}"]


def _name(run: Run) -> str:
    """Name a run by its only snapshot, or by its first and last."""
    labels = list(run)
    return labels[0] if len(labels) == 1 else f"{labels[0]} … {labels[-1]}"


def _runs(models: Sequence[Checkpoint]) -> list[dict[str, Checkpoint]]:
    """Put snapshots that lie in one folder together, in the order given, under labels of their own."""
    runs: dict[Path | str, dict[str, Checkpoint]] = {}
    seen: set[str] = set()
    for i, model in enumerate(models):
        label = model.label if model.label not in seen else f"{model.label} ({i + 1})"
        seen.add(label)
        run: Path | str = model.folder.parent if isinstance(model, StoredCheckpoint) else label
        runs.setdefault(run, {})[label] = model
    return list(runs.values())


def _kept(runs: list[dict[str, Checkpoint]], skip_first: float, last: int | None) -> list[dict[str, Checkpoint]]:
    """Leave out the first snapshots of every run, and all but the last ones."""
    result = []
    for run in runs:
        skipped = int(skip_first) if skip_first >= 1 else int(skip_first * len(run))
        labels = list(run)[skipped:][-last if last else 0 :]
        if labels:
            result.append({label: run[label] for label in labels})
    return result


def _weights(runs: Sequence[Run], weights: Any, over: str) -> tuple[float, ...]:
    """Give the weight of every snapshot, in order."""
    count = sum(map(len, runs))
    if isinstance(weights, list | tuple):
        if len(weights) != count:
            raise MergeError("weights", f"{len(weights)} weights for {count} snapshots", "one for each that is kept")
        own = list(map(float, weights))
    elif isinstance(weights, Exponential):
        own = [weights.exponential ** (len(run) - 1 - i) for run in runs for i in range(len(run))]
    else:
        own = [1.0] * count
    if over == "snapshots":
        return tuple(own)
    result: list[float] = []
    for run in runs:
        mine, own = own[: len(run)], own[len(run) :]
        result += [weight / sum(mine) for weight in mine]
    return tuple(result)


@dataclass(frozen=True)
class _Job:
    """What is asked for, apart from any one tensor."""

    labels: tuple[str, ...]
    weights: tuple[float, ...]
    shared: str

    def step(self, met: Met) -> Step:
        """Make the step for one output tensor."""
        label, node = list(met.nodes.items())[-1]
        if not met.complete or not is_float(met.spec.dtype):
            return copy_of(node, met.spec, label)
        inputs = Inputs(tuple(met.nodes.values()))
        if self.shared and matches(self.shared, met.spec.name):
            reason = "heads that were trained apart cannot be averaged: train one, and freeze it in every run"
            return Step(met.spec, find("equal"), {"reason": reason}, inputs, self.labels)
        settings = {"weight": self.weights, "normalize": True}
        return Step(met.spec, find("linear"), settings, inputs, self.labels)


def _notes(tensors: Mapping[str, Met], runs: Sequence[Run]) -> list[str]:
    """Say what the mean does not mean: counters, running statistics, snapshots from before the run had settled."""
    counters = [name for name, met in tensors.items() if not is_float(met.spec.dtype)]
    statistics = [name for name in tensors if matches(_STATISTICS, name)]
    notes = (
        [f"{len(counters)} tensors that are no floats come from the last snapshot: {some(counters)}"]
        if counters
        else []
    )
    if statistics:
        notes.append(f"{len(statistics)} running statistics are averaged; recompute them on data: {some(statistics)}")
    return notes + [note for run in runs if (note := _unsettled(run))]


def _unsettled(run: Run) -> str:
    """Compare the training loss at the first snapshot kept with that at the last, where the Trainer wrote it down."""
    (first, one), *_, (_, other) = [*run.items(), *list(run.items())[-1:]]
    losses = [_loss(model) for model in (one, other)]
    if len(run) < 2 or losses[0] is None or losses[1] is None or losses[0] <= _FAR * losses[1]:
        return ""
    return f"{first}: the training loss was {losses[0]:.3g} there, {losses[1]:.3g} at the end; skip_first leaves it out"


def _loss(snapshot: Checkpoint) -> float | None:
    """Read the last training loss that a Trainer snapshot records."""
    path = snapshot.folder / "trainer_state.json" if isinstance(snapshot, StoredCheckpoint) else None
    if path is None or not path.is_file():
        return None
    try:
        history = read_json(path, TABLE_BYTES)["log_history"]
        return next((float(row["loss"]) for row in reversed(history) if "loss" in row), None)
    except (CheckpointError, ValueError, KeyError, TypeError, OverflowError):
        return None
