"""Tables whose rows are rows of other tables: the embedding of one vocabulary, in the order of another.

Rows are read where they lie, neighbours in one go. What is held is the map of the rows, never a table.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .dtypes import torch_dtype, working
from .evaluate import GRID
from .node import Made, Node, Read
from .tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

ZERO, MEAN, FILL = -1, -2, -3  # rows that are no row of a table


@dataclass(frozen=True, eq=False)
class RowMap:
    """Where the rows of a table come from.

    Attributes:
        source: for every row the number of a table, or ZERO, MEAN (of the rows that the tables have for it), FILL (the
            mean of the rows that are counted).
        row: for every row, which row of that table.
        owned: for every table, its row for each row that is a MEAN, −1 where it has none.
        counted: for every row, 1 where FILL counts it.

    """

    source: array[int]
    row: array[int]
    owned: Sequence[array[int]]
    counted: bytes


def rows_of(spec: TensorSpec, rows: RowMap, tables: Sequence[Node]) -> Made:
    """Make a table of rows of others, all of one width; `spec` is the result's."""
    kind = working([spec.dtype, *(table.output.dtype for table in tables)])
    maker = _Rows(rows, spec.entries // len(rows.source), kind)
    held = 2 * 8 * max(GRID, maker.width) if FILL in rows.source else 0
    return Made(spec, maker, tuple(tables), held)


@dataclass(frozen=True)
class _Rows:
    rows: RowMap
    width: int
    dtype: str

    def prepare(self, read: Read) -> Tensor | None:
        """Take the mean of the counted rows in fp64, where it is needed: [width]."""
        import torch

        if FILL not in self.rows.source:
            return None
        total, counted = torch.zeros(self.width, dtype=torch.float64), self.rows.counted
        step = max(1, GRID // self.width)  # blocks depend on the width alone
        for top in range(0, len(counted), step):
            here = torch.frombuffer(bytearray(counted[top : top + step]), dtype=torch.bool)
            if bool(here.any()):
                block = self.run(slice(top * self.width, (top + len(here)) * self.width), read, total)
                total += block.view(-1, self.width)[here].double().sum(0)
        return total / max(1, sum(counted))

    def run(self, span: slice, read: Read, prepared: Tensor | None) -> Tensor:
        """Make a flat run of entries, in fp32, or fp64 where a table is."""
        import torch

        result = torch.zeros(span.stop - span.start, dtype=torch_dtype(self.dtype))
        for rows in self._pieces(span.start // self.width, -(-span.stop // self.width)):
            start, stop = max(span.start, rows.start * self.width), min(span.stop, rows.stop * self.width)
            values = result[start - span.start : stop - span.start]
            self._fill(values, rows, start - rows.start * self.width, read, prepared)
        return result

    def _pieces(self, first: int, last: int) -> Iterator[slice]:
        """Cut rows into pieces that are made in one go: what lies close in one table, or one after the other."""
        source, origin = self.rows.source, self.rows.row
        while first < last:
            end = first + 1
            while end < last and source[end] == source[first] and source[first] not in (MEAN, FILL):
                end += 1
            if source[first] < 0 or max(origin[first:end]) - min(origin[first:end]) < 2 * (end - first):
                yield slice(first, end)  # not much else lies between them
                first = end
            while first < end:
                start, first = first, first + _ascending(origin, first, end)
                yield slice(start, first)

    def _fill(self, values: Tensor, rows: slice, offset: int, read: Read, mean: Tensor | None) -> None:
        """Fill the entries from `offset` of the first of some rows on; they are zeros."""
        row = rows.start
        source = self.rows.source[row]
        if source >= 0:
            values.copy_(self._rows(read, source, self.rows.row[row : rows.stop], offset, len(values)))
        elif source == FILL and mean is not None:
            values.copy_(mean[offset : offset + len(values)])
        elif source == MEAN:
            owners = [(table, owned[row]) for table, owned in enumerate(self.rows.owned) if owned[row] >= 0]
            for table, own in owners:
                values += self._rows(read, table, array("i", [own]), offset, len(values)).to(values.dtype)
            values /= len(owners)

    def _rows(self, read: Read, table: int, rows: array[int], offset: int, count: int) -> Tensor:
        """Read rows of a table, from `offset` of the first on, so many entries."""
        if _ascending(rows, 0, len(rows)) == len(rows):
            start = rows[0] * self.width + offset
            return read(table, slice(start, start + count))
        import torch

        low = min(rows)
        block = read(table, slice(low * self.width, (max(rows) + 1) * self.width)).view(-1, self.width)
        found = block[torch.tensor(rows) - low].reshape(-1)
        return found[offset : offset + count]


def _ascending(rows: array[int], first: int, end: int) -> int:
    """Count the numbers from `first` on of which each follows the one before."""
    count = 1
    while first + count < end and rows[first + count] == rows[first] + count:
        count += 1
    return count
