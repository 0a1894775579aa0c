"""What will be done, as a value: one step for every output tensor, with its inputs, settings and reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from .checkpoint import Checkpoint
from .dtypes import is_float
from .errors import MergeError, Mistake
from .node import Finding, Node, Origin, Step, Survey, copy_of, sources, surveys


@dataclass(frozen=True)
class Plan:
    """A whole merge: a step for every output tensor in output order, and what the user should know about them."""

    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def surveys(self) -> tuple[Survey, ...]:
        """The passes that come before the steps, each once, inner ones first."""
        return tuple(dict.fromkeys(survey for step in self.steps for survey in surveys(step)))

    @cached_property
    def checkpoints(self) -> tuple[Origin, ...]:
        """The stored checkpoints that are read, in the order of their first use."""
        found = [source for step in self.steps for source in sources(step)]
        found += [source for survey in self.surveys for node in survey for source in sources(node)]
        return tuple(dict.fromkeys(origin for source in found for origin in source.origins))

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs of all steps and surveys. What an operator measures in a large tensor is read again."""
        steps = sum(source.stored_bytes for step in self.steps for source in sources(step))
        return steps + sum(survey.nbytes for survey in self.surveys)

    @property
    def bytes_written(self) -> int:
        """Bytes of all output tensors."""
        return sum(step.output.nbytes for step in self.steps)


def make_plan(checkpoint: Checkpoint, dtype: str | None = None) -> Plan:
    """Plan the writing of a checkpoint, its floats in another dtype if one is given (`BF16`).

    Raises MergeError for settings that an operator refuses, all of them at once.
    """
    steps = []
    for name, spec in checkpoint.specs.items():
        node = checkpoint.node(name)
        output = replace(spec, dtype=dtype) if dtype and is_float(spec.dtype) else spec
        steps.append(
            replace(node, output=output) if isinstance(node, Step) else copy_of(node, output, checkpoint.label)
        )
    mistakes = [mistake for step in steps for mistake in _refusals(step)]
    if mistakes:
        raise MergeError.of({(mistake.where, mistake.what): mistake for mistake in reversed(mistakes)}.values())
    return Plan(tuple(steps), getattr(checkpoint, "notes", ()))


def _refusals(node: Node) -> Iterator[Mistake]:
    """Ask the operators whether the settings can be meant; what a survey will find is not known yet."""
    if isinstance(node, Step):
        known = {key: value for key, value in node.settings.items() if not isinstance(value, Finding)}
        reason = node.operator.refuses(len(node.inputs.models), known)
        if reason:
            yield Mistake(node.why, f"{node.operator.name}: {reason}", f"first seen at tensor {node.output.name}")
        for inner in node.inputs:
            yield from _refusals(inner)
