"""Tensor functions that several operators share.

Every one of them is built from operations that IEEE 754 rounds correctly (+ − × ÷, comparison, selection) and from sums
over a fixed grid, so that no bit of a result depends on part sizes, threads or vector width. No fused multiply-add.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

ROW = 4096  # sums run over rows of this many entries; every part begins at a multiple of it
_DIGIT = 16  # bits of the selection's radix
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number: the counter's step in SplitMix64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_MASK_64 = (1 << 64) - 1
NO_LIMIT = _MASK_64 >> 1  # an index beyond every entry
_DRAWS = 1 << 15
_PRODUCT = 1 << 16  # entries of a block of a product


def weighted_sum(tensors: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum w_i · tensors_i in the order given; a weight of 0 leaves its tensor out. Shapes: [n, *shape] → [*shape]."""
    import torch

    present = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if weight != 0]
    if not present:
        return torch.zeros_like(tensors[0])
    total: Tensor = present[0][0] * present[0][1]
    for tensor, weight in present[1:]:
        total += tensor if weight == 1 else tensor * weight
    return total


def divided(values: Tensor, divisor: float) -> Tensor:
    """Divide in place by a number, rounding once: for a plain number a GPU would multiply by its rounded reciprocal."""
    import torch

    return values.div_(torch.full((), divisor, dtype=values.dtype, device=values.device))


def exact_sum(values: Iterable[float]) -> float:
    """Sum numbers exactly and round once; NaN where infinities of either sign, or sums too large, leave no number.

    >>> exact_sum([1e100, 1.0, -1e100]), exact_sum([math.inf, -math.inf])
    (1.0, nan)
    """
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):
        return math.nan


def total(values: Tensor) -> float:
    """Sum all entries: in fp64 along rows of a fixed grid, then exactly over the rows. Any shape → a number."""
    return exact_sum(row_sums(values))


def row_sums(values: Tensor, row: int = ROW) -> list[float]:
    """Sum rows of so many entries in fp64; the last row may be shorter. Any shape → a list of numbers."""
    flat = values.reshape(-1).double()
    whole = len(flat) // row * row
    sums: list[float] = sum_rows(flat[:whole].view(-1, row)).tolist()
    if whole < len(flat):
        rest = flat.new_zeros(row)
        rest[: len(flat) - whole] = flat[whole:]
        sums.extend(sum_rows(rest.view(1, row)).tolist())
    return sums


def sum_rows(values: Tensor) -> Tensor:
    """Sum along rows in fp64: runs of `ROW` entries, then over the runs, each halved until one is left. [k, row] → [k].

    Halving (x_i + x_{i + half}) fixes the order of all additions, whatever the machine's vectors are.
    """
    import torch

    rows, width = values.double(), values.shape[1]
    if width > ROW:
        rows = _halved(torch.nn.functional.pad(rows, (0, -width % ROW)).view(len(rows), -1, ROW))
    return _halved(rows)


def _halved(values: Tensor) -> Tensor:
    """Sum the last dimension: [*, n] → [*]."""
    size = values.shape[-1]
    if not size:
        return values.sum(dim=-1)
    while size > 1:
        half = 1 << (size - 1).bit_length() - 1
        lower = values[..., :half].clone()
        lower[..., : size - half] += values[..., half:size]
        values, size = lower, half
    return values[..., 0]


def sums_over(parts: Iterable[Sequence[Tensor]], row: int = ROW) -> list[float]:
    """Sum several quantities over all parts in one pass: in fp64 along rows of a fixed grid, then exactly over them.

    `row` is that grid: every part begins at a multiple of it.
    """
    rows = [[row_sums(values, row) for values in part] for part in parts]
    return [exact_sum(itertools.chain.from_iterable(column)) for column in zip(*rows, strict=True)]


