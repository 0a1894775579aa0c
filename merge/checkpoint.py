"""What a checkpoint is: a mapping from tensor names to tensors that are made only when they are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from .companions import Companions, true_config
from .errors import CheckpointError, some
from .names import Layers
from .node import Node
from .tensor_spec import TensorSpec
from .units import readable

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class Checkpoint(ABC):
    """A mapping from tensor names to tensors: a folder on disk, or what a composition makes of others.

    Attributes:
        label: what messages and receipts call it, as its user wrote it.
        specs: name → TensorSpec, in the order of the checkpoint; known without reading weights.
        companions: the config, the tokenizer and the other files that go with the weights.
        notes: what a user should know of it; of one on disk there is nothing.

    """

    label: str
    specs: Mapping[str, TensorSpec]
    companions: Companions
    notes: tuple[str, ...] = ()

    @abstractmethod
    def node(self, name: str) -> Node:
        """Give the way to make this tensor: a stored tensor, or a step over others."""

    @abstractmethod
    def read(self, name: str, part: slice | None = None) -> Tensor:
        """Make one tensor, in its own dtype and shape; with `part`, a flat run of its entries [part.stop - part.start].

        Raises KeyError for an unknown name and CheckpointError where the file does not hold what its header promised.
        """

    @abstractmethod
    def beside(self, companions: Companions) -> Self:
        """Give the same checkpoint with other companions."""

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

    def _repr_html_(self) -> str:
        """A table of the stacks of layers and what is outside them, for notebooks."""
        from . import notebook

        rows = [
            (
                stack.prefix if stack else "outside the layers",
                stack.count if stack else "",
                len(names),
                readable(sum(self.specs[name].nbytes for name in names)),
                ", ".join(sorted({self.specs[name].dtype for name in names})),
            )
            for stack, names in self.layers.by_stack(self.specs).items()
        ]
        return notebook.table(repr(self)[1:-1], ("where", "layers", "tensors", "bytes", "dtypes"), rows)

    def _ipython_key_completions_(self) -> list[str]:
        """Complete tensor names in `checkpoint["…`."""
        return list(self.specs)

    @cached_property
    def layers(self) -> Layers:
        """The stacks of layers, learned from the names."""
        return Layers(self.specs)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs.values())

    def to_model(self) -> PreTrainedModel:
        """Make the transformers model that the config names, in memory, with every tensor of this checkpoint loaded.

        Raises CheckpointError where there is no config, or where names are missing in the model or here.
        """
        import transformers

        if self.companions.config is None:
            raise CheckpointError(self.label, "has no config.json, so the kind of model is not known")
        fields = true_config(self.companions.config, self.specs.values())
        try:
            config = transformers.AutoConfig.for_model(**fields)
        except (TypeError, ValueError) as error:
            raise CheckpointError(self.label, f"its config.json is not that of a known model: {error}") from error
        named = next((getattr(transformers, one, None) for one in self.companions.architectures), None)
        kind: Any = transformers.AutoModel  # a config may name any attribute of transformers
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            kind = named
        state = {name: self.read(name) for name in self.specs}
        model, report = kind.from_pretrained(
            None,  # from a state dict alone
            config=config,
            state_dict=state,
            dtype=config.dtype,
            output_loading_info=True,
        )
        if report["missing_keys"] or report["unexpected_keys"]:
            names = sorted([*report["missing_keys"], *report["unexpected_keys"]])
            raise CheckpointError(self.label, f"does not fit {kind.__name__}: {some(names)}")
        found: PreTrainedModel = model.eval()
        return found
