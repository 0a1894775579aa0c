"""How much of the machine a build may use, and what that makes of its parts and threads."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .device import CPU
from .errors import OutputError
from .evaluate import GRID, LARGEST_ELSEWHERE, LARGEST_PART, Session
from .node import Inputs, Made, Node, Source, Step
from .operator import row_width
from .plan import Plan
from .units import readable

MEMORY = 256 << 20
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
        entry = max([4, *map(_entry_bytes, plan.steps), *map(_gathered_bytes, surveyed)])
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
        own = 2 * row_width(node.output.shape) * _gathered_bytes(node.inputs) if node.operator.rows else 0
        matrices = node.operator.holds + node.operator.holds_each * sum(1 for _ in node.inputs)
        own += matrices * node.output.entries * (8 if node.inputs.dtype == "F64" else 4)
    return own + sum(map(_held, node.inputs))
