"""Tensor functions that several operators share.

Every one of them is built from operations that IEEE 754 rounds correctly (+ − × ÷, comparison, selection) and from sums
over a fixed grid, so that no bit of a result depends on part sizes, threads or vector width. No fused multiply-add.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

ROW = 4096  # sums run over rows of this many entries; every part begins at a multiple of it
_DIGIT = 16  # bits of the selection's radix
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number: the counter's step in SplitMix64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1


def weighted_sum(tensors: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum w_i · tensors_i in the order given. Shapes: [n, *shape] → [*shape]."""
    total = tensors[0] * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor if weight == 1 else tensor * weight
    return total


def total(values: Tensor) -> float:
    """Sum all entries: in fp64 along rows of a fixed grid, then exactly over the rows. Any shape → a number."""
    return math.fsum(row_sums(values))


def row_sums(values: Tensor) -> list[float]:
    """Sum rows of `ROW` entries in fp64; the last row may be shorter. Any shape → a list of numbers."""
    flat = values.reshape(-1).double()
    whole = len(flat) // ROW * ROW
    sums: list[float] = flat[:whole].view(-1, ROW).sum(dim=1).tolist()
    if whole < len(flat):
        rest = flat.new_zeros(ROW)
        rest[: len(flat) - whole] = flat[whole:]
        sums.extend(rest.view(1, ROW).sum(dim=1).tolist())
    return sums


def sums_over(parts: Iterable[Sequence[Tensor]]) -> list[float]:
    """Sum several quantities over all parts in one pass, exactly as `total` does for each tensor as a whole."""
    rows = [[row_sums(values) for values in part] for part in parts]
    return [math.fsum(itertools.chain.from_iterable(column)) for column in zip(*rows, strict=True)]


@dataclass(frozen=True, slots=True)
class Cut:
    """The boundary of the k largest magnitudes: the k-th value, and the last index that an equal one may have."""

    value: float
    last_index: int


def largest(parts: Callable[[], Iterator[Tensor]], count: int) -> Cut:
    """Find the boundary of the `count` entries of largest magnitude in a tensor that comes in parts.

    Exact, in bounded memory: a radix selection over the bits of |x| (the bits of a positive float order as the floats
    do), 16 at a time. Entries equal to the boundary are kept in the order of their index until `count` are kept.

    Args:
        parts: gives the parts (flat, fp32 or fp64) anew at each call.
        count: how many to keep, from 1 to the number of entries.

    """
    import torch

    wide = next(parts()).dtype == torch.float64
    prefix, wanted, equal = 0, count, 0
    for shift in range((48 if wide else 16), -1, -_DIGIT):
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for part in parts():
            histogram += _digits(part, prefix, shift, wide)
        above = histogram.flip(0).cumsum(0)  # above[i]: entries in the i + 1 highest bins
        position = int(torch.searchsorted(above, wanted))
        digit = (1 << _DIGIT) - 1 - position
        wanted -= int(above[position - 1]) if position else 0
        equal = int(histogram[digit])
        prefix = (prefix << _DIGIT) | digit
    bits = torch.tensor([prefix], dtype=torch.int64 if wide else torch.int32)
    value = bits.view(torch.float64 if wide else torch.float32).item()
    last = _index_of(parts(), value, wanted) if wanted < equal else _MASK_64 >> 1
    return Cut(value, last)


def _digits(part: Tensor, prefix: int, shift: int, wide: bool) -> Tensor:
    """Count the digits at `shift` of those magnitudes whose higher bits are `prefix`."""
    import torch

    bits = part.abs().view(torch.int64 if wide else torch.int32)
    high = bits >> shift
    if shift < (48 if wide else 16):
        high = high[(high >> _DIGIT) == prefix]
    return torch.bincount(high & ((1 << _DIGIT) - 1), minlength=1 << _DIGIT)


def _index_of(parts: Iterator[Tensor], value: float, ordinal: int) -> int:
    """Give the flat index of the ordinal-th (from 1) entry whose magnitude is exactly this value."""
    start = 0
    for part in parts:
        hits = (part.abs() == value).nonzero()[:, 0]
        if len(hits) >= ordinal:
            return start + int(hits[ordinal - 1])
        ordinal -= len(hits)
        start += len(part)
    raise AssertionError("fewer equal entries than counted")


def select_largest(values: Tensor, cut: Cut, start: int) -> Tensor:
    """Tell which entries lie on the kept side of the boundary. Shapes: [*shape] → bool [*shape]."""
    import torch

    magnitude = values.abs()
    if cut.last_index == _MASK_64 >> 1:
        return magnitude >= cut.value
    index = torch.arange(start, start + values.numel(), device=values.device).view(values.shape)
    return (magnitude > cut.value) | ((magnitude == cut.value) & (index <= cut.last_index))


def elect_sign(contributions: Tensor) -> Tensor:
    """Elect the sign of the summed mass in every entry; a sum of zero elects plus. [n, *shape] → ±1 [*shape]."""
    import torch

    mass = weighted_sum(contributions, (1.0,) * len(contributions))
    return torch.where(mass >= 0, 1.0, -1.0).to(mass.dtype)


def mix_agreeing(
    deltas: Tensor,
    weights: Sequence[float],
    *,
    elect: Literal["weighted", "unweighted"],
    divide: Literal["weights", "count", "none"],
) -> Tensor:
    """Sum w_i · d_i over those models whose sign is the elected one, entry by entry. [n, *shape] → [*shape].

    Args:
        deltas: the (trimmed) deltas; entries of zero agree with no sign.
        weights: one for each model.
        elect: the sign of Σ w_i d_i, or of Σ d_i.
        divide: by the sum of the agreeing weights, by the number of agreeing models, or not at all.

    """
    import torch

    weighted = torch.stack([delta * weight for delta, weight in zip(deltas, weights, strict=True)])
    voters = weighted if elect == "weighted" else deltas
    agree = voters * elect_sign(voters) > 0
    ones = (1.0,) * len(weights)
    mixed = weighted_sum(torch.where(agree, weighted, 0.0), ones)
    if divide == "none":
        return mixed
    shares = weighted_sum(agree.to(deltas.dtype), weights if divide == "weights" else ones)
    return mixed / torch.where(shares == 0, 1.0, shares)


def keep_at_random(values: Tensor, density: float, seed: int, stream: int, start: int) -> Tensor:
    """Keep every entry with probability `density`, by a counter: [*shape] → bool [*shape].

    The draw of an entry is SplitMix64 (Steele, Lea and Flood 2014, section 4) at counter `start + index` of the stream
    that seed and stream name: it depends on nothing else.
    """
    import torch

    key = _signed((stream ^ (seed * _GOLDEN)) & _MASK_64)
    state = torch.arange(start + 1, start + values.numel() + 1, dtype=torch.int64, device=values.device)
    state.mul_(_GOLDEN).add_(key)
    state = (state ^ _shift(state, 30)).mul_(_MIX_1)
    state = (state ^ _shift(state, 27)).mul_(_MIX_2)
    draw = _shift(state ^ _shift(state, 31), 11)  # 53 bits
    return (draw < round(density * (1 << 53))).view(values.shape)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Shift right without carrying the sign down: torch has no unsigned shift."""
    return (state >> bits) & (_MASK_64 >> bits)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
