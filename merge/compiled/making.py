"""Making a tensor without torch: its inputs read as they are stored, its entries made by the compiled library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from ..device import CPU
from ..dtypes import byte_size
from ..errors import PortmanteauError
from ..evaluate import Session, located, resolved, stream
from ..node import Inputs, Made, Node, Source, Step, steps
from ..operator import call
from .arena import ALIGNMENT, Arena, arena
from .library import DTYPES, NO_TENSOR, Stored, library
from .runs import Form, Run


def is_compiled(node: Node, session: Session) -> bool:
    """Tell whether a tensor can be made so: by what has a compiled form, from stored floats of 16 or 32 bits."""
    if session.device != CPU:
        return False
    if isinstance(node, Source):
        return node.output.dtype in DTYPES
    if library() is None or not all(is_compiled(inner, session) for inner in node.inputs):
        return False
    if isinstance(node, Made):  # what is read whole has room for parts only of what it is made of
        stored = all(isinstance(inner, Source) for inner in node.inputs)
        return node.compiled is not None and (stored or not node.compiled.whole)
    if _carried(node) is not None:
        return True
    if node.operator.compiled is None or node.inputs.importances:
        return False
    floats = all(one.output.dtype in DTYPES for one in (node, *node.inputs))
    return floats and _form(node, session) is not None


def revisits(node: Node, session: Session) -> bool:
    """Tell whether one of the steps inside must go through whole tensors before it makes a part. All are compiled."""
    forms = (_form(step, session) for step in steps(node))
    return any(form is not None and form.revisits for form in forms)


def made(step: Step, session: Session) -> Iterator[memoryview]:
    """Make a tensor: the bytes of its parts, in order, each valid until the next is asked for."""
    spec, work = step.output, _work(_carried(step) or step, session, step.output.dtype)
    size = byte_size(spec.dtype, min(session.part, spec.entries))
    memory = arena(work.size + size + ALIGNMENT)
    work.settle(memory)
    out, address = memory.take(size)
    for span in session.spans(spec.entries):
        work.make(span, address)
        yield out[: byte_size(spec.dtype, span.stop - span.start)]


def _carried(step: Step) -> Made | None:
    """Give the made tensor that a step only carries over."""
    (first, *others) = step.inputs
    carried = step.is_copy and isinstance(first, Made) and not others and first.output.dtype == step.output.dtype
    return first if carried and isinstance(first, Made) else None


def _work(node: Made | Step, session: Session, dtype: str) -> _Applied | _OfWhole:
    return _OfWhole(node, session) if isinstance(node, Made) else _Applied(node, session, dtype)


def _form(step: Step, session: Session) -> Form | None:
    assert step.operator.compiled is not None
    settings = resolved(step.every_setting, session)
    found: Form | None = call(step.operator.compiled, count=len(step.inputs.models), **settings)
    return found


def _is_made(node: Node) -> bool:
    return not isinstance(node, Source)


def _read_as(node: Node) -> str:
    return "F32" if isinstance(node, Step) else node.output.dtype  # a step gives its working dtype


class _Input:
    """One of the tensors that are read: stored, or made in the same way."""

    def __init__(self, node: Node, session: Session, held: bool) -> None:
        self._node = node
        self._dtype = _read_as(node)
        self._inner = None if isinstance(node, Source) else _work(node, session, self._dtype)
        self._held, self._watch = held, session.watch
        self._filled = 0  # entries that are there already, where all are held
        entries = node.output.entries
        self._own = byte_size(self._dtype, entries if held else min(session.part, entries))
        self.size: int = self._own + ALIGNMENT + (self._inner.size if self._inner else 0)

    def settle(self, memory: Arena) -> None:
        """Take the memory that is needed."""
        if self._inner is not None:
            self._inner.settle(memory)
        self._view, self._address = memory.take(self._own)

    def read(self, span: slice, *, look: bool, spreads: bool) -> Stored:
        """Give a run of entries.

        `look`: see whether they are finite. `spreads`: what is not is so in the result too, and is found there.
        """
        start, size = byte_size(self._dtype, span.start), byte_size(self._dtype, span.stop - span.start)
        at = start if self._held else 0
        if span.stop > self._filled:
            if isinstance(self._node, Source):
                self._node.checkpoint.read_into(self._node.spec.name, self._view[at : at + size], start)
            else:
                assert self._inner is not None
                self._inner.make(span, self._address + at, spreads=spreads)
            self._filled = span.stop if self._held else 0
        if look and self._watch is not None and isinstance(self._node, Source):
            self._watch.see(self._node, self._view[at : at + size])
        return Stored(self._address + at, DTYPES[self._dtype])


class Met:
    """The tensors that meet in one operation, read run by run."""

    def __init__(self, inputs: Inputs, session: Session, *, held: bool = False) -> None:
        """Say what is read; `held`: what is made of it is kept, so that it is made once."""
        self._models = [_Input(node, session, held and _is_made(node)) for node in inputs.models]
        base = inputs.base
        self._base = _Input(base, session, held and _is_made(base)) if base is not None else None
        self._every = [*self._models, *([self._base] if self._base else [])]
        self.size = sum(one.size for one in self._every)

    def settle(self, memory: Arena) -> None:
        """Take the memory that is needed."""
        for one in self._every:
            one.settle(memory)

    def run(self, span: slice, *, look: bool, spreads: bool = False) -> Run:
        """Read a run of them all; `look` and `spreads` as for one of them."""
        read = partial(_Input.read, span=span, look=look, spreads=spreads)
        models: Any = (Stored * len(self._models))(*map(read, self._models))
        return Run(span.start, span.stop - span.start, models, read(self._base) if self._base else NO_TENSOR)


class _Applied:
    """What a step makes: its inputs are gone through as often as its form needs."""

    def __init__(self, step: Step, session: Session, dtype: str) -> None:
        found = _form(step, session)
        assert found is not None
        self.entries = step.output.entries
        self.streams: Sequence[int] = [stream(step.output.name, label) for label in step.labels]
        self._step, self._session, self._form, self._dtype = step, session, found, DTYPES[dtype]
        self._is_measured = False
        total = sum(byte_size(_read_as(node), self.entries) for node in step.inputs if _is_made(node))
        self.held = found.revisits and 0 < total <= 2 * session.keep  # there is no scratch beside it, as torch needs
        self._met = Met(step.inputs, session, held=self.held)
        self._scratch = found.scratch(self.entries)
        self.size = self._met.size + self._scratch + ALIGNMENT

    def settle(self, memory: Arena) -> None:
        """Take the memory that is needed."""
        self._met.settle(memory)
        self.scratch = memory.take(self._scratch)[1]

    def make(self, span: slice, out: int, *, spreads: bool = True) -> None:
        """Make a run of the result at an address; `spreads`: what is not finite in it will be so in the end."""
        try:
            if not self._is_measured:
                self._form, self._is_measured = self._form.measured(self), True
            spreads = spreads and self._form.spreads
            self._form.make(self._met.run(span, look=not spreads, spreads=spreads), out, self._dtype)
        except PortmanteauError as error:
            raise located(error, self._step) from error

    def runs(self, share: int = 1, start: int = 0) -> Iterator[Run]:
        """Read all inputs, run by run, from the one on that begins at an entry; one entry in so many of each run."""
        for span in self._session.spans(self.entries):
            if span.start >= start:
                count = -(-(span.stop - span.start) // share)
                span = slice(span.start, span.start + count)
                yield self._met.run(span, look=False)  # they are looked at when the result is made


class _OfWhole:
    """What a maker makes: it reads of its inputs what it needs."""

    def __init__(self, node: Made, session: Session) -> None:
        assert node.compiled is not None
        self.part = session.part
        self._form, self._spreads = node.compiled, False
        self._inputs = [_Input(one, session, node.compiled.whole) for one in node.inputs]
        self.size = sum(one.size for one in self._inputs)

    def settle(self, memory: Arena) -> None:
        """Take the memory that is needed."""
        for one in self._inputs:
            one.settle(memory)

    def make(self, span: slice, out: int, *, spreads: bool = True) -> None:
        """Make a run of the result at an address; `spreads`: what is not finite in it will be so in the end."""
        self._spreads = spreads and self._form.spreads
        self._form.make(span, self, out)

    def read(self, index: int, span: slice) -> Stored:
        """Give a run of an input."""
        return self._inputs[index].read(span, look=not self._spreads, spreads=self._spreads)
