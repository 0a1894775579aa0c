"""Carrying out a plan: read, compute, hand on what comes out, in bounded memory, on a pool of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import blake3

from .byte_copies import copied, is_byte_copy, is_shared
from .compiled.making import is_compiled, made
from .compiled.surveying import conduct
from .device import alone, raw
from .errors import MergeError
from .evaluate import Evaluation, Session
from .limits import Limits
from .node import Made, Shared, Step, Survey
from .non_finite import Watch, count
from .page_cache import Reading
from .plan import Plan
from .progress import Progress
from .results.journal import Finished, Journal

Put = Callable[[str, memoryview, int], None]  # some bytes of a tensor, at a byte of it


@dataclass(frozen=True)
class Tools:
    """What the making of all tensors of a build shares.

    Attributes:
        put: takes the bytes that were made.
        progress: is told how far the work is.
        watch: finds NaN and infinity; None where nobody asks.
        refuses: whether a tensor in which some are found ends the work.
        journal: is told of finished tensors; None where nothing could be continued.

    """

    put: Put
    progress: Progress
    watch: Watch | None = None
    refuses: bool = False
    journal: Journal | None = None


def surveyed(plan: Plan, limits: Limits, progress: Progress, watch: Watch | None = None) -> dict[Survey, Any]:
    """Carry out the surveys of a plan, inner ones first; give what they found."""
    found: dict[Survey, Any] = {}
    if plan.surveys:
        _, session = limits.session(plan)
        progress.begin("survey", sum(survey.nbytes for survey in plan.surveys), len(plan.surveys))
        for survey in plan.surveys:
            told = _Reading(progress, survey.nbytes)
            found[survey] = conduct(survey, replace(session, found=found, watch=watch), told.advance)
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
    plan: Plan, found: Mapping[Survey, Any], limits: Limits, tools: Tools, finished: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Make every tensor of a plan but the finished ones, whose digests are given; give the BLAKE3 digest of each."""
    threads, session = limits.session(plan)
    session = replace(session, found=found, watch=tools.watch)
    finished = finished or {}
    steps = [step for step in plan.steps if step.output.name not in finished]
    ways = {step: _way(step, session) for step in steps}
    with alone(limits.device) if any(map(_needs_torch, ways.values())) else nullcontext(), _pool(threads) as run:
        tools.progress.begin("merge", plan.bytes_written, len(plan.steps))
        if finished:
            kept = sum(step.output.nbytes for step in plan.steps if step.output.name in finished)
            tools.progress.advance(kept, len(finished))
        reading = Reading(plan, steps)
        digests = run([_Making(step, reading.once(ways[step]), tools) for step in g] for g in _in_order(steps))
    return {step.output.name: finished.get(step.output.name) or digests[step.output.name] for step in plan.steps}


def shared(step: Step) -> Shared | None:
    """Give what a step's tensor shares with others."""
    node = step.inputs.models[0]
    return node.together if isinstance(node, Made) else None


def _in_order(steps: Sequence[Step]) -> list[list[Step]]:
    """Put checks first, then what is large; what is computed together stays together."""
    groups: dict[object, list[Step]] = {}
    for step in steps:
        groups.setdefault(shared(step) or step, []).append(step)
    return sorted(groups.values(), key=lambda s: (s[0].operator.name != "equal", -sum(one.output.nbytes for one in s)))


Way = Callable[[Step], Iterator[memoryview]]


@dataclass(frozen=True)
class _Making:
    """The work on one output tensor: its parts in order, each made, hashed and written."""

    step: Step
    way: Way
    tools: Tools

    def __call__(self, stopped: Callable[[], bool]) -> tuple[str, str]:
        """Do it; give the name and the digest. Gives up between two parts once stopped."""
        name, tools = self.step.output.name, self.tools
        try:
            digest, not_finite = self._made(stopped)
        except (ArithmeticError, ValueError, RuntimeError) as error:
            raise self._blamed(error) from error
        if stopped() and digest is None:
            return name, ""
        assert digest is not None
        clean = tools.watch is not None and not tools.watch.settle(self.step, not_finite)
        if tools.watch is not None and not clean and tools.refuses:
            raise MergeError.of(one.mistake for one in tools.watch.found)
        if tools.journal is not None:
            common = shared(self.step)
            tools.journal.add(Finished(name, digest, clean, common.learned if common is not None else None))
        tools.progress.advance(0, 1)
        return name, digest

    def _made(self, stopped: Callable[[], bool]) -> tuple[str | None, int]:
        """Make the parts; give the digest, unless stopped before the end, and how many entries are not finite."""
        name, dtype, put = self.step.output.name, self.step.output.dtype, self.tools.put
        hasher, at, not_finite = blake3.blake3(), 0, 0
        for data in self.way(self.step):
            if stopped():
                return None, 0
            if self.tools.watch is not None:
                not_finite += count(data, dtype)
            hasher.update(data)
            put(name, data, at)
            at += len(data)
            self.tools.progress.advance(len(data))
        return hasher.hexdigest(), not_finite

    def _blamed(self, error: Exception) -> Exception:
        """Where an operator broke on NaN or infinity in its inputs, say that; they are read again to find out."""
        watch = Watch()
        watch.look(self.step)
        return MergeError.of(one.mistake for one in watch.found) if watch.found else error


def _way(step: Step, session: Session) -> Way:
    """Choose how the bytes of a tensor are made: carried over, by the compiled library, or by torch."""
    if is_byte_copy(step) or is_shared(step):
        return copied
    if is_compiled(step, session):
        return partial(made, session=session)
    return partial(_by_torch, session=session)


def _by_torch(step: Step, session: Session) -> Iterator[memoryview]:
    return (raw(values) for _, values in Evaluation(session).parts(step))


def _needs_torch(way: Way) -> bool:
    return isinstance(way, partial) and way.func is _by_torch


Run = Callable[[Iterable[Sequence[_Making]]], dict[str, str]]


@contextmanager
def _pool(threads: int) -> Iterator[Run]:
    """Give a way to run groups of work on threads: the first error, or an interrupt, ends it soon."""
    stop = threading.Event()
    with ThreadPoolExecutor(threads, "merge") as pool:

        def one_after_the_other(group: Sequence[_Making]) -> list[tuple[str, str]]:
            try:
                return [making(stop.is_set) for making in group]
            except BaseException:
                stop.set()
                raise

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
