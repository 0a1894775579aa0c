"""Which entries change most, over all tensors of a checkpoint together: found exactly, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ..errors import MergeError
from ..evaluate import GRID
from ..kernels import largest
from ..operator import Parts, mapped

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_HIGH = 16  # bits of |x| that the first pass counts by
KEPT = 1 << 24  # entries near the boundary that may be held in memory; beyond, more passes are made
_SAMPLED, _ENOUGH = 16, 64  # one part in so many is looked at first, if that leaves enough of them
_MARGIN = 0.1  # how far, as a share of k, the first look may be wrong
AGAIN = "only so many entries differ from the base: ask for no more"


@dataclass(frozen=True)
class Selection:
    """The k entries of largest magnitude over several tensors.

    Entries whose magnitude is the boundary's are taken in the order of the tensors, then of their index, until there
    are k of them. Blocks are GRID entries of one tensor.

    Attributes:
        boundary: the smallest magnitude that is selected.
        counts: tensor → how many entries are selected in each of its blocks.
        ties: tensor → how many of them have exactly the boundary's magnitude.
        considered: how many entries there were to select from.

    """

    boundary: float
    counts: Mapping[str, Sequence[int]]
    ties: Mapping[str, Sequence[int]]
    considered: int

    @property
    def summary(self) -> dict[str, Any]:
        """What a receipt says of it: how many of each tensor's entries were selected."""
        selected = {name: sum(counts) for name, counts in self.counts.items()}
        total = sum(selected.values())
        return {"selected": total, "of": self.considered, "smallest change": self.boundary, "tensors": selected}


def select(groups: Mapping[str, Parts], *, count: int, wide: bool = False) -> Selection:
    """Select the entries of largest magnitude over all tensors, each a stream of parts (deltas [1, part], base [part]).

    A first look at some of the parts tells about where the boundary lies. One pass over all then counts what lies
    above that region, and keeps what lies in it. Where the boundary turns out to lie elsewhere, or too much lies with
    it, a radix selection takes more passes. The result is the same. `wide`: some of the deltas are fp64.

    Raises MergeError where fewer entries than that differ from the base.
    """
    kept = None if wide else _sifted(groups, count, *_region(groups, count))
    boundary, counts, ties = kept or _by_radix(groups, count, wide)
    if boundary == 0:
        changed = sum(int(found) for _, found in over(groups, lambda deltas, _: (deltas != 0).sum()))
        raise MergeError("", f"{count:,} entries are asked for, and {changed:,} differ", AGAIN)
    return Selection(boundary, counts, ties, sum(parts.entries for parts in groups.values()))


def chosen(deltas: Tensor, boundary: float, ties: int) -> Tensor:
    """Tell which entries of one block are selected: bool [block]. NaN is larger than all numbers, by its bits."""
    import torch

    magnitude = deltas.abs()
    if float(torch.tensor(boundary, dtype=deltas.dtype, device="cpu")) != boundary:  # found among fp64 tensors, or NaN
        magnitude = magnitude.double()
    bits, limit = _bits(magnitude), _bits(torch.tensor(boundary, dtype=magnitude.dtype, device="cpu"))
    keep = bits > limit
    if ties:
        keep[(bits == limit).nonzero()[:ties, 0]] = True
    return keep


def _bits(magnitude: Tensor) -> Tensor:
    """Give the bits of magnitudes, which order as these do."""
    import torch

    return magnitude.view(torch.int64 if magnitude.dtype == torch.float64 else torch.int32)


Counts = dict[str, list[int]]  # tensor → a number for each of its blocks


class Streamed(Protocol):
    """The parts of one tensor, each a call that reads it, to be worked on by so many threads."""

    @property
    def threads(self) -> int:
        """How many parts are worked on at once."""

    @property
    def runs(self) -> Callable[[], Iterable[Callable[[], tuple[Any, ...]]]]:
        """Give the parts, anew at each call."""


def over(groups: Mapping[str, Streamed], function: Callable[..., T], every: int = 1) -> Iterator[tuple[str, T]]:
    """Give function(*part) for every part of all tensors, or one in so many, in order, with the tensor's name."""
    runs = [(name, run) for name, parts in groups.items() for run in parts.runs()][::every]
    threads = next(iter(groups.values())).threads
    return zip((name for name, _ in runs), mapped(function, (run for _, run in runs), threads), strict=True)


