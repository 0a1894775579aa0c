"""Making a tensor, part by part: read the inputs, measure what must be known of the whole, apply the operator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .dtypes import byte_size, torch_dtype
from .errors import MergeError, Mistake, PortmanteauError
from .node import Finding, Inputs, Node, Source, Step, Survey, sources
from .operator import Part, Parts, call

if TYPE_CHECKING:
    from torch import Tensor

GRID = 1 << 16  # parts begin at multiples of so many entries
LARGEST_PART = 1 << 18  # so that the buffers of a part stay in the cache and are reused


@dataclass(frozen=True)
class Session:
    """What all tensors of one build share: the size of parts, what may be kept, and what the surveys found.

    Attributes:
        part: entries in a part; a multiple of GRID.
        keep: a tensor whose inputs take at most so many bytes is held in memory between measuring and applying.
        found: the surveys' results.

    """

    part: int = LARGEST_PART
    keep: int = 1 << 26
    found: Mapping[Survey, Any] = field(default_factory=dict)

    def spans(self, entries: int) -> Iterator[slice]:
        """Cut a tensor of so many entries into parts."""
        return (slice(start, min(start + self.part, entries)) for start in range(0, entries, self.part))


class Evaluation:
    """The making of one output tensor: what was measured for it is measured once."""

    def __init__(self, session: Session) -> None:
        """Begin with nothing measured."""
        self._session = session
        self._measured: dict[Step, Any] = {}
        self._kept: dict[Step, list[tuple[Tensor, ...]]] = {}

    def parts(self, step: Step) -> Iterator[tuple[slice, Tensor]]:
        """Make the tensor: its parts in order, flat, in the output's dtype."""
        dtype = torch_dtype(step.output.dtype)
        for span in self._session.spans(step.output.entries):
            yield span, self.apply(step, span).to(dtype)

    def _value(self, node: Node, span: slice) -> Tensor:
        """Make a run of entries: of a stored tensor in its dtype, of a step's result in its working dtype."""
        if isinstance(node, Source):
            return node.checkpoint.read(node.spec.name, span)
        return self.apply(node, span)

    def apply(self, step: Step, span: slice) -> Tensor:
        """Carry out one step on a run of entries, in the working dtype."""
        operator = step.operator
        settings = self._resolved(step.settings)
        streams = tuple(_stream(step.output.name, label) for label in step.labels)
        try:
            measured = self._measure(step, settings, streams)
            tensors = self._gathered(step, span)
            part = Part(span.start, streams, measured)
            result = operator.apply(*self._roles(step, tensors), **settings, part=part)
        except PortmanteauError as error:
            raise _located(error, step) from error
        return result + tensors[-1] if operator.on_deltas else result

    def _roles(self, step: Step, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tensors if "base" in step.operator.roles else tensors[:1]

    def _measure(self, step: Step, settings: Mapping[str, Any], streams: tuple[int, ...]) -> Any:
        """Find, once, what the operator must know of the whole tensor."""
        if step.operator.measure is None:
            return None
        if step not in self._measured:
            spans = [*self._session.spans(step.output.entries)] or [slice(0, 0)]
            if self._fits(step.inputs):
                self._kept[step] = [self._gather(step.inputs, span, deltas=step.operator.on_deltas) for span in spans]
            begin = lambda: (self._roles(step, self._gathered(step, span)) for span in spans)  # noqa: E731
            parts = Parts(begin, len(step.inputs.models), step.output.entries)
            self._measured[step] = call(step.operator.measure, parts, **settings, streams=streams)
        return self._measured[step]

    def _fits(self, inputs: Inputs) -> bool:
        """Tell whether all inputs of a tensor may be held in memory at once."""
        first = next(iter(inputs)).output
        return byte_size(inputs.dtype, first.entries) * sum(1 for _ in inputs) <= self._session.keep

    def _gathered(self, step: Step, span: slice) -> tuple[Tensor, ...]:
        kept = self._kept.get(step)
        if kept is not None:
            index: int = span.start // self._session.part
            return kept[index]
        return self._gather(step.inputs, span, deltas=step.operator.on_deltas)

    def _gather(self, inputs: Inputs, span: slice, *, deltas: bool) -> tuple[Tensor, ...]:
        """Read a run of all models, stacked [n, run], as deltas if asked, and of the base, if there is one, [run]."""
        import torch

        dtype = torch_dtype(inputs.dtype)
        models = torch.empty((len(inputs.models), span.stop - span.start), dtype=dtype)
        for row, node in zip(models, inputs.models, strict=True):
            row.copy_(self._value(node, span))
        if inputs.base is None:
            return (models,)
        base = self._value(inputs.base, span).to(dtype)
        return (models.sub_(base) if deltas else models), base

    def _resolved(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        found = self._session.found
        return {k: found[v.survey][v.key] if isinstance(v, Finding) else v for k, v in settings.items()}

    def survey(self, survey: Survey) -> Any:
        """Carry out a survey: go through all its tensors, part by part."""
        groups = {key: self.together(group) for key, group in survey.groups.items()}
        return survey.measure(groups, **survey.settings)

    def together(self, group: tuple[Inputs, ...]) -> Parts:
        """Give the parts of several tensors, one after the other."""

        def parts() -> Iterator[tuple[Tensor, ...]]:
            for inputs in group:
                for span in self._session.spans(next(iter(inputs)).output.entries):
                    yield self._gather(inputs, span, deltas=inputs.base is not None)

        entries = sum(next(iter(inputs)).output.entries for inputs in group)
        return Parts(parts, len(group[0].models), entries)


def _stream(tensor: str, label: str) -> int:
    """Give the number of the random stream of one model in one tensor."""
    return int.from_bytes(hashlib.blake2b(f"{tensor}\0{label}".encode(), digest_size=8).digest(), "little")


def _located(error: PortmanteauError, step: Step) -> PortmanteauError:
    """Say at which tensor, and by which line of the recipe, an operator refused."""
    if error.mistakes[0].where:
        return error
    inputs = ", ".join(dict.fromkeys(source.checkpoint.label for source in sources(step)))
    where = f"{step.why}: tensor {step.output.name} of {inputs}".removeprefix(": ")
    return MergeError.of(Mistake(where, f"{step.operator.name}: {m.what}", m.hint) for m in error.mistakes)
