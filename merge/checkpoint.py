"""What a checkpoint is: a mapping from tensor names to tensors that are made only when they are read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from .dtypes import byte_size
from .names import Layers

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .companions import Companions
    from .plan import Source, Step


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its entries: name, safetensors dtype name (`BF16`), shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def entries(self) -> int:
        """Number of entries; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return byte_size(self.dtype, self.entries)


class Checkpoint(ABC):
    """A mapping from tensor names to tensors: a folder on disk, or what a composition makes of others.

    Attributes:
        label: what messages and receipts call it, as its user wrote it.
        specs: name → TensorSpec, in the order of the checkpoint; known without reading weights.
        companions: the config, the tokenizer and the other files that go with the weights.

    """

    label: str
    specs: Mapping[str, TensorSpec]
    companions: Companions

    @abstractmethod
    def node(self, name: str) -> Source | Step:
        """Give the way to make this tensor: a stored tensor, or a step over others."""

    @abstractmethod
    def read(self, name: str, part: slice | None = None) -> Tensor:
        """Make one tensor, in its own dtype and shape; with `part`, a flat run of its entries [part.stop - part.start].

        Raises KeyError for an unknown name and CheckpointError where the file does not hold what its header promised.
        """

    def __getitem__(self, name: str) -> Tensor:
        """Make one tensor now."""
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        """Go through the tensor names."""
        return iter(self.specs)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.specs)

    def __repr__(self) -> str:
        """Kind, label and size."""
        return f"<{type(self).__name__} {self.label}: {len(self)} tensors, {self.nbytes / 1e6:.1f} MB>"

    @cached_property
    def layers(self) -> Layers:
        """The stacks of layers, learned from the names."""
        return Layers(self.specs)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    def to_model(self) -> PreTrainedModel:
        """Make a transformers model in memory, of the class that the config names.

        Raises CheckpointError where there is no config or where names do not fit the model.
        """
        from .model import to_model

        return to_model(self)
