"""Runs of the tensors that meet, and what makes runs of a result from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import Array
from dataclasses import dataclass
from typing import Protocol

from .library import Stored


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the tensors that meet: where it begins in them, how long it is, and its bytes."""

    start: int
    count: int
    models: Array[Stored]
    base: Stored


class Whole(Protocol):
    """The tensors that meet, as often as they must be gone through."""

    streams: Sequence[int]
    held: bool  # in memory, what is made of them
    scratch: int  # the address of what a form needs beside them

    @property
    def entries(self) -> int:
        """How many each of them has."""

    def runs(self, share: int = 1, start: int = 0) -> Iterator[Run]:
        """Read them, run by run, from the one on that begins at an entry.

        `share`: only so much of each run is read, from its beginning, if none is held: one entry in so many.
        """


class Form(Protocol):
    """What an operator does: first it may measure whole tensors, then it makes any run of the result."""

    @property
    def revisits(self) -> bool:
        """Tell whether it measures the tensors, and so goes through them more than once."""

    @property
    def spreads(self) -> bool:
        """Tell whether an entry that is NaN or infinite in any of the tensors is so in the result."""

    def scratch(self, entries: int) -> int:
        """Tell how many bytes it needs beside tensors of so many entries."""

    def measured(self, whole: Whole) -> Form:
        """Find what must be known of the whole tensors; give what can make runs."""

    def make(self, run: Run, out: int, dtype: int) -> None:
        """Make a run of the result at an address."""


class Stores(Protocol):
    """The inputs of a maker, as they are stored or made."""

    part: int

    def read(self, index: int, span: slice) -> Stored:
        """Give a run of one of them, valid until its next one is asked for: at most `part` entries, or all."""


class MakerForm(Protocol):
    """What a maker does."""

    @property
    def whole(self) -> bool:
        """Tell whether it reads its inputs whole; else it reads them in parts."""

    @property
    def spreads(self) -> bool:
        """Tell whether what is NaN or infinite in what it reads is so in the result, or was found before."""

    def make(self, span: slice, inputs: Stores, out: int) -> None:
        """Make a flat run of entries at an address, in the dtype of the made tensor."""
