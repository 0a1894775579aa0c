"""The dtypes of safetensors: sizes, torch's names for them, and what two of them promote to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import PortmanteauError, nearest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Dtype:
    """One dtype: its safetensors name, its bits, torch's name ("" where torch has none) and its kind."""

    name: str
    bits: int
    torch_name: str
    kind: str  # "float" can be merged; "integer", "complex" and "packed" are only copied


_ALL = (
    Dtype("F64", 64, "float64", "float"),
    Dtype("F32", 32, "float32", "float"),
    Dtype("F16", 16, "float16", "float"),
    Dtype("BF16", 16, "bfloat16", "float"),
    Dtype("F8_E4M3", 8, "float8_e4m3fn", "float"),
    Dtype("F8_E5M2", 8, "float8_e5m2", "float"),
    Dtype("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", "float"),
    Dtype("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", "float"),
    Dtype("F8_E8M0", 8, "float8_e8m0fnu", "packed"),  # scales of other tensors: powers of two, no sign
    Dtype("F6_E2M3", 6, "", "packed"),
    Dtype("F6_E3M2", 6, "", "packed"),
    Dtype("F4", 4, "float4_e2m1fn_x2", "packed"),
    Dtype("C64", 64, "complex64", "complex"),
    Dtype("I64", 64, "int64", "integer"),
    Dtype("I32", 32, "int32", "integer"),
    Dtype("I16", 16, "int16", "integer"),
    Dtype("I8", 8, "int8", "integer"),
    Dtype("U64", 64, "uint64", "integer"),
    Dtype("U32", 32, "uint32", "integer"),
    Dtype("U16", 16, "uint16", "integer"),
    Dtype("U8", 8, "uint8", "integer"),
    Dtype("BOOL", 8, "bool", "integer"),
)
DTYPES = {dtype.name: dtype for dtype in _ALL}
_BY_TORCH_NAME = {dtype.torch_name: dtype.name for dtype in _ALL if dtype.torch_name}
_SHORT = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "bf16": "BF16", "float": "F32", "half": "F16", "double": "F64"}


def byte_size(dtype: str, entries: int) -> int:
    """Give the bytes that so many entries of this dtype take on disk."""
    return (DTYPES[dtype].bits * entries + 7) // 8


def is_float(dtype: str) -> bool:
    """Tell whether tensors of this dtype are merged; all others are only copied."""
    return DTYPES[dtype].kind == "float"


def is_packed(dtype: str) -> bool:
    """Tell whether entries of this dtype mean nothing on their own: parts of quantised tensors."""
    return DTYPES[dtype].kind == "packed"


def torch_dtype(dtype: str) -> torch.dtype:
    """Give torch's dtype for a safetensors name."""
    import torch

    found = getattr(torch, DTYPES[dtype].torch_name or "-", None)
    if not isinstance(found, torch.dtype):
        raise PortmanteauError("", f"this torch has no dtype for {dtype}", "such tensors can only be copied")
    return found


def from_torch(dtype: torch.dtype) -> str:
    """Give the safetensors name of a torch dtype."""
    return _BY_TORCH_NAME[str(dtype).removeprefix("torch.")]


def torch_name(dtype: str) -> str:
    """Give the name that config.json uses: `bfloat16` for `BF16`."""
    return DTYPES[dtype].torch_name


def torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Give the shape that torch has for a stored shape: it counts two values of four bits as one entry.

    >>> torch_shape("F4", (2, 8)), torch_shape("BF16", (2, 8))
    ((2, 4), (2, 8))
    """
    return (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape


def parse(text: str) -> str:
    """Read a dtype as people write it: `bfloat16`, `bf16`, `BF16`, `torch.bfloat16`.

    >>> parse("bfloat16"), parse("fp16"), parse("F32")
    ('BF16', 'F16', 'F32')
    """
    word = text.removeprefix("torch.")
    name = word.upper() if word.upper() in DTYPES else _BY_TORCH_NAME.get(word) or _SHORT.get(word.lower())
    if name is None:
        known = [dtype.torch_name for dtype in _ALL if dtype.kind == "float"]
        raise PortmanteauError("", f"unknown dtype {text!r}", nearest(word, known))
    return name


def promote(dtypes: Iterable[str]) -> str:
    """Give the smallest dtype that holds every value of the given float dtypes, as torch.promote_types does.

    >>> promote(["BF16", "F32"]), promote(["BF16", "F16"]), promote(["BF16", "BF16"])
    ('F32', 'F32', 'BF16')
    """
    kinds = list(dict.fromkeys(dtypes))
    if len(kinds) == 1:
        return kinds[0]
    halves = {"F16", "BF16"}
    if "F64" in kinds:
        return "F64"
    if "F32" in kinds or halves <= set(kinds):
        return "F32"
    return next((kind for kind in kinds if kind in halves), "F32")


def working(dtypes: Iterable[str]) -> str:
    """Give the dtype in which tensors of these dtypes are computed: fp32, or fp64 where one of them is fp64."""
    return "F64" if "F64" in dtypes else "F32"
