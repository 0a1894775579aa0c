"""The published form of sparse fine-tunes, `pytorch_diff.bin` (cambridgeltl/composable-sft at 29f7872, `sft.py`).

A pickle of {"diffs": {NAME: {"size", "index_steps", "values"}}, "abs": {NAME: tensor}}. Positions are column-major
(the first coordinate runs fastest) and stored as steps: the first position, then the way to each next one. The
reference decodes three dimensions and more, and positions from 2³¹ on, wrongly; here both are right.
"""

from __future__ import annotations

import io
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dtypes import byte_size, is_float, torch_dtype
from ..errors import CheckpointError, Mistake
from ..files.pickled import Builder, Built, PickleError
from ..files.torch_file import TorchTensors
from ..files.torch_values import NAMES, StoredTensor
from ..tensor_spec import TensorSpec, name_mistake

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "pytorch_diff.bin"
_MOST_PICKLE = 64 << 20  # bytes: some thirty million steps
_MOST_TENSORS = 20_000  # the largest known models have some thousand
_MOST_DIMENSIONS = 64
_LARGEST = 1 << 63


@dataclass(frozen=True)
class Decoded:
    """What such a file holds: name → (row-major ascending positions, int64 [k]; values [k]), shapes, whole tensors."""

    sparse: Mapping[str, tuple[Tensor, Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    dense: Mapping[str, Tensor]


def read(path: Path) -> Decoded:
    """Read a file without running anything in it. Raises CheckpointError, with every mistake found."""
    file = TorchTensors(path, _NAMES, _MOST_PICKLE, "files that carry code are never executed")
    found = file.value
    diffs, dense = (found.get(key) if isinstance(found, dict) else None for key in ("diffs", "abs"))
    if not isinstance(diffs, dict) or not isinstance(dense, dict):
        raise CheckpointError(str(path), "holds no `diffs` and `abs`", "composable-sft's SFT.save writes both")
    _check_amount(path, diffs, dense)
    sparse, shapes, whole = {}, {}, {}
    mistakes = [Mistake(f"{path}: {name}", what) for name in (*diffs, *dense) if (what := name_mistake(str(name)))]
    for name, entry in diffs.items():
        try:
            sparse[str(name)], shapes[str(name)] = _decoded(file, str(name), entry)
        except ValueError as error:
            mistakes.append(Mistake(str(path), f"{name}: {error}", "save or download it again"))
    for name, tensor in dense.items():
        if isinstance(tensor, StoredTensor):
            whole[str(name)] = _read(file, str(name), tensor)
        else:
            mistakes.append(Mistake(str(path), f"{name}: a {type(tensor).__name__} where a tensor was expected"))
    if mistakes:
        raise CheckpointError.of(mistakes)
    return Decoded(sparse, shapes, whole)


def _check_amount(path: Path, diffs: Mapping[Any, Any], dense: Mapping[Any, Any]) -> None:
    """Look whether all that is read has an end: a file can name the same bytes any number of times."""
    if len(diffs) + len(dense) > _MOST_TENSORS:
        raise CheckpointError(str(path), f"holds more than {_MOST_TENSORS:,} tensors")
    values = [entry.get("values") for entry in diffs.values() if isinstance(entry, dict)]
    stored = [one for one in (*values, *dense.values()) if isinstance(one, StoredTensor)]
    nbytes = sum(byte_size(one.dtype, math.prod(one.shape)) for one in stored)
    if nbytes > 2 * path.stat().st_size:  # tied tensors may share their bytes
        what = f"its tensors have {nbytes:,} bytes, and it holds {path.stat().st_size:,}: they lie over each other"
        raise CheckpointError(str(path), what, "save it again, each tensor by itself")


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


@dataclass
class _Dtype(Built):
    """Stands for a numpy dtype; its state says the byte order."""

    code: str = ""


def _integer(dtype: Any, raw: Any) -> int:
    """Stand for a numpy integer: the first step of every tensor is one."""
    if not isinstance(dtype, _Dtype) or dtype.code not in _INTEGERS or type(raw) is not bytes:
        raise PickleError("a numpy value that is no integer")
    big = isinstance(dtype.state, tuple) and dtype.state[1:2] == (">",)
    return int.from_bytes(raw[:8], "big" if big else "little", signed=dtype.code[0] == "i")


def _bytes(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or len(text) > 8 or encoding != "latin1":
        raise PickleError("a text that stands for no number")
    return text.encode("latin1")


_INTEGERS = [f"{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8)]
_NAMES = {
    **NAMES,
    "numpy dtype": Builder(lambda code, *_: _Dtype(code=code)),
    "numpy.core.multiarray scalar": Builder(_integer),
    "numpy._core.multiarray scalar": Builder(_integer),
    "_codecs encode": Builder(_bytes),
}


def _read(file: TorchTensors, name: str, tensor: StoredTensor) -> Tensor:
    """Read a whole tensor."""
    import torch

    raw = torch.empty(TensorSpec(name, tensor.dtype, tensor.shape).nbytes, dtype=torch.uint8, device="cpu")
    file.read_into(name, tensor, raw.numpy().data, 0)
    return raw.view(torch_dtype(tensor.dtype)).reshape(tensor.shape)


def _decoded(file: TorchTensors, name: str, entry: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, ...]]:
    """Decode one tensor. Raises ValueError where it contradicts itself."""
    import torch

    widths = {"i": torch.int32, "q": torch.int64}
    parts = [entry.get(key) if isinstance(entry, dict) else None for key in ("size", "index_steps", "values")]
    size, listed, stored = parts
    if not isinstance(size, tuple) or not all(type(one) is int and 0 <= one < _LARGEST for one in size):
        raise ValueError("its size is no shape")
    runs = _runs(listed)
    count, entries = sum(map(len, runs)), math.prod(size[:_MOST_DIMENSIONS])
    fits = isinstance(stored, StoredTensor) and stored.shape == (count,) and is_float(stored.dtype)
    if not isinstance(stored, StoredTensor) or not fits:
        raise ValueError(f"{count} positions do not go with its values")
    steps = [torch.tensor([], dtype=torch.int64), *(torch.frombuffer(run, dtype=widths[run.typecode]) for run in runs)]
    flat = torch.cat([run.long() for run in steps]).cumsum(0)  # a sum that overflows is less than the one before it
    in_order = not count or (int(flat[0]) >= 0 and int(flat[-1]) < entries and not bool((flat[1:] <= flat[:-1]).any()))
    if len(size) > _MOST_DIMENSIONS or entries >= _LARGEST or not in_order:
        raise ValueError(f"its positions do not lie in order in a tensor of {list(size[:_MOST_DIMENSIONS])}")
    values = _read(file, name, stored)
    indices, order = _row_major(flat, size).sort()
    return (indices, values[order]), size


def _runs(listed: Any) -> list[array[int]]:
    """Give steps, in their order, in arrays. Raises ValueError for anything else."""
    found: list[array[int]] = []
    for one in listed if isinstance(listed, list) else (None,):
        if type(one) is array:
            found.append(one)
        elif type(one) is int and 0 <= one < _LARGEST:
            if not found or found[-1].typecode != "q":
                found.append(array("q"))
            found[-1].append(one)
        else:
            raise ValueError("its index_steps are no list of steps")
    return found


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
