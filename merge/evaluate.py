"""Making a tensor, part by part: read the inputs, measure what must be known of the whole, apply the operator."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from .device import CPU, Device
from .dtypes import byte_size, is_float, torch_dtype
from .errors import MergeError, Mistake, PortmanteauError
from .node import Finding, Inputs, Made, Node, Source, Step, Survey, sources
from .non_finite import Watch
from .operator import Part, Parts, call, row_width

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GRID = 1 << 16  # parts begin at multiples of so many entries
LARGEST_PART = 1 << 18  # so that the buffers of a part stay in the cache and are reused
LARGEST_ELSEWHERE = 1 << 22  # on a GPU, whose every operation costs a launch


@dataclass(frozen=True)
class Session:
    """What all tensors of one build share: the size of parts, what may be kept, and what the surveys found.

    Attributes:
        part: entries in a part; a multiple of GRID.
        keep: a tensor whose inputs take at most so many bytes is held in memory between measuring and applying.
        found: the surveys' results.
        threads: how many parts a survey may read at once.
        device: where torch computes.
        watch: is shown what is read, to find NaN and infinity; None where nobody asks.

    """

    part: int = LARGEST_PART
    keep: int = 1 << 26
    found: Mapping[Survey, Any] = field(default_factory=dict)
    threads: int = 1
    device: str = CPU
    watch: Watch | None = None

    def spans(self, entries: int) -> Iterator[slice]:
        """Cut a tensor of so many entries into parts."""
        return (slice(start, min(start + self.part, entries)) for start in range(0, entries, self.part))


class Evaluation:
    """The making of one output tensor: what was measured for it is measured once, whichever thread asks first."""

    def __init__(self, session: Session) -> None:
        """Begin with nothing measured."""
        self._session = session
        self._device = Device(session.device)
        self._lock = threading.RLock()
        self._measured: dict[Step, Any] = {}
        self._prepared: dict[Made, Any] = {}
        self._kept: dict[Step, list[tuple[Tensor, ...]]] = {}

    def parts(self, node: Node) -> Iterator[tuple[slice, Tensor]]:
        """Make the tensor: its parts in order, flat, in the output's dtype, in the processor's memory."""
        dtype = torch_dtype(node.output.dtype)
        for span in self._session.spans(node.output.entries):
            with self._device.own_stream():
                values = self._device.fetched(rounded(self.value(node, span), node, dtype))
            yield span, values

    def value(self, node: Node, span: slice) -> Tensor:
        """Make a flat run of entries, in the dtype of a stored or made tensor, in the working one of a step."""
        if isinstance(node, Source):
            return self._read(node, span)
        return self._made(node, span) if isinstance(node, Made) else self._applied(node, span)

    def _read(self, source: Source, span: slice | None = None) -> Tensor:
        watch = self._session.watch
        look = partial(watch.see, source) if watch is not None and is_float(source.spec.dtype) else None
        return self._device.read(source, span, look)

    def _made(self, node: Made, span: slice) -> Tensor:
        def read(index: int, part: slice | None) -> Tensor:
            inner = node.inputs[index]
            return self.value(inner, part) if part is not None else self._whole(inner)

        with self._lock:
            if node not in self._prepared:
                self._prepared[node] = node.maker.prepare(read)
        return node.maker.run(span, read, self._prepared[node]).to(self._device.name)  # where it was made of nothing

    def _whole(self, node: Node) -> Tensor:
        """Make a whole tensor, in its shape, in the dtype that `value` gives."""
        import torch

        if isinstance(node, Source):
            return self._read(node)
        spans = [*self._session.spans(node.output.entries)] or [slice(0, 0)]
        return torch.cat([self.value(node, span) for span in spans]).reshape(node.output.shape)

    def _applied(self, step: Step, span: slice) -> Tensor:
        """Carry out one step on a run of entries."""
        operator = step.operator
        settings = resolved(step.settings, self._session)
        streams = tuple(stream(step.output.name, label) for label in step.labels)
        try:
            measured = self._measure(step, settings, streams)
            run = whole_rows(span, step.output.shape) if operator.rows else span
            tensors = self._gathered(step, run)
            part = Part(run.start, step.output.shape, streams, measured)
            result = operator.apply(*self._roles(step, tensors), **settings, part=part)
        except PortmanteauError as error:
            raise located(error, step) from error
        result = result + tensors[-1] if step.on_deltas else result
        return result[span.start - run.start : span.stop - run.start]

    def _roles(self, step: Step, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tensors[: len(step.operator.roles)]

    def _measure(self, step: Step, settings: Mapping[str, Any], streams: tuple[int, ...]) -> Any:
        """Find, once, what the operator must know of the whole tensor."""
        if step.operator.measure is None:
            return None
        with self._lock:
            if step not in self._measured:
                self._measured[step] = self._measuring(step, settings, streams)
        return self._measured[step]

    def _measuring(self, step: Step, settings: Mapping[str, Any], streams: tuple[int, ...]) -> Any:
        assert step.operator.measure is not None
        spans = [*self._session.spans(step.output.entries)] or [slice(0, 0)]
        if step.operator.rows:
            spans = [*rows_beginning_in(spans, step.output.shape)]
        elif self._fits(step.inputs):
            self._kept[step] = [self.gather(step.inputs, span, deltas=step.on_deltas) for span in spans]
        runs = lambda: (partial(self._part, step, span) for span in spans)  # noqa: E731
        parts = Parts(runs, len(step.inputs.models), step.output.shape, name=step.output.name)
        return call(step.operator.measure, parts, **settings, streams=streams)

    def _part(self, step: Step, span: slice) -> tuple[Tensor, ...]:
        return self._roles(step, self._gathered(step, span))

    def _fits(self, inputs: Inputs) -> bool:
        """Tell whether all inputs of a tensor may be held in memory at once."""
        first = next(iter(inputs)).output
        return byte_size(inputs.dtype, first.entries) * sum(1 for _ in inputs) <= self._session.keep

    def _gathered(self, step: Step, span: slice) -> tuple[Tensor, ...]:
        kept = self._kept.get(step)
        index, rest = divmod(span.start, self._session.part)
        if kept is not None and not rest and kept[index][0].shape[1] == span.stop - span.start:
            run: tuple[Tensor, ...] = kept[index]
            return run
        return self.gather(step.inputs, span, deltas=step.on_deltas)

    def gather(self, inputs: Inputs, span: slice, *, deltas: bool) -> tuple[Tensor, ...]:
        """Read a run of all models, stacked [n, run], as deltas if asked; of importances, [n, run]; of the base, [run].

        The last two only where they are given.
        """
        dtype = torch_dtype(inputs.dtype)
        models = self._stacked(inputs.models, span, dtype)
        beside = (self._stacked(inputs.importances, span, dtype),) if inputs.importances else ()
        if inputs.base is None:
            return (models, *beside)
        base = self.value(inputs.base, span).to(dtype)
        return (models.sub_(base) if deltas else models, *beside, base)

    def _stacked(self, nodes: tuple[Node, ...], span: slice, dtype: torch.dtype) -> Tensor:
        """Read a run of several tensors: [n, run]."""
        import torch

        stack = torch.empty((len(nodes), span.stop - span.start), dtype=dtype, device=self._device.name)
        for row, node in zip(stack, nodes, strict=True):
            row.copy_(self.value(node, span))
        return stack


def rounded(values: Tensor, node: Node, dtype: torch.dtype) -> Tensor:
    """Cast to the output's dtype. MergeError where eight bits cannot hold an entry: torch would cut it off, unsaid."""
    import torch

    if dtype.itemsize == 1 and dtype.is_floating_point and values.dtype != dtype and values.numel():
        largest, most = float(values.abs().max()), torch.finfo(dtype).max
        if largest > most:
            name = str(dtype).removeprefix("torch.")
            what = f"an entry of magnitude {largest:g} does not fit into {name}, whose largest is {most:g}"
            raise MergeError(f"tensor {node.output.name}", what, "write it as bfloat16: output: {dtype: bfloat16}")
    return values.to(dtype)


