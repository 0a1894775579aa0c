"""A checkpoint that a composition makes of others: a node for every tensor, nothing read until it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

from .checkpoint import Checkpoint
from .companions import Companions
from .evaluate import Evaluation, Session, conduct
from .node import Node, Source, Step, Survey, surveys
from .tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


class Composed(Checkpoint):
    """A checkpoint made of steps over others."""

    def __init__(
        self, label: str, nodes: Mapping[str, Node], companions: Companions, notes: tuple[str, ...] = ()
    ) -> None:
        """Put nodes together under the names of the result; `notes` say what a user should know of it."""
        self.label = label
        self.companions = companions
        self.notes = notes
        self._nodes = MappingProxyType(dict(nodes))
        self._found: dict[Survey, Any] = {}
        self.specs: Mapping[str, TensorSpec] = {
            name: replace(node.output, name=name) for name, node in self._nodes.items()
        }

    def node(self, name: str) -> Node:
        """Give the way to make this tensor."""
        return self._nodes[name]

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """Make one tensor now, or a flat run of its entries, in its own dtype."""
        node, spec = self._nodes[name], self.specs[name]
        if isinstance(node, Source):
            return node.checkpoint.read(node.spec.name, part)
        import torch

        from .dtypes import torch_dtype

        for survey in surveys(node):
            if survey not in self._found:
                self._found[survey] = conduct(survey, Session(found=self._found))
        if part is not None:
            evaluation = Evaluation(Session(keep=0, found=self._found))
            return evaluation.value(node, spec.run(part)).to(torch_dtype(spec.dtype))
        evaluation = Evaluation(Session(found=self._found))
        result = torch.empty(spec.entries, dtype=torch_dtype(spec.dtype))
        for span, values in evaluation.parts(node):
            result[span] = values
        return result.reshape(spec.shape)

    def called(self, label: str) -> Self:
        """Give the same checkpoint under another label."""
        return type(self)(label, self._nodes, self.companions, self.notes)

    def beside(self, companions: Companions) -> Self:
        """Give the same checkpoint with other companions."""
        return type(self)(self.label, self._nodes, companions, self.notes)

    def noted(self, notes: tuple[str, ...]) -> Self:
        """Give the same checkpoint with more notes."""
        return type(self)(self.label, self._nodes, self.companions, tuple(dict.fromkeys((*self.notes, *notes))))

    def because(self, why: str) -> Self:
        """Stamp the recipe line on those steps that have none yet."""
        nodes = {
            name: replace(node, why=why) if isinstance(node, Step) and not node.why else node
            for name, node in self._nodes.items()
        }
        return type(self)(self.label, nodes, self.companions, self.notes)