def grouped_sums(
    parts: Iterable[Sequence[Tensor]], group: Callable[[Tensor], Tensor], count: int
) -> tuple[Tensor, ...]:
    """Sum several quantities over groups of entries, one entry after the other in fp64, in one pass: on the processor.

    Args:
        parts: flat parts of the quantities, in order.
        group: of flat indices, gives the number of each one's group.
        count: how many groups there are.

    """
    import torch

    sums: tuple[Tensor, ...] = ()
    start = 0
    for part in parts:
        sums = sums or tuple(torch.zeros(count, dtype=torch.float64, device="cpu") for _ in part)
        groups = group(torch.arange(start, start + len(part[0]), device="cpu"))
        for total, values in zip(sums, part, strict=True):
            total.index_add_(0, groups, values.double().cpu())  # of one dimension: one after the other, on one thread
        start += len(part[0])
    return sums


@dataclass(frozen=True, slots=True)
class Cut:
    """The boundary of the k largest magnitudes: the k-th value, and the last index that an equal one may have."""

    value: float
    last_index: int


def largest(parts: Callable[[], Iterator[Tensor]], counts: Sequence[int | None]) -> tuple[Cut | None, ...]:
    """Find, for each of n tensors that come in parts together, the boundary of its entries of largest magnitude.

    Exact, in bounded memory: a radix selection over the bits of |x| (the bits of a positive float order as the floats
    do), 16 at a time, so two passes over the parts in fp32. Entries equal to the boundary are kept in the order of
    their index until the count is reached; only where that cuts among equals is there a third pass.

    Args:
        parts: gives the parts [n, part], fp32 or fp64, anew at each call.
        counts: how many to keep of each tensor, from 1 to the number of its entries; None: all, which has no boundary.

    """
    import torch

    searches = {row: _Search(count) for row, count in enumerate(counts) if count is not None}
    if not searches:
        return (None,) * len(counts)
    first = next(parts())
    wide = first.dtype == torch.float64
    for shift in range((48 if wide else 16), -1, -_DIGIT):
        histograms = {row: first.new_zeros(1 << _DIGIT, dtype=torch.int64) for row in searches}
        for part in parts():
            for row, search in searches.items():
                histograms[row] += _digits(part[row], search.prefix, shift, wide)
        for row, search in searches.items():
            search.narrow(histograms[row].cpu())
    cuts = {row: search.cut((part[row] for part in parts()), wide) for row, search in searches.items()}
    return tuple(cuts.get(row) for row in range(len(counts)))


@dataclass(slots=True)
class _Search:
    """The search for the wanted-th largest of those magnitudes whose bits begin with a prefix."""

    wanted: int
    prefix: int = 0
    equal: int = 0

    def narrow(self, histogram: Tensor) -> None:
        """Lengthen the prefix by the digit in whose bin the wanted magnitude lies."""
        import torch

        above = histogram.flip(0).cumsum(0)  # above[i]: entries in the i + 1 highest bins
        position = int(torch.searchsorted(above, self.wanted))
        digit = (1 << _DIGIT) - 1 - position
        self.wanted -= int(above[position - 1]) if position else 0
        self.equal = int(histogram[digit])
        self.prefix = (self.prefix << _DIGIT) | digit

    def cut(self, parts: Iterable[Tensor], wide: bool) -> Cut:
        """Give the boundary, once the prefix has all bits; the parts are read only where it cuts among equals."""
        import torch

        bits = torch.tensor([self.prefix], dtype=torch.int64 if wide else torch.int32, device="cpu")
        value = bits.view(torch.float64 if wide else torch.float32).item()
        if self.wanted == self.equal:
            return Cut(value, NO_LIMIT)
        return Cut(value, _index_of(parts, value, self.wanted))


def _digits(part: Tensor, prefix: int, shift: int, wide: bool) -> Tensor:
    """Count the digits at `shift` of those magnitudes whose higher bits are `prefix`."""
    import torch

    bits = part.abs().view(torch.int64 if wide else torch.int32)
    high = bits >> shift
    if shift < (48 if wide else 16):
        high = high[(high >> _DIGIT) == prefix]
    return torch.bincount(high & ((1 << _DIGIT) - 1), minlength=1 << _DIGIT)


