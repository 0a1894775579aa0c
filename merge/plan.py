"""What will be done, as a value: one step for every output tensor, with its inputs, settings and reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .cards.parent_cards import licence_note, read_cards
from .checkpoint import Checkpoint
from .companions import Companions
from .dtypes import is_float
from .errors import MergeError, Mistake
from .node import Finding, Node, Source, Step, Store, Survey, copy_of, sources, steps, surveys
from .operator import Operator
from .origins import strips
from .surveyed import Surveyed
from .units import readable


@dataclass(frozen=True)
class Pending:
    """A plan whose steps only a survey can tell.

    Attributes:
        survey: what must be found.
        most: the most bytes that the steps will write.
        settle: makes the plan of what was found.

    """

    survey: Survey
    most: int
    settle: Callable[[Any], Plan]


@dataclass(frozen=True, repr=False)
class Plan:
    """A whole merge: a step for every output tensor in output order, what the user should know, what stands beside."""

    steps: tuple[Step, ...]
    notes: tuple[str, ...] = ()
    pending: Pending | None = None
    companions: Companions = field(default_factory=Companions)

    def __repr__(self) -> str:
        """How much it makes, and of what."""
        most = "at most " if self.pending else ""
        count = "tensors that a survey will tell" if self.pending else f"{len(self.steps)} tensors"
        return f"<Plan: {count}, reads {readable(self.bytes_read)}, writes {most}{readable(self.bytes_written)}>"

    def _repr_html_(self) -> str:
        """A table of what is done, and the models that each layer comes from, for notebooks."""
        from . import notebook

        groups: dict[tuple[str, str], list[int]] = {}
        for step in self.steps:
            groups.setdefault((step.operator.name, ", ".join(step.labels)), []).append(step.output.nbytes)
        rows = [(name, of, len(sizes), readable(sum(sizes))) for (name, of), sizes in groups.items()]
        told = [(f"survey first: {one.title}", "", "", readable(one.nbytes)) for one in self.surveys]
        notes = [(f"note: {note}", "", "", "") for note in self.notes]
        shown = notebook.table(repr(self)[1:-1], ("operator", "of", "tensors", "bytes"), [*told, *rows, *notes])
        return shown + notebook.picture(strips(self.steps))

    def settled(self, found: Mapping[Survey, Any]) -> Plan:
        """Give the plan with all its steps, once the surveys are carried out."""
        return self.pending.settle(found[self.pending.survey]) if self.pending else self

    @cached_property
    def surveys(self) -> tuple[Survey, ...]:
        """The passes that come before the steps, each once, inner ones first."""
        found = [survey for step in self.steps for survey in surveys(step)]
        if self.pending:
            found += [survey for node in self.pending.survey for survey in surveys(node)]
            found.append(self.pending.survey)
        return tuple(dict.fromkeys(found))

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """The stored tensors that are read, as often as they are read."""
        found = [source for step in self.steps for source in sources(step)]
        return (*found, *(source for survey in self.surveys for node in survey for source in sources(node)))

    @cached_property
    def checkpoints(self) -> tuple[Store, ...]:
        """The stored checkpoints that are read, in the order of their first use."""
        return tuple(dict.fromkeys(source.checkpoint for source in self.sources))

    @property
    def operators(self) -> tuple[Operator, ...]:
        """What the steps do, and those inside that steps and surveys read."""
        read = (*self.steps, *(node for survey in self.surveys for node in survey))
        return tuple({step.operator.name: step.operator for node in read for step in steps(node)}.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs of all steps and surveys. What an operator measures in a large tensor is read again."""
        return sum(source.spec.nbytes for source in self.sources)

    @property
    def bytes_written(self) -> int:
        """Bytes of all output tensors; where a survey must settle them, the most that they can be."""
        return sum(step.output.nbytes for step in self.steps) + (self.pending.most if self.pending else 0)


def make_plan(checkpoint: Checkpoint, dtype: str | None = None) -> Plan:
    """Plan the writing of a checkpoint, its floats in another dtype if one is given (`BF16`).

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> make_plan(InMemory("ones", {"weight": torch.ones(2, 3)}), "BF16")
    <Plan: 1 tensors, reads 24 B, writes 12 B>

    Raises MergeError for settings that an operator refuses, all of them at once.
    """
    if isinstance(checkpoint, Surveyed):

        def settle(found: Any) -> Plan:
            plan = make_plan(checkpoint.settle(found), dtype)
            return replace(plan, notes=tuple(dict.fromkeys((*checkpoint.notes, *plan.notes))))

        pending = Pending(checkpoint.survey, checkpoint.most, settle)
        return Plan((), checkpoint.notes, pending, checkpoint.companions)
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
    plan = Plan(tuple(steps), checkpoint.notes, companions=checkpoint.companions)
    note = licence_note(read_cards(plan.checkpoints))
    return replace(plan, notes=(*plan.notes, *note)) if note else plan


def _refusals(node: Node) -> Iterator[Mistake]:
    """Ask the operators whether the settings can be meant; what a survey will find is not known yet."""
    if isinstance(node, Step):
        known = {key: value for key, value in node.settings.items() if not isinstance(value, Finding)}
        reason = node.operator.refuses(len(node.inputs.models), known)
        if reason:
            yield Mistake(node.why, f"{node.operator.name}: {reason}", f"first seen at tensor {node.output.name}")
    if not isinstance(node, Source):
        for inner in node.inputs:
            yield from _refusals(inner)
