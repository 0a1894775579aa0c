"""Records of sums, such as those of one tensor, added up exactly, so that their order does not matter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

Sums = TypeVar("Sums")


def total(kind: type[Sums], records: Iterable[Sums]) -> Sums:
    """Add up records field by field: counts as they are, fp64 numbers rounded once. Of none, everything is zero.

    `kind` is a dataclass of numbers whose defaults are 0 or 0.0.
    """
    every = list(records)
    sums: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]  # mypy knows no type that all dataclasses are of
        values = [getattr(one, field.name) for one in every]
        sums[field.name] = sum(values) if isinstance(field.default, int) else math.fsum(values)
    return kind(**sums)
