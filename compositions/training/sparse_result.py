"""What sparse training leaves: the trained entries with their places, and the tensors that were trained whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from portmanteau.merge import Checkpoint, MergeError, StoredCheckpoint, build
from portmanteau.merge.errors import Mistake
from portmanteau.merge.names import align
from portmanteau.merge.sparse.file import in_memory
from portmanteau.merge.sparse.fingerprint import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

_NOT_PORTABLE = "parameters that were freshly initialised, or are stored under other names, cannot be added to it"


@dataclass(frozen=True)
class Entries:
    """The entries of one tensor that were trained, in the order of their places.

    Attributes:
        indices: row-major places in the flat tensor, int64 [k].
        start: the values before training [k], in the model's dtype.
        final: the values after training [k], in the model's dtype.

    """

    indices: Tensor
    start: Tensor
    final: Tensor

    @classmethod
    def under(cls, mask: Tensor, start: Tensor, final: Tensor) -> Entries:
        """Take the entries under a mask. Shapes: [*shape] all three."""
        indices = mask.reshape(-1).nonzero()[:, 0]
        return cls(indices, start.reshape(-1)[indices], final.detach().cpu().reshape(-1)[indices])

    @property
    def delta(self) -> Tensor:
        """final − start in fp32 (fp64 for fp64) [k]; zero for an entry that the sparse phase left where it was."""
        import torch

        wide = torch.float64 if self.start.dtype == torch.float64 else torch.float32
        return self.final.to(wide) - self.start.to(wide)


@dataclass(frozen=True)
class SparseFineTuning:
    """A sparse fine-tuning, in memory on the CPU.

    Attributes:
        entries: the entries of every maskable tensor by name; none, for a tensor that was not selected from.
        dense: tensors that were trained whole, by name; usually a head.
        shapes: of every maskable tensor, by name.
        details: how it was trained, as text.

    """

    entries: Mapping[str, Entries]
    dense: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    details: Mapping[str, str]

    @property
    def count(self) -> int:
        """Count the trained entries; those of the dense tensors not among them."""
        return sum(len(entries.indices) for entries in self.entries.values())

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks again: name → bool [*shape]."""
        import torch

        masks = {}
        for name, entries in self.entries.items():
            mask = torch.zeros(self.shapes[name], dtype=torch.bool, device=entries.indices.device)
            mask.view(-1)[entries.indices] = True
            masks[name] = mask
        return masks

    def save(self, folder: str | Path, base: StoredCheckpoint) -> None:
        """Write it to a new folder, as a sparse fine-tune of the base that a recipe can compose.

        Raises MergeError where the base does not hold a parameter, CheckpointError and OutputError as `build` does.
        """
        names = names_in(base, self.shapes)
        sparse = {
            names[name]: (found.indices, found.delta) for name, found in self.entries.items() if len(found.indices)
        }
        shapes = {names[name]: shape for name, shape in self.shapes.items()}
        made = in_memory(str(folder), sparse, shapes, self.dense, fingerprint(base), self.details)
        build(made.stored, Path(folder))


def names_in(base: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Say what the base calls each parameter: the same, or with the prefix that the model adds or drops (`bert.`).

    Raises MergeError for parameters that the base does not hold, and for those of another shape there.
    """
    alignment = align(shapes, base.specs)
    names = {name: alignment.renamed.get(name, name) if alignment else name for name in shapes}
    mistakes = list(_absent(base, shapes, names))
    if mistakes:
        raise MergeError.of(mistakes)
    return names


def _absent(base: Checkpoint, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]) -> Iterable[Mistake]:
    for name, shape in shapes.items():
        spec = base.specs.get(names[name])
        if spec is None:
            yield Mistake(name, f"is to be trained sparsely, and {base.label} does not hold it", _NOT_PORTABLE)
        elif spec.shape != shape:
            what = f"has the shape {list(shape)}, and {list(spec.shape)} in {base.label}"
            yield Mistake(name, what, "was the vocabulary resized? Save the resized model and name that as the base")
