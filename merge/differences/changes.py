"""How much a tensor changed from its base: sums that can be added over tensors, and the measures made of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .sums import total


@dataclass(frozen=True, slots=True)
class Change:
    """What was summed over the entries of a tensor, or of several; δ is the expert's entry minus the base's.

    Every measure is None where it would divide by zero: a base of zeros, or nothing that changed.

    Attributes:
        entries: how many there are.
        changed: how many differ from the base at all.
        delta: Σ |δ|.
        delta_squared: Σ δ².
        base: Σ |base|.
        base_squared: Σ base².
        top: Σ |δ| over the 1 % of each tensor's entries (rounded up) that changed most.

    """

    entries: int = 0
    changed: int = 0
    delta: float = 0.0
    delta_squared: float = 0.0
    base: float = 0.0
    base_squared: float = 0.0
    top: float = 0.0

    @property
    def mean_absolute(self) -> float | None:
        """Mean |δ| (MAV)."""
        return _ratio(self.delta, self.entries)

    @property
    def relative(self) -> float | None:
        """Mean |δ| / mean |base|: comparable across modules."""
        return _ratio(self.delta, self.base)

    @property
    def relative_norm(self) -> float | None:
        """‖δ‖ / ‖base‖, Frobenius norms."""
        return _ratio(math.sqrt(self.delta_squared), math.sqrt(self.base_squared))

    @property
    def share_changed(self) -> float | None:
        """Share of the entries that differ from the base at all."""
        return _ratio(self.changed, self.entries)

    @property
    def top_share(self) -> float | None:
        """Concentration: share of Σ |δ| that the most changed 1 % of the entries hold; 0.01 where all changed alike.

        Exact for one tensor. For several it is the mean of theirs, weighted by their Σ |δ|: the 1 % is taken in each.
        """
        return _ratio(self.top, self.delta)


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None


def added(changes: Iterable[Change]) -> Change:
    """Add up the sums of several tensors, exactly, so that their order does not matter.

    >>> added([Change(entries=2, changed=1, delta=0.5, base=4.0), Change(entries=2, delta=0.0, base=4.0)]).relative
    0.0625
    """
    return total(Change, changes)
