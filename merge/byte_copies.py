"""Tensors whose stored bytes are carried over as they are, without torch where the file is safetensors."""

from __future__ import annotations

from collections.abc import Iterator

from .dtypes import is_float
from .errors import MergeError
from .evaluate import located
from .files.storage import BLOCK
from .node import Source, Step


def is_byte_copy(step: Step) -> bool:
    """Tell whether a step only carries stored bytes over."""
    return step.is_copy and _is_stored(step)


def is_shared(step: Step) -> bool:
    """Tell whether a step carries stored bytes over that all models must share, and that are no floats."""
    return step.operator.name == "equal" and not is_float(step.output.dtype) and _is_stored(step)


def _is_stored(step: Step) -> bool:
    return all(isinstance(node, Source) and node.spec.dtype == step.output.dtype for node in step.inputs)


def copied(step: Step) -> Iterator[memoryview]:
    """Read the bytes of the first model; compare the others' with them. Raises MergeError where they differ.

    Each run of bytes is valid until the next is asked for.
    """
    first, *others = step.inputs
    size = step.output.nbytes
    buffer, beside = (memoryview(bytearray(min(BLOCK, size))) for _ in range(2))
    for at in range(0, size, BLOCK):
        block, other = buffer[: min(BLOCK, size - at)], beside[: min(BLOCK, size - at)]
        _read(first, block, at)
        for node in others:
            _read(node, other, at)
            if block != other:
                raise located(MergeError("", "the models differ here", step.every_setting["reason"]), step)
        yield block


def _read(node: object, block: memoryview, at: int) -> None:
    assert isinstance(node, Source)
    node.checkpoint.read_into(node.spec.name, block, at)
