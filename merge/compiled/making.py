"""Making a tensor without torch: its inputs read as they are stored, its entries made by the compiled library."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence
from ctypes import addressof, c_char
from functools import partial
from itertools import islice
from typing import Any

from ..dtypes import byte_size
from ..errors import PortmanteauError
from ..evaluate import Session, located, resolved, stream
from ..node import Node, Source, Step
from ..operator import call
from .forms import Form
from .library import DTYPES, NO_TENSOR, Stored, library
from .measures import Run

_ALIGNMENT = 64
_kept = threading.local()


def is_compiled(node: Node, session: Session) -> bool:
    """Tell whether a tensor can be made so: by operators with a compiled form, from stored floats of 16 or 32 bits."""
    if isinstance(node, Source) or node.output.dtype not in DTYPES:
        return node.output.dtype in DTYPES
    if not isinstance(node, Step) or node.operator.compiled is None or node.inputs.importances or library() is None:
        return False
    return _form(node, session) is not None and all(is_compiled(inner, session) for inner in node.inputs)


def made(step: Step, session: Session) -> Iterator[memoryview]:
    """Make a tensor: the bytes of its parts, in order, each valid until the next is asked for."""
    spec, met = step.output, _Met(step, session)
    size = byte_size(spec.dtype, min(session.part, spec.entries))
    arena = _arena(met.size + size + _ALIGNMENT)
    met.settle(arena)
    out, address = arena.take(size)
    for span in session.spans(spec.entries):
        met.make(span, address, DTYPES[spec.dtype])
        yield out[: byte_size(spec.dtype, span.stop - span.start)]


def _form(step: Step, session: Session) -> Form | None:
    assert step.operator.compiled is not None
    settings = resolved(step.every_setting, session)
    found: Form | None = call(step.operator.compiled, count=len(step.inputs.models), **settings)
    return found


class _Arena:
    """Memory of one thread, handed out anew for each tensor: pages that were touched once are not touched anew."""

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size)
        self._address = addressof(c_char.from_buffer(self._memory))
        self._taken = 0
        self.size = size

    def cleared(self) -> _Arena:
        """Hand out everything anew."""
        self._taken = 0
        return self

    def take(self, size: int) -> tuple[memoryview, int]:
        """Give so many bytes, and their address."""
        start = self._taken
        self._taken += -(-size // _ALIGNMENT) * _ALIGNMENT
        return memoryview(self._memory)[start : start + size], self._address + start


def _arena(size: int) -> _Arena:
    """Give this thread's memory, of at least this size."""
    found: _Arena | None = getattr(_kept, "arena", None)
    if found is None or found.size < size:
        _kept.arena = found = None  # the smaller one goes first
        _kept.arena = found = _Arena(size)
    return found.cleared()


class _Input:
    """One of the tensors that meet: stored, or made by a step inside."""

    def __init__(self, node: Node, session: Session, held: bool) -> None:
        self._node = node
        self._inner = None if isinstance(node, Source) else _Met(node, session)  # type: ignore[arg-type]
        self._dtype = node.output.dtype if self._inner is None else "F32"  # a step gives its working dtype
        self._held, self._watch = held, session.watch
        self._filled = 0  # entries that are there already, where all are held
        entries = node.output.entries
        self._own = byte_size(self._dtype, entries if held else min(session.part, entries))
        self.size: int = self._own + _ALIGNMENT + (self._inner.size if self._inner else 0)

    def settle(self, arena: _Arena) -> None:
        """Take the memory that is needed."""
        if self._inner is not None:
            self._inner.settle(arena)
        self._view, self._address = arena.take(self._own)

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
                self._inner.make(span, self._address + at, DTYPES[self._dtype], spreads=spreads)
            self._filled = span.stop if self._held else 0
        if look and self._watch is not None and isinstance(self._node, Source):
            self._watch.see(self._node, self._view[at : at + size])
        return Stored(self._address + at, DTYPES[self._dtype])


class _Met:
    """The tensors that meet in a step: read run by run, as often as its form goes through them."""

    def __init__(self, step: Step, session: Session) -> None:
        found = _form(step, session)
        assert found is not None
        self.entries = step.output.entries
        self.streams: Sequence[int] = [stream(step.output.name, label) for label in step.labels]
        self._step, self._session, self._form = step, session, found
        self._is_measured = False
        total = sum(byte_size(node.output.dtype, self.entries) for node in step.inputs)
        self._held = found.revisits and total <= session.keep
        self._models = [_Input(node, session, self._held) for node in step.inputs.models]
        self._base = _Input(step.inputs.base, session, self._held) if step.inputs.base is not None else None
        self._every = [*self._models, *([self._base] if self._base else [])]
        self.size = sum(one.size for one in self._every)

    def settle(self, arena: _Arena) -> None:
        """Take the memory that is needed."""
        for one in self._every:
            one.settle(arena)

    def make(self, span: slice, out: int, dtype: int, *, spreads: bool = True) -> None:
        """Make a run of the result at an address; `spreads`: what is not finite in it will be so in the end."""
        try:
            if not self._is_measured:
                self._form, self._is_measured = self._form.measured(self), True
            spreads = spreads and self._form.spreads
            self._form.make(self._run(span, look=not spreads, spreads=spreads), out, dtype)
        except PortmanteauError as error:
            raise located(error, self._step) from error

    def runs(self, every: int = 1) -> Iterator[Run]:
        """Read all inputs, run by run; where they are not held, one run in so many."""
        spans = islice(self._session.spans(self.entries), 0, None, 1 if self._held else every)
        return map(partial(self._run, look=False, spreads=False), spans)  # they are looked at when the result is made

    def _run(self, span: slice, *, look: bool, spreads: bool) -> Run:
        read = partial(_Input.read, span=span, look=look, spreads=spreads)
        models: Any = (Stored * len(self._models))(*map(read, self._models))
        return Run(span.start, span.stop - span.start, models, read(self._base) if self._base else NO_TENSOR)