def _index_of(parts: Iterable[Tensor], value: float, ordinal: int) -> int:
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
    if cut.last_index == NO_LIMIT:
        return magnitude >= cut.value
    index = torch.arange(start, start + values.numel(), device=values.device).view(values.shape)
    return (magnitude > cut.value) | ((magnitude == cut.value) & (index <= cut.last_index))


def agreeing(voters: Tensor) -> Tensor:
    """Tell which entries have the sign of the summed mass; zero elects plus. [n, *shape] → bool [n, *shape]."""
    plus = weighted_sum(voters, (1.0,) * len(voters)) >= 0
    return ((voters > 0) & plus) | ((voters < 0) & ~plus)


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

    weighted = torch.empty_like(deltas)
    for row, delta, weight in zip(weighted, deltas, weights, strict=True):
        torch.mul(delta, weight, out=row)
    agree = agreeing(weighted if elect == "weighted" else deltas)
    ones = (1.0,) * len(weights)
    mixed = weighted_sum(weighted.masked_fill_(~agree, 0.0), ones)
    if divide == "none":
        return mixed
    shares = weighted_sum(agree.to(deltas.dtype), weights if divide == "weights" else ones)
    return mixed.div_(shares.masked_fill_(shares == 0, 1.0))


def keep_at_random(values: Tensor, density: float | Tensor, seed: int, stream: int, start: int) -> Tensor:
    """Keep every entry with probability `density` (or its own, [*shape]), by a counter: [*shape] → bool [*shape].

    The draw of an entry is SplitMix64 (Steele, Lea and Flood 2014, section 4) at counter `start + index` of the stream
    that seed and stream name: it depends on nothing else.
    """
    import torch

    key, count = random_key(seed, stream), values.numel()
    kept = torch.empty(count, dtype=torch.bool, device=values.device)
    limits: Tensor | None = None
    limit: Any = None
    if isinstance(density, torch.Tensor):
        limits = density.reshape(-1).double()
    else:
        limit = round(density * (1 << 53))
    steps = torch.arange(1, _DRAWS + 1, dtype=torch.int64, device=values.device).mul_(_GOLDEN)
    state, shifted = torch.empty_like(steps), torch.empty_like(steps)
    for first in range(0, count, _DRAWS):  # in blocks that stay in the cache
        block = slice(0, min(_DRAWS, count - first))
        draw, spare = state[block], shifted[block]
        torch.add(steps[block], _signed((key + (start + first) * _GOLDEN) & _MASK_64), out=draw)
        for bits, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
            draw.bitwise_xor_(_shift(draw, bits, spare)).mul_(factor)
        if limits is not None:
            limit = limits[first : first + _DRAWS].mul(1 << 53).round_().long()
        torch.lt(_shift(draw, 11, spare), limit, out=kept[first : first + _DRAWS])  # 53 bits
    return kept.view(values.shape)


def random_key(seed: int, stream: int) -> int:
    """Give the key of a random stream: where its counter begins."""
    return (stream ^ (seed * _GOLDEN)) & _MASK_64


def multiplied(left: Tensor, right: Tensor, run: slice) -> Tensor:
    """Make a flat run of entries of left [rows, k] · right [k, width], in fp64: [run.stop - run.start].

    Blocks of whole rows are multiplied whose size depends on the width alone, so no bit depends on the run.
    """
    import torch

    rows, width = len(left), right.shape[1]
    step = max(1, _PRODUCT // width)
    first, last = run.start // width // step * step, -(-run.stop // width)
    wide = right.double()
    with one_thread():
        blocks = [left[top : min(top + step, rows)].double() @ wide for top in range(first, min(last, rows), step)]
    flat = torch.cat([block.reshape(-1) for block in blocks]) if blocks else left.new_zeros(0, dtype=torch.float64)
    return flat[run.start - first * width : run.stop - first * width]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread for each of ours."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shift(state: Tensor, bits: int, out: Tensor) -> Tensor:
    """Shift right without carrying the sign down: torch has no unsigned shift."""
    import torch

    return torch.bitwise_right_shift(state, bits, out=out).bitwise_and_(_MASK_64 >> bits)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
