"""Carrying out a plan: read, compute, write, in bounded memory, on a pool of threads."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blake3

from . import companions, model_card
from .byte_copies import copied, is_byte_copy, is_shared
from .checkpoint import Checkpoint
from .compiled.making import is_compiled, made
from .compiled.surveying import conduct
from .device import CPU, alone, chosen
from .dtypes import parse
from .errors import OutputError
from .evaluate import GRID, LARGEST_ELSEWHERE, LARGEST_PART, Evaluation, Session
from .node import Inputs, Made, Node, Source, Step, Survey
from .notebook import default_progress
from .output import check_place, published
from .page_cache import Reading, crowds_memory
from .plan import Plan, make_plan
from .progress import Progress
from .receipt import Done, Receipt, make_receipt
from .units import readable
from .writer import Writer

if TYPE_CHECKING:
    from torch import Tensor

MEMORY = 256 << 20
SHARD_SIZE = 5_000_000_000
_SCRATCH = 6  # part-sized fp32 buffers that an operator may hold beside its inputs, for each model


@dataclass(frozen=True)
class Limits:
    """How much of the machine a build may use: threads, bytes in flight, and the device where torch computes."""

    threads: int
    memory: int
    device: str = CPU

    @classmethod
    def of(cls, threads: int | None, memory: int | None, device: str = CPU) -> Limits:
        """Take what was asked for; else every processor that the process may use, and 256 MB."""
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(threads or usable, memory or MEMORY, device)

    def session(self, plan: Plan) -> tuple[int, Session]:
        """Choose the size of parts and how many threads the memory allows. OutputError where it is too small."""
        surveyed = (inputs for survey in plan.surveys for group in survey.groups.values() for inputs in group)
        entry = max(4, *map(_entry_bytes, plan.steps), *map(_gathered_bytes, surveyed))
        if entry * GRID > self.memory:
            needed = readable(entry * GRID)
            what = f"{readable(self.memory)} is too small: this plan needs {needed}"
            raise OutputError("--memory", what, "give more; without --memory it is 256 MiB")
        threads = max(1, min(self.threads, self.memory // (entry * GRID), self.memory // max(1, _most_held(plan))))
        share = self.memory // threads
        largest = LARGEST_PART if self.device == CPU else LARGEST_ELSEWHERE
        part = max(GRID, min(largest, share // 2 // entry // GRID * GRID))
        return threads, Session(part, keep=share // 2, threads=threads, device=self.device)

    def in_flight(self, plan: Plan) -> int:
        """Estimate the most bytes that a build holds at once, beside what torch itself takes."""
        threads, session = self.session(plan)
        largest = max((_entry_bytes(step) * min(session.part, step.output.entries) for step in plan.steps), default=0)
        if plan.pending:
            groups = plan.pending.survey.groups.values()
            largest = session.part * max((_gathered_bytes(inputs) for group in groups for inputs in group), default=0)
        kept = session.keep if any(step.operator.measure for step in plan.steps) else 0
        return threads * (largest + kept + _most_held(plan))


def _entry_bytes(node: Node) -> int:
    """Count the bytes in flight for one entry of an output, inner steps included."""
    if isinstance(node, Source):
        return 0
    inner = sum(map(_entry_bytes, node.inputs))
    if isinstance(node, Made):
        return inner
    return _gathered_bytes(node.inputs) + inner


def _gathered_bytes(inputs: Inputs) -> int:
    """Count the bytes in flight for one entry of tensors that meet, and what is made of them."""
    count = sum(1 for _ in inputs) + 1
    return count * (1 + _SCRATCH // 2) * (8 if inputs.dtype in ("F64", "I64", "U64") else 4)


def _most_held(plan: Plan) -> int:
    """Count the most bytes that a thread holds beside the parts, in a survey or a step."""
    return max((*map(_held, plan.steps), *(survey.held for survey in plan.surveys)), default=0)


def _held(node: Node) -> int:
    """Count the bytes held beside the parts: by makers, and where parts are widened to whole rows."""
    if isinstance(node, Source):
        return 0
    own = node.held if isinstance(node, Made) else 0
    if isinstance(node, Step):
        width = (node.output.shape or (1,))[-1]
        own = 2 * width * _gathered_bytes(node.inputs) if node.operator.rows else 0
        matrices = node.operator.holds + node.operator.holds_each * sum(1 for _ in node.inputs)
        own += matrices * node.output.entries * (8 if node.inputs.dtype == "F64" else 4)
    return own + sum(map(_held, node.inputs))


def build(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_size: int = SHARD_SIZE,
    threads: int | None = None,
    memory: int | None = None,
    device: str = CPU,
    force: bool = False,
    recipe: str | None = None,
    progress: Progress | None = None,
) -> Receipt:
    """Write a checkpoint, made or stored, to a folder that transformers loads as it is.

    Args:
        checkpoint: what to write.
        out: the folder; it appears whole, or not at all.
        dtype: the dtype of its floats (`bfloat16`); default: what its inputs promote to.
        shard_size: the most bytes in one file.
        threads: how many tensors are made at once; the result does not depend on it.
        memory: bytes in flight; the result does not depend on it.
        device: where torch computes what is not copied byte for byte: `cpu`, `cuda`, `cuda:1`.
        force: replace an earlier result.
        recipe: the recipe's text, for receipt and model card.
        progress: is told how far the work is; default: a bar in a notebook, else nothing.

    Raises MergeError, CheckpointError or OutputError; the first two before any weights are read, where headers show it.
    """
    begun, out, device = time.monotonic(), Path(out), chosen(device)
    progress = progress or default_progress()
    plan = make_plan(checkpoint, parse(dtype) if dtype else None)
    check_place(out, nbytes=plan.bytes_written, force=force)
    limits = Limits.of(threads, memory, device)
    limits.session(plan)  # a budget that is too small is refused here
    with published(out) as folder:
        found = surveyed(plan, limits, progress)
        plan = plan.settled(found)
        writer = Writer(folder, (step.output for step in plan.steps), shard_size, checkpoint.companions.form)
        try:
            digests = carry_out(plan, found, writer, limits, progress)
            writer.finish(forget=crowds_memory(plan))
        finally:
            writer.close()
        beside = checkpoint.companions.with_texts_of(plan.companions)
        companions.write(beside, folder, [step.output for step in plan.steps])
        (folder / "README.md").write_text(model_card.text(plan, recipe, checkpoint.companions.form), encoding="utf-8")
        receipt = make_receipt(plan, Done(digests, found, device), recipe, time.monotonic() - begun, folder)
        receipt.write(folder)
    return receipt


def surveyed(plan: Plan, limits: Limits, progress: Progress) -> dict[Survey, Any]:
    """Carry out the surveys of a plan, inner ones first; give what they found."""
    found: dict[Survey, Any] = {}
    if plan.surveys:
        _, session = limits.session(plan)
        progress.begin("survey", sum(survey.nbytes for survey in plan.surveys), len(plan.surveys))
        for survey in plan.surveys:
            told = _Reading(progress, survey.nbytes)
            found[survey] = conduct(survey, replace(session, found=found), told.advance)
            told.finish()
    return found


class _Reading:
    """Tells how much of a survey's bytes are read; those that it reads again are not counted again."""

    def __init__(self, progress: Progress, nbytes: int) -> None:
        self._progress, self._left, self._lock = progress, nbytes, threading.Lock()

    def advance(self, nbytes: int) -> None:
        """Tell that so many more are read. Called from any thread."""
        with self._lock:
            now = min(nbytes, self._left)
            self._left -= now
        self._progress.advance(now)

    def finish(self) -> None:
        """Tell that the survey is done."""
        self._progress.advance(self._left, 1)


