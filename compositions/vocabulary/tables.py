"""The tensors of a model that have a row for every token: its embedding, its head, and their biases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from portmanteau.merge import Checkpoint, MergeError, TensorSpec
from portmanteau.merge.companions import INPUT_EMBEDDINGS
from portmanteau.merge.dtypes import is_float
from portmanteau.merge.names import matches

from ..matching import HEADS, is_tied

_HEADS = (
    f"{HEADS}|*lm_head.decoder.weight|*lm_head.linear.weight|output.weight|*output_layer.weight|*vocab_projector.weight"
    "|decoder.weight|*pred_layer.proj.weight|*proj_out.weight|head.weight|layers.*.linear.weight"
)
_BIASES = (
    "*lm_head.bias|*lm_head.decoder.bias|*lm_head.linear.bias|*predictions.bias|*predictions.decoder.bias|decoder.bias"
    "|*vocab_projector.bias|*pred_layer.proj.bias|*final_logits_bias|layers.*.linear.bias"
)


@dataclass(frozen=True)
class Table:
    """A tensor with a row for every token."""

    spec: TensorSpec
    role: Literal["input", "head", "bias"]

    @property
    def axis(self) -> int:
        """The dimension that counts tokens: the first one that is not 1."""
        return next((axis for axis, size in enumerate(self.spec.shape) if size != 1), 0)

    @property
    def rows(self) -> int:
        """How many tokens it has rows for."""
        return self.spec.shape[self.axis]

    @property
    def width(self) -> int:
        """The entries of a row."""
        return math.prod(self.spec.shape) // max(1, self.rows)

    def resized(self, rows: int, dtype: str) -> TensorSpec:
        """Give the spec with so many rows."""
        shape = (*self.spec.shape[: self.axis], rows, *self.spec.shape[self.axis + 1 :])
        return replace(self.spec, shape=shape, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of one model."""

    model: Checkpoint
    found: Sequence[Table]

    @property
    def rows(self) -> int:
        """How many rows they have; 0 where there are none."""
        return self.found[0].rows if self.found else 0

    def beside(self) -> list[str]:
        """Name what is outside the layers, has as many rows, and is not known to count tokens."""
        known = {table.spec.name for table in self.found}
        outside = [spec for name, spec in self.model.specs.items() if self.model.layers.place(name) is None]
        return [spec.name for spec in outside if self.rows in spec.shape and spec.name not in known]

    def like(self, other: Table) -> Table | None:
        """Give the table that is to this model what another is to its own; a tied head is the embedding."""
        alike = [one for one in self.found if one.role == other.role and one.width == other.width]
        named = [one for one in alike if one.spec.name == other.spec.name] or [
            one for one in alike if _end(one) == _end(other)
        ]
        if other.role == "head" and not any(one.role == "head" for one in self.found) and is_tied(self.model):
            named = [one for one in self.found if one.role == "input" and one.width == other.width][:1]
        return named[0] if len(named) == 1 else alike[0] if len(alike) == 1 else named[0] if named else None


def tables_of(model: Checkpoint) -> Tables:
    """Find the tables of a model. Raises MergeError where they differ in their rows, or are no floats."""
    inputs = [Table(spec, "input") for name, spec in model.specs.items() if _is_input(name, spec)]
    rows = sorted({table.rows for table in inputs})
    if len(rows) > 1:
        shown = ", ".join(f"{table.spec.name} has {table.rows}" for table in inputs)
        raise MergeError("", f"{model.label}: its embeddings differ in their rows: {shown}")
    found = [*inputs, *(_outputs(model, rows[0]) if rows else ())]
    odd = [table.spec for table in found if not is_float(table.spec.dtype)]
    if odd:
        raise MergeError("", f"{model.label}: the rows of {odd[0].name} are {odd[0].dtype}, which cannot be moved")
    return Tables(model, found)


def _is_input(name: str, spec: TensorSpec) -> bool:
    return matches(INPUT_EMBEDDINGS, name) and len(spec.shape) == 2


def _outputs(model: Checkpoint, rows: int) -> Iterator[Table]:
    """Go through what makes logits of the tokens."""
    for name, spec in model.specs.items():
        if matches(_HEADS, name) and len(spec.shape) == 2 and spec.shape[0] == rows:
            yield Table(spec, "head")
        if matches(_BIASES, name) and spec.entries == max(spec.shape) == rows:
            yield Table(spec, "bias")


def _end(table: Table) -> list[str]:
    """Give the end of a table's name, which models with another prefix share."""
    return table.spec.name.split(".")[-2:]
