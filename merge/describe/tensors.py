"""Tensors as plain values for tables and JSON: all of a folder, and those of one place in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..names import Stack
from ..tensor_spec import TensorSpec

OUTSIDE = "outside the layers"


def described(specs: Mapping[str, TensorSpec], groups: Sequence[Mapping[str, Any]], *, tensors: bool) -> dict[str, Any]:
    """Describe the tensors of a folder, by the names that they have there; every one if asked."""
    found: dict[str, Any] = {
        "tensors": len(specs),
        "entries": sum(spec.entries for spec in specs.values()),
        "bytes": sum(spec.nbytes for spec in specs.values()),
        "groups": groups,
    }
    if tensors:
        found["list"] = [
            {"name": name, "dtype": spec.dtype, "shape": list(spec.shape), "bytes": spec.nbytes}
            for name, spec in specs.items()
        ]
    return found


def of_stack(stack: Stack | None, specs: Mapping[str, TensorSpec], names: Iterable[str]) -> dict[str, Any]:
    """Describe some of a folder's tensors that lie in one stack of layers; None: outside the layers."""
    where, layers = (stack.prefix, str(stack.count)) if stack else (OUTSIDE, "")
    return group(where, layers, (specs[name] for name in names))


def group(where: str, layers: str, specs: Iterable[TensorSpec]) -> dict[str, Any]:
    """Describe the tensors of one place."""
    found = list(specs)
    return {
        "where": where,
        "layers": layers,
        "tensors": len(found),
        "bytes": sum(spec.nbytes for spec in found),
        "dtypes": ", ".join(sorted({spec.dtype for spec in found})),
    }