def _region(groups: Mapping[str, Parts], count: int) -> tuple[int, int]:
    """Tell in which region the boundary probably lies: the bits of the lowest |δ| in it, and of the lowest above it."""
    import torch

    parts = sum(1 for one in groups.values() for _ in one.runs())
    every = max(1, min(_SAMPLED, parts // _ENOUGH))
    histogram = torch.zeros(1 << _HIGH, dtype=torch.int64, device="cpu")
    for _, found in over(groups, _high_bits, every):
        histogram += found
    above = histogram.flip(0).cumsum(0)  # above[i]: entries in the i + 1 highest bins
    scale = int(above[-1]) / sum(one.entries for one in groups.values())
    margin = _MARGIN if every > 1 else 0.0
    wanted = torch.tensor(
        [count * scale * (1 - margin), count * scale * (1 + margin)], dtype=torch.float64, device="cpu"
    )
    first, last = torch.searchsorted(above.double(), wanted).clamp(max=(1 << _HIGH) - 1).tolist()
    return (1 << _HIGH) - 1 - last << _HIGH, (1 << _HIGH) - first << _HIGH


def _high_bits(deltas: Tensor, _: Tensor) -> Tensor:
    import torch

    counts: Tensor = torch.bincount(deltas[0].abs().view(torch.int32) >> _HIGH, minlength=1 << _HIGH)
    return counts.cpu()


def _sifted(groups: Mapping[str, Parts], count: int, low: int, high: int) -> tuple[float, Counts, Counts] | None:
    """Find the boundary in a region of bits, and the counts of every block; nothing where it is not to be found so."""
    import torch

    region = torch.empty(KEPT, dtype=torch.int32, device="cpu")  # one buffer: small ones would scatter over the heap
    held, pieces = 0, []
    for name, (inside, sizes, above) in over(groups, lambda deltas, _: _sift(deltas[0], low, high)):
        if held + len(inside) > KEPT:
            return None
        region[held : held + len(inside)] = inside
        held += len(inside)
        pieces.append((name, sizes, above))
    region, wanted = region[:held], count - sum(sum(above) for *_, above in pieces)
    if not 0 < wanted <= held:
        return None
    boundary = region.kthvalue(held - wanted + 1).values
    ties, start = wanted - int((region > boundary).sum()), 0
    counts, equals = empty(groups), empty(groups)
    for name, sizes, above in pieces:
        more, same = list(above), []
        for i, size in enumerate(sizes):
            block = region[start : start + size]
            more[i] += int((block > boundary).sum())
            same.append(int((block == boundary).sum()))
            start += size
        ties = taken(counts[name], equals[name], more, same, ties)
    return boundary.view(torch.float32).item(), counts, equals


def _sift(delta: Tensor, low: int, high: int) -> tuple[Tensor, list[int], list[int]]:
    """Give the bits of what lies in a region; and for each block how many these are, and how many lie above."""
    import torch

    bits = delta.abs().view(torch.int32)
    blocks = torch.split(bits, GRID) if len(bits) else ()
    near = bits >= low
    above = [int((block >= high).sum()) for block in blocks]
    sizes = [int(block.sum()) - more for block, more in zip(torch.split(near, GRID), above, strict=False)]
    inside = bits[near]
    return inside[inside < high].cpu(), sizes, above


def empty(groups: Mapping[str, Streamed]) -> Counts:
    """Give counts of no block yet."""
    return {name: [] for name in groups}


def taken(counts: list[int], equals: list[int], more: Iterable[int], same: Iterable[int], ties: int) -> int:
    """Add the counts of some blocks; give how many entries on the boundary are still to be taken after them."""
    for above, equal in zip(more, same, strict=True):
        first = min(equal, ties)
        ties -= first
        counts.append(above + first)
        equals.append(first)
    return ties


def _by_radix(groups: Mapping[str, Parts], count: int, wide: bool) -> tuple[float, Counts, Counts]:
    """Find the same with four passes over fp32, six over fp64, whatever the magnitudes are."""
    import torch

    kind = torch.float64 if wide else torch.float32

    def stream() -> Iterator[Tensor]:
        return (deltas.to(kind) for parts in groups.values() for deltas, _ in parts)

    (cut,) = largest(stream, [count])
    assert cut is not None
    limit = _bits(torch.tensor(cut.value, dtype=kind, device="cpu"))
    found = list(over(groups, lambda deltas, _: _counted(_bits(deltas[0].to(kind).abs()), limit)))
    ties = count - sum(sum(above) for _, (above, _) in found)
    counts, equals = empty(groups), empty(groups)
    for name, (above, same) in found:
        ties = taken(counts[name], equals[name], above, same, ties)
    return cut.value, counts, equals


def _counted(bits: Tensor, limit: Tensor) -> tuple[list[int], list[int]]:
    """Count, in each block of a part, what lies above the boundary and what lies on it."""
    import torch

    blocks = torch.split(bits, GRID) if len(bits) else ()
    return [int((one > limit).sum()) for one in blocks], [int((one == limit).sum()) for one in blocks]