def carry_out(
    plan: Plan, found: Mapping[Survey, Any], writer: Writer, limits: Limits, progress: Progress
) -> dict[str, str]:
    """Make every tensor of a plan and write it; give the BLAKE3 digest of each."""
    threads, session = limits.session(plan)
    session = replace(session, found=found)
    ways = {step: _way(step, session) for step in plan.steps}
    with alone(limits.device) if any(map(_needs_torch, ways.values())) else nullcontext(), _pool(threads) as run:
        progress.begin("merge", plan.bytes_written, len(plan.steps))
        reading = Reading(plan)
        work = (
            [_Making(step, reading.once(ways[step]), writer, progress) for step in steps] for steps in _in_order(plan)
        )
        digests = run(work)
    return {step.output.name: digests[step.output.name] for step in plan.steps}


def _in_order(plan: Plan) -> list[list[Step]]:
    """Put checks first, then what is large; what is computed together stays together."""
    groups: dict[object, list[Step]] = {}
    for step in plan.steps:
        node = step.inputs.models[0]
        shared = node.together if isinstance(node, Made) else None
        groups.setdefault(step if shared is None else shared, []).append(step)
    return sorted(groups.values(), key=lambda s: (s[0].operator.name != "equal", -sum(one.output.nbytes for one in s)))


Way = Callable[[Step], Iterator[memoryview]]


@dataclass(frozen=True)
class _Making:
    """The work on one output tensor: its parts in order, each made, hashed and written."""

    step: Step
    way: Way
    writer: Writer
    progress: Progress

    def __call__(self, stopped: Callable[[], bool]) -> tuple[str, str]:
        """Do it; give the name and the digest. Gives up between two parts once stopped."""
        name, hasher, at = self.step.output.name, blake3.blake3(), 0
        for data in self.way(self.step):
            if stopped():
                break
            hasher.update(data)
            self.writer.put(name, data, at)
            at += len(data)
            self.progress.advance(len(data))
        self.progress.advance(0, 1)
        return name, hasher.hexdigest()


def _way(step: Step, session: Session) -> Way:
    """Choose how the bytes of a tensor are made: carried over, by the compiled library, or by torch."""
    if is_byte_copy(step) or is_shared(step):
        return copied
    if is_compiled(step, session):
        return partial(made, session=session)
    return partial(_by_torch, session=session)


def _by_torch(step: Step, session: Session) -> Iterator[memoryview]:
    return (_raw(values) for _, values in Evaluation(session).parts(step))


def _needs_torch(way: Way) -> bool:
    return isinstance(way, partial) and way.func is _by_torch


def _raw(values: Tensor) -> memoryview:
    import torch

    data: memoryview = values.contiguous().view(torch.uint8).numpy().data
    return data


Run = Callable[[Iterable[Sequence[_Making]]], dict[str, str]]


@contextmanager
def _pool(threads: int) -> Iterator[Run]:
    """Give a way to run groups of work on threads: the first error, or an interrupt, ends it soon."""
    stop = threading.Event()
    with ThreadPoolExecutor(threads, "merge") as pool:

        def one_after_the_other(group: Sequence[_Making]) -> list[tuple[str, str]]:
            return [making(stop.is_set) for making in group]

        def run(work: Iterable[Sequence[_Making]]) -> dict[str, str]:
            futures: list[Future[list[tuple[str, str]]]] = [pool.submit(one_after_the_other, group) for group in work]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in futures:
                    if future in done and future.exception() is not None:
                        future.result()
                return dict(made for future in futures for made in future.result())
            finally:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)

        yield run