def resolved(settings: Mapping[str, Any], session: Session) -> dict[str, Any]:
    """Put what surveys found in the place of findings."""
    found = session.found
    return {k: found[v.survey][v.key] if isinstance(v, Finding) else v for k, v in settings.items()}


def conduct(survey: Survey, session: Session, advance: Callable[[int], None] = lambda _: None) -> Any:
    """Carry out a survey: go through all its tensors, part by part. `advance` is told how many bytes each part has."""
    groups = {key: together(group, session, advance) for key, group in survey.groups.items()}
    return survey.measure(groups, **survey.settings)


def together(group: tuple[Inputs, ...], session: Session, advance: Callable[[int], None] = lambda _: None) -> Parts:
    """Give the parts of several tensors, one after the other, as deltas where there is a base."""

    def run(inputs: Inputs, nbytes: int, gather: Callable[..., tuple[Tensor, ...]], span: slice) -> tuple[Tensor, ...]:
        found = gather(inputs, span, deltas=inputs.base is not None)
        advance(nbytes * (span.stop - span.start) // max(1, next(iter(inputs)).output.entries))
        return found

    def runs() -> Iterator[Callable[[], tuple[Tensor, ...]]]:
        for inputs in group:
            gather = Evaluation(session).gather
            nbytes = sum(source.spec.nbytes for node in inputs for source in sources(node))
            for span in session.spans(next(iter(inputs)).output.entries):
                yield partial(run, inputs, nbytes, gather, span)

    entries = sum(next(iter(inputs)).output.entries for inputs in group)
    return Parts(runs, len(group[0].models), (entries,), session.threads)


def whole_rows(span: slice, shape: tuple[int, ...]) -> slice:
    """Widen a run of entries to the rows that it touches.

    >>> whole_rows(slice(5, 8), (4, 3)), whole_rows(slice(5, 8), (12,))
    (slice(3, 9, None), slice(0, 12, None))
    """
    width = row_width(shape)
    return slice(span.start // width * width, -(-span.stop // width) * width)


def rows_beginning_in(spans: Iterable[slice], shape: tuple[int, ...]) -> Iterator[slice]:
    """Cut a tensor into runs of whole rows: for every span, in order, the rows that begin in it.

    >>> list(rows_beginning_in([slice(0, 4), slice(4, 5), slice(5, 9)], (3, 3)))
    [slice(0, 6, None), slice(6, 9, None)]
    """
    end = 0
    for span in spans:
        start, end = end, max(end, whole_rows(slice(0, span.stop), shape).stop)
        if start < end or span.stop == 0:
            yield slice(start, end)


def stream(tensor: str, label: str) -> int:
    """Give the number of the random stream of one model in one tensor."""
    return int.from_bytes(hashlib.blake2b(f"{tensor}\0{label}".encode(), digest_size=8).digest(), "little")


def located(error: PortmanteauError, step: Step) -> PortmanteauError:
    """Say at which tensor, and by which line of the recipe, an operator refused."""
    if error.mistakes[0].where:
        return error
    inputs = ", ".join(dict.fromkeys(source.checkpoint.label for source in sources(step)))
    where = f"{step.why}: tensor {step.output.name} of {inputs}".removeprefix(": ")
    return MergeError.of(Mistake(where, f"{step.operator.name}: {m.what}", m.hint) for m in error.mistakes)
