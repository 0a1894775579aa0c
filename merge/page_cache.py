"""Leaving others' files in the system's cache: what a build that fills the memory read or wrote is dropped there."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from .files import storage
from .node import Source, Step, Store, sources
from .plan import Plan

_SHARE = 2  # from one half of the memory on, a build would push out what others need
Way = Callable[[Step], Iterator[memoryview]]


def crowds_memory(plan: Plan) -> bool:
    """Tell whether the files of a build, read and written, would take more than half of the machine's memory."""
    memory = storage.physical_memory()
    stored = {_key(source): source.spec.nbytes for source in plan.sources}
    return memory is not None and sum(stored.values()) + plan.bytes_written > memory // _SHARE


class Reading:
    """Knows of every stored tensor how many steps are still to read it; once none is, it is forgotten."""

    def __init__(self, plan: Plan, steps: Iterable[Step]) -> None:
        """Count which of the plan's steps read each tensor, where the build is so large that it matters."""
        self._is_large = crowds_memory(plan)
        self._lock = threading.Lock()
        self._left = Counter(key for step in steps for key in _read_by(step))

    def once(self, way: Way) -> Way:
        """Give a way to make a tensor that forgets its inputs then, if they have been read for the last time."""
        if not self._is_large:
            return way

        def made(step: Step) -> Iterator[memoryview]:
            yield from way(step)
            for store, name in _read_by(step):
                with self._lock:
                    self._left[store, name] -= 1
                    last = not self._left[store, name]
                if last:
                    store.forget(name)

        return made


def _key(source: Source) -> tuple[Store, str]:
    return source.checkpoint, source.spec.name


def _read_by(step: Step) -> set[tuple[Store, str]]:
    return {_key(source) for source in sources(step)}
