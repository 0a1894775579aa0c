"""Surveys without torch: their tensors are read as they are stored, and measured by the compiled library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..device import alone
from ..evaluate import Session
from ..evaluate import conduct as conduct_by_torch
from ..node import Inputs, Node, Survey, sources
from .arena import arena
from .library import library
from .making import Met, is_compiled, revisits
from .runs import Run


@dataclass(frozen=True)
class Runs:
    """The tensors of a group, one after the other, in runs of stored bytes; as Parts are for torch.

    Attributes:
        group: the tensors, those that meet together.
        session: the size of runs, and how many threads there are.
        advance: is told how many bytes each run has.
        share: only so much of each run is read, from its beginning: one entry in so many.

    """

    group: tuple[Inputs, ...]
    session: Session
    advance: Callable[[int], None]
    share: int = 1

    @property
    def entries(self) -> int:
        """How many entries all of them have together, in one model."""
        return sum(inputs.models[0].output.entries for inputs in self.group)

    @property
    def threads(self) -> int:
        """How many runs may be worked on at once."""
        return self.session.threads

    def runs(self) -> Iterator[Callable[[], tuple[Run]]]:
        """Give, run by run, what reads it; it is valid until this thread reads another."""
        for inputs in self.group:
            entries = inputs.models[0].output.entries
            nbytes = sum(source.spec.nbytes for node in inputs for source in sources(node))
            for span in self.session.spans(entries):
                count = -(-(span.stop - span.start) // self.share)
                yield partial(self._read, inputs, slice(span.start, span.start + count), nbytes * count // entries)

    def _read(self, inputs: Inputs, span: slice, nbytes: int) -> tuple[Run]:
        met = Met(inputs, self.session)
        met.settle(arena(met.size))
        run = met.run(span, look=True)
        self.advance(nbytes)
        return (run,)


def conduct(survey: Survey, session: Session, advance: Callable[[int], None] = lambda _: None) -> Any:
    """Carry out a survey, by the compiled library where that can be. `advance` is told how many bytes each part has."""
    compiled = survey.compiled if library() is not None else None
    if compiled is None or not all(is_streamed(node, session) for node in survey):
        with alone(session.device):
            return conduct_by_torch(survey, session, advance)
    groups = {key: Runs(group, session, advance) for key, group in survey.groups.items()}
    return compiled(groups, **survey.settings)


def is_streamed(node: Node, session: Session) -> bool:
    """Tell whether the library can read a tensor from any entry on."""
    return is_compiled(node, session) and not revisits(node, session)
