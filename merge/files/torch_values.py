"""What stands in a PyTorch file for tensors: storages, views of them, and the names that its pickles may ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..dtypes import DTYPES
from .pickled import Builder, PickleError

_MOST_DIMENSIONS = 64  # numpy's
_LARGEST = 1 << 63
_STORAGES = {  # a storage's class → its dtype, and its bytes for each entry; small letters: no dtype of safetensors
    "DoubleStorage": ("F64", 8),
    "FloatStorage": ("F32", 4),
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8),
    "IntStorage": ("I32", 4),
    "ShortStorage": ("I16", 2),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "BoolStorage": ("BOOL", 1),
    "ComplexFloatStorage": ("C64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
    "QInt8Storage": ("qint8", 1),
    "QUInt8Storage": ("quint8", 1),
    "QInt32Storage": ("qint32", 4),
}
_NOT_PLAIN = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without data",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
}


@dataclass(frozen=True)
class StorageClass:
    """A kind of storage: the dtype of its entries (empty: bytes, whose meaning each tensor tells), and their size."""

    dtype: str
    size: int


@dataclass(frozen=True)
class Storage:
    """A run of entries: the record that holds it, the first entry there, and how many."""

    key: str
    kind: StorageClass
    begin: int
    entries: int


@dataclass(frozen=True)
class Opaque:
    """What is no plain tensor, in words; it is refused where a tensor is expected."""

    what: str


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage. Offset and strides count entries of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Tell whether its entries lie in row-major order, without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
) -> StoredTensor | Opaque:
    """Stand for `_rebuild_tensor_v2`."""
    if not isinstance(storage, Storage):
        raise PickleError("a tensor without a storage")
    if metadata:
        return Opaque("a tensor that is conjugated or negated when it is read")
    return _viewed(storage, storage.kind.dtype, storage.entries, offset, size, stride)


def _tensor_of_bytes(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> StoredTensor | Opaque:
    """Stand for `_rebuild_tensor_v3`, whose storage is untyped."""
    if not isinstance(storage, Storage) or not isinstance(dtype, StorageClass) or storage.begin:
        raise PickleError("a tensor without a storage")
    if metadata:
        return Opaque("a tensor that is conjugated or negated when it is read")
    entries = storage.entries * storage.kind.size // dtype.size
    return _viewed(storage, dtype.dtype, entries, offset, size, stride)


def _viewed(storage: Storage, dtype: str, entries: int, offset: Any, size: Any, stride: Any) -> StoredTensor | Opaque:
    """Check that a view lies in its storage."""
    if dtype not in DTYPES:
        return Opaque(f"a tensor of {dtype}" if dtype else "a tensor of bytes without a dtype")
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
        raise PickleError("a tensor whose shape and strides do not go together")
    if not all(type(one) is int and 0 <= one < _LARGEST for one in (offset, *size, *stride)):
        raise PickleError("a tensor whose shape is no list of sizes")
    if math.prod(one or 1 for one in size) >= _LARGEST:
        raise PickleError("a tensor of too many entries")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= entries or math.prod(size) > entries):
        raise PickleError(f"a tensor of {list(size)} in a storage of {entries} entries")
    return StoredTensor(storage, dtype, offset, size, stride)


def _of_type(make: Any, kind: Any, arguments: Any, state: Any) -> Any:
    """Stand for `_rebuild_from_type_v2`: a tensor with attributes."""
    if not isinstance(make, Builder) or make.make is _of_type or type(arguments) is not tuple:
        raise PickleError("it calls what is no part of a plain tensor")
    return make.make(*arguments)


def _size(value: Any = ()) -> tuple[Any, ...]:
    if type(value) not in (tuple, list):
        raise PickleError("a size that is no list")
    return tuple(value)


def storage_of(identity: Any) -> Storage:
    """Make the storage that a persistent id names. Raises PickleError."""
    if type(identity) is not tuple or len(identity) not in (5, 6) or identity[0] != "storage":
        raise PickleError("it asks for what is no storage")
    _, kind, key, _, entries = identity[:5]
    view = identity[5] if len(identity) == 6 else None
    if not isinstance(kind, StorageClass) or type(key) is not str or type(entries) is not int:
        raise PickleError("it asks for what is no storage")
    begin, count = (0, entries) if view is None else view[1:]
    if not all(type(one) is int and 0 <= one < _LARGEST for one in (entries, begin, count)) or begin + count > entries:
        raise PickleError("a storage of no size")
    return Storage(key, kind, begin, count)


def _names() -> dict[str, Any]:
    classes = {name: StorageClass(*one) for name, one in _STORAGES.items()}
    found: dict[str, Any] = {
        "collections OrderedDict": Builder(dict),
        "torch Size": Builder(_size),
        "torch Tensor": None,
        "torch.nn.parameter Parameter": None,
        "torch.storage UntypedStorage": StorageClass("", 1),
        "torch._utils _rebuild_tensor_v2": Builder(_tensor),
        "torch._utils _rebuild_tensor_v3": Builder(_tensor_of_bytes),
        "torch._utils _rebuild_parameter": Builder(lambda tensor, grad, hooks: tensor),
        "torch._utils _rebuild_parameter_with_state": Builder(lambda tensor, grad, hooks, state: tensor),
        "torch._tensor _rebuild_from_type_v2": Builder(_of_type),
        "torch.serialization _get_layout": Builder(lambda name: None),
        "torch device": Builder(lambda *arguments: None),
    }
    found |= {f"{module} {name}": one for module in ("torch", "torch.cuda") for name, one in classes.items()}
    dtypes = {one.torch_name: StorageClass(one.name, one.bits // 8) for one in DTYPES.values() if one.torch_name}
    found |= {f"torch {name}": one for name, one in dtypes.items() if one.size}
    return found | {f"torch._utils {n}": Builder(lambda *_, what=what: Opaque(what)) for n, what in _NOT_PLAIN.items()}


NAMES: Mapping[str, Any] = _names()
