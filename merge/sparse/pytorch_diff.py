"""The published form of sparse fine-tunes, `pytorch_diff.bin` (cambridgeltl/composable-sft at 29f7872, `sft.py`).

A pickle of {"diffs": {NAME: {"size", "index_steps", "values"}}, "abs": {NAME: tensor}}. Positions are column-major
(the first coordinate runs fastest) and stored as steps: the first position, then the way to each next one. The
reference decodes three dimensions and more, and positions from 2³¹ on, wrongly; here both are right.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dtypes import is_known
from ..errors import CheckpointError, Mistake

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "pytorch_diff.bin"


@dataclass(frozen=True)
class Decoded:
    """What such a file holds: name → (row-major ascending positions, int64 [k]; values [k]), shapes, whole tensors."""

    sparse: Mapping[str, tuple[Tensor, Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    dense: Mapping[str, Tensor]


def read(path: Path) -> Decoded:
    """Read a file without running anything in it. Raises CheckpointError, with every mistake found."""
    found = _unpickled(path)
    diffs, dense = (found.get(key) if isinstance(found, dict) else None for key in ("diffs", "abs"))
    if not isinstance(diffs, dict) or not isinstance(dense, dict):
        raise CheckpointError(str(path), "holds no `diffs` and `abs`", "composable-sft's SFT.save writes both")
    sparse, shapes, mistakes = {}, {}, []
    for name, entry in diffs.items():
        try:
            sparse[str(name)], shapes[str(name)] = _decoded(entry)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            mistakes.append(Mistake(str(path), f"{name}: {error}", "save or download it again"))
    for name, tensor in dense.items():
        if not (hasattr(tensor, "dtype") and is_known(tensor.dtype)):
            mistakes.append(Mistake(str(path), f"{name}: a {type(tensor).__name__} where a tensor was expected"))
    if mistakes:
        raise CheckpointError.of(mistakes)
    return Decoded(sparse, shapes, {str(name): tensor for name, tensor in dense.items()})


def write(path: Path, content: Decoded) -> None:
    """Write a file that composable-sft reads, and that torch reads with weights only: plain integers, no numpy ones."""
    import torch

    diffs = {}
    for name, (indices, values) in content.sparse.items():
        size = content.shapes[name]
        flat, order = _column_major(indices, size).sort()
        steps = torch.diff(flat, prepend=flat.new_zeros(1)).tolist()
        diffs[name] = {"size": torch.Size(size), "index_steps": steps, "values": values[order]}
    whole = io.BytesIO()  # given a path, torch says nothing of a full disk
    torch.save({"diffs": diffs, "abs": dict(content.dense)}, whole)
    path.write_bytes(whole.getbuffer())


def _unpickled(path: Path) -> Any:
    """Unpickle with weights only; the first step of every tensor is a numpy integer, spelled in one of two ways."""
    import numpy as np
    import torch
    from numpy._core.multiarray import scalar

    allowed: list[Any] = [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        np.dtypes.Int64DType,
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can lead anywhere in the unpickler
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "files that carry code are never executed"
        raise CheckpointError(str(path), f"not a file of plain tensors ({first})", hint) from error


def _decoded(entry: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    """Decode one tensor. Raises ValueError where it contradicts itself."""
    import torch

    size, values = tuple(int(one) for one in entry["size"]), entry["values"]
    steps = torch.tensor([int(step) for step in entry["index_steps"]], dtype=torch.int64)
    entries = 1
    for one in size:
        entries *= one
    if not isinstance(values, torch.Tensor) or values.shape != steps.shape or not values.dtype.is_floating_point:
        raise ValueError(f"{len(steps)} positions do not go with its values")
    flat = steps.cumsum(0)
    if len(steps) and (int(steps[0]) < 0 or bool((steps[1:] <= 0).any()) or int(flat[-1]) >= entries):
        raise ValueError(f"its positions do not lie in order in a tensor of {list(size)}")
    indices, order = _row_major(flat, size).sort()
    return (indices, values[order]), size


def _row_major(flat: Tensor, size: tuple[int, ...]) -> Tensor:
    """Turn column-major positions into row-major ones: the coordinates one by one, the first runs fastest."""
    if not len(flat):  # also where a size is 0
        return flat
    result, stride = flat.new_zeros(flat.shape), 1
    for one in size:
        result = result * one + (flat // stride) % one
        stride *= one
    return result


def _column_major(flat: Tensor, size: tuple[int, ...]) -> Tensor:
    """Turn row-major positions into column-major ones."""
    return _row_major(flat, size[::-1])
