"""A checkpoint whose tensors are known only after a survey: how many entries a selection takes of each, which rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from .checkpoint import Checkpoint
from .companions import Companions
from .composed import Composed
from .evaluate import Session, conduct
from .node import Node, Survey, surveys
from .tensor_spec import TensorSpec
from .units import readable

if TYPE_CHECKING:
    from torch import Tensor


class Surveyed(Checkpoint):
    """A checkpoint that a survey must settle. A build settles it first; asked for a tensor, it settles itself."""

    def __init__(
        self,
        label: str,
        survey: Survey,
        settle: Callable[[Any], Composed],
        most: int,
        companions: Companions,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Say what is looked for, and what is made of it.

        Args:
            label: what messages call it.
            survey: what must be found first.
            settle: makes the checkpoint of what was found.
            most: the most bytes that it will have.
            companions: what stands beside the weights.
            notes: what a user should know of it.

        """
        self.label = label
        self.survey = survey
        self.settle = settle
        self.most = most
        self.companions = companions
        self.notes = notes

    def _repr_html_(self) -> str:
        """A table of what must be found first; showing it reads nothing."""
        from . import notebook

        return notebook.table(
            repr(self)[1:-1], ("survey first", "reads"), [(self.survey.title, readable(self.survey.nbytes))]
        )

    def _ipython_key_completions_(self) -> list[str]:
        """Complete nothing: names would need the survey."""
        return []

    @cached_property
    def _settled(self) -> Composed:
        """Carry out the survey, with those it waits for, and make the checkpoint."""
        found: dict[Survey, Any] = {}
        for survey in (*(inner for node in self.survey for inner in surveys(node)), self.survey):
            if survey not in found:
                found[survey] = conduct(survey, Session(found=found))
        return self.settle(found[self.survey])

    @property
    def specs(self) -> Mapping[str, TensorSpec]:  # type: ignore[override]  # known late, but never written
        """What the survey leads to; reads weights when it is first asked for."""
        return self._settled.specs

    def node(self, name: str) -> Node:
        """Give the way to make this tensor."""
        return self._settled.node(name)

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """Make one tensor now, or a flat run of its entries."""
        return self._settled.read(name, part)

    def __repr__(self) -> str:
        """Kind and label; what it holds is not known without reading."""
        return f"<{type(self).__name__} {self.label}: at most {self.most / 1e6:.1f} MB>"

    def called(self, label: str) -> Self:
        """Give the same checkpoint under another label."""
        return type(self)(label, self.survey, self.settle, self.most, self.companions, self.notes)

    def beside(self, companions: Companions) -> Self:
        """Give the same checkpoint with other companions."""
        return type(self)(self.label, self.survey, self.settle, self.most, companions, self.notes)

    def because(self, why: str) -> Self:
        """Stamp the recipe line on the steps that will make it."""
        settle = self.settle
        return type(self)(
            self.label, self.survey, lambda found: settle(found).because(why), self.most, self.companions, self.notes
        )
