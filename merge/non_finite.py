"""NaN and infinity: found in inputs and results while these stream by, and named when a tensor is done."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from ctypes import addressof, c_char
from dataclasses import dataclass
from typing import Literal

from .compiled.library import library
from .dtypes import byte_size
from .errors import Mistake
from .files.storage import BLOCK
from .node import Node, Source, Step, sources

Choice = Literal["error", "warn", "keep"]
_BITS = {  # the bits that tell, and what they are where an entry is NaN or infinite
    "F64": (0x7FF0 << 48, 0x7FF0 << 48),
    "F32": (0x7F800000, 0x7F800000),
    "F16": (0x7C00, 0x7C00),
    "BF16": (0x7F80, 0x7F80),
    "F8_E4M3": (0x7F, 0x7F),  # NaN alone: these have no infinity
    "F8_E5M2": (0x7C, 0x7C),
    "F8_E4M3FNUZ": (0xFF, 0x80),
    "F8_E5M2FNUZ": (0xFF, 0x80),
}
_KEEP = '--non-finite keep (in Python non_finite="keep") builds all the same'
_INPUT = f"download or save the checkpoint again, or leave it out; {_KEEP}"
_RESULT = f"too large for its dtype: choose one with a wider range, as bfloat16 or float32; {_KEEP}"


def count(data: memoryview, dtype: str) -> int:
    """Count the entries that are NaN or infinite in stored bytes; of what is no float none is."""
    if dtype not in _BITS or not len(data):
        return 0
    mask, value = _BITS[dtype]
    width = byte_size(dtype, 1)
    found = library()
    if found is not None and not data.readonly:
        return int(found.count_matching(len(data) // width, addressof(c_char.from_buffer(data)), width, mask, value))
    import numpy as np

    entries = np.frombuffer(data, dtype=f"u{width}")
    return int(np.count_nonzero(entries & entries.dtype.type(mask) == entries.dtype.type(value)))


@dataclass(frozen=True, slots=True)
class Found:
    """NaN and infinity in one tensor.

    Attributes:
        where: the tensor, and whose it is.
        count: how many of its entries.
        entries: how many it has.
        in_result: whether it is one of the result whose inputs are all finite.

    """

    where: str
    count: int
    entries: int
    in_result: bool

    @property
    def mistake(self) -> Mistake:
        """What an error says of it."""
        verb = "is" if self.count == 1 else "are"
        what = f"{self.count:,} of {self.entries:,} entries {verb} NaN or infinite"
        if self.in_result:
            return Mistake(self.where, f"{what}, and all that it is made of is finite", _RESULT)
        return Mistake(self.where, what, _INPUT)


class Watch:
    """Looks at what is read; from any thread."""

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self._lock = threading.Lock()
        self._marked: dict[tuple[int, str], Source] = {}
        self._found: dict[str, Found] = {}

    def see(self, source: Source, data: memoryview) -> None:
        """Look at a run of a stored tensor; one that has NaN or infinity is marked."""
        if count(data, source.spec.dtype):
            self.mark(source)

    def mark(self, source: Source) -> None:
        """Note that a stored tensor has NaN or infinity."""
        with self._lock:
            self._marked[_key(source)] = source

    def look(self, step: Step) -> None:
        """Read all that a step is made from, and name what is found."""
        self._mark_all(step)
        self.settle_inputs()

    def _mark_all(self, step: Step) -> None:
        for source in sources(step):
            if _counted(source):
                self.mark(source)

    def _has_marked(self, node: Node) -> bool:
        """Tell whether one of the stored tensors that a node is made from is marked."""
        return bool(self._marked) and any(_key(source) in self._marked for source in sources(node))

    def settle(self, step: Step, in_result: int) -> bool:
        """Name what was found for a tensor that is done; tell whether anything was.

        In the result alone it is looked for in the inputs, which are read again.
        """
        if in_result and not self._has_marked(step):
            self._mark_all(step)
        every = sources(step) if self._marked else ()
        marked = {_key(source): source for source in every if _key(source) in self._marked}
        for source in marked.values():
            self._name(source)
        if in_result and not marked:
            found = Found(f"tensor {step.output.name} of the result", in_result, step.output.entries, in_result=True)
            with self._lock:
                self._found[found.where] = found
        return bool(marked or in_result)

    def settle_inputs(self) -> None:
        """Name all marked tensors: what a survey came across."""
        for source in tuple(self._marked.values()):
            self._name(source)

    def _name(self, source: Source) -> None:
        where = f"tensor {source.spec.name} of {source.checkpoint.label}"
        if where not in self._found:
            found = Found(where, _counted(source), source.spec.entries, in_result=False)
            with self._lock:
                self._found[where] = found

    @property
    def found(self) -> tuple[Found, ...]:
        """What was found, by tensor."""
        return tuple(self._found[where] for where in sorted(self._found))


def _key(source: Source) -> tuple[int, str]:
    return id(source.checkpoint), source.spec.name


def _counted(source: Source) -> int:
    return sum(count(block, source.spec.dtype) for block in _blocks(source))


def _blocks(source: Source) -> Iterator[memoryview]:
    size = source.spec.nbytes
    buffer = memoryview(bytearray(min(BLOCK, size)))
    for at in range(0, size, BLOCK):
        block = buffer[: min(BLOCK, size - at)]
        source.checkpoint.read_into(source.spec.name, block, at)
        yield block
