"""What will be done, as a value: one step for every output tensor, with its inputs, settings and reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, TensorSpec
from .dtypes import is_float, working
from .errors import MergeError, Mistake
from .operator import Measure, Operator, find

if TYPE_CHECKING:
    from .stored import StoredCheckpoint


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """A stored tensor: the checkpoint that holds it, and its spec there."""

    checkpoint: StoredCheckpoint
    spec: TensorSpec

    @property
    def output(self) -> TensorSpec:
        """What reading it gives."""
        return self.spec

    def __str__(self) -> str:
        """Checkpoint and tensor, as plans show them."""
        return f"{self.checkpoint.label}:{self.spec.name}"


@dataclass(frozen=True, eq=False, slots=True)
class Inputs:
    """The tensors that meet in one operation: those of the models, in order, and the base's where there is one."""

    models: tuple[Source | Step, ...]
    base: Source | Step | None = None

    def __iter__(self) -> Iterator[Source | Step]:
        """Go through the models', then the base's."""
        yield from self.models
        if self.base is not None:
            yield self.base

    @property
    def dtype(self) -> str:
        """The dtype in which they are computed; their own where they are no floats."""
        kinds = [node.output.dtype for node in self]
        return working(kinds) if all(is_float(kind) for kind in kinds) else kinds[0]


@dataclass(frozen=True, eq=False, slots=True)
class Survey:
    """A named pass over many tensors, before the steps, whose result is a setting of some of them.

    Attributes:
        title: what is found, as the plan shows it: `mean absolute change of layer 5`.
        measure: function of (parts, **settings), as an operator's: the parts run over all tensors, one after the other.
        inputs: the tensors, those that meet in one operation together; taken as deltas where there is a base.
        settings: passed on to the measure.
        why: the recipe line that asked for it.

    """

    title: str
    measure: Measure
    inputs: tuple[Inputs, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""

    @property
    def nbytes(self) -> int:
        """The bytes that it reads."""
        return sum(source.spec.nbytes for inputs in self.inputs for node in inputs for source in sources(node))


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """How one output tensor is made.

    Attributes:
        output: name, dtype and shape of the result.
        operator: what is done.
        settings: its settings for this tensor; a Survey stands for the value that it will find.
        inputs: the tensors that it is done to: stored ones, or the results of other steps.
        labels: what the models are called; feeds the random streams.
        why: the recipe line that asked for it.

    """

    output: TensorSpec
    operator: Operator
    settings: Mapping[str, Any]
    inputs: Inputs
    labels: tuple[str, ...] = ()
    why: str = ""

    def __post_init__(self) -> None:
        """Hold the shapes together: compositions have checked them."""
        assert all(node.output.shape == self.output.shape for node in self.inputs), self.output.name


Node = Source | Step


def copy_of(node: Node, output: TensorSpec, label: str, why: str = "") -> Step:
    """Make the step that takes a tensor as it is."""
    return Step(output, find("copy"), {}, Inputs((node,)), (label,), why)


def sources(node: Node) -> Iterator[Source]:
    """Go through the stored tensors that a node is made from."""
    if isinstance(node, Source):
        yield node
    else:
        for inner in node.inputs:
            yield from sources(inner)


def _surveys(node: Node) -> Iterator[Survey]:
    if isinstance(node, Step):
        for value in node.settings.values():
            if isinstance(value, Survey):
                yield from (found for inputs in value.inputs for inner in inputs for found in _surveys(inner))
                yield value
        for inner in node.inputs:
            yield from _surveys(inner)


@dataclass(frozen=True)
class Plan:
    """A whole merge: a step for every output tensor in output order, and what the user should know about them."""

    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def surveys(self) -> tuple[Survey, ...]:
        """The passes that come before the steps, each once, inner ones first."""
        return tuple(dict.fromkeys(survey for step in self.steps for survey in _surveys(step)))

    @cached_property
    def checkpoints(self) -> tuple[StoredCheckpoint, ...]:
        """The stored checkpoints that are read, in the order of their first use."""
        found = [source.checkpoint for step in self.steps for source in sources(step)]
        found += [s.checkpoint for y in self.surveys for inputs in y.inputs for n in inputs for s in sources(n)]
        return tuple(dict.fromkeys(found))

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs of all steps and surveys. What an operator measures in a large tensor is read again."""
        steps = sum(source.spec.nbytes for step in self.steps for source in sources(step))
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
        raise MergeError.of(mistakes)
    return Plan(tuple(steps), getattr(checkpoint, "notes", ()))


def _refusals(node: Node) -> Iterator[Mistake]:
    """Ask the operators whether the settings can be meant; a Survey's value is not known yet."""
    if isinstance(node, Step):
        known = {key: value for key, value in node.settings.items() if not isinstance(value, Survey)}
        reason = node.operator.refuses(len(node.inputs.models), known)
        if reason:
            yield Mistake(node.why, f"{node.operator.name}: {reason}", f"first seen at tensor {node.output.name}")
        for inner in node.inputs:
            yield from _refusals(inner)
