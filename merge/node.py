"""How one tensor is made: read from a file, by an operator from others, or by a maker from whole others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from .dtypes import is_float, working
from .operator import Measure, Operator, each
from .registry import find
from .tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from .compiled.runs import MakerForm


class Store(Protocol):
    """What holds tensors on disk: what plans, cards and receipts say of it, and its bytes."""

    label: str
    revision: str | None
    repository: str | None

    @property
    def files(self) -> Sequence[Any]:
        """Its weight files, each with a path and a digest of its header."""

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """Read a tensor, or a flat run of its entries."""

    def read_into(self, name: str, buffer: memoryview, at: int = 0) -> None:
        """Fill a buffer with a tensor's stored bytes, from its byte `at` on."""

    def forget(self, name: str) -> None:
        """Tell the system that a tensor is not read again."""


@dataclass(frozen=True, eq=False, slots=True)
class Source:
    """A stored tensor: the checkpoint that holds it, and its spec there."""

    checkpoint: Store
    spec: TensorSpec

    @property
    def output(self) -> TensorSpec:
        """What reading it gives."""
        return self.spec

    def __str__(self) -> str:
        """Checkpoint and tensor, as plans show them."""
        return f"{self.checkpoint.label}:{self.spec.name}"


@dataclass(frozen=True, eq=False, slots=True)
class Inputs:
    """The tensors that meet in one operation.

    Attributes:
        models: those of the models, in order.
        base: the base's, where there is one.
        importances: what every entry of each model counts, where that is given: one for each model.

    """

    models: tuple[Node, ...]
    base: Node | None = None
    importances: tuple[Node, ...] = ()

    def __iter__(self) -> Iterator[Node]:
        """Go through the models', then what goes with them, then the base's."""
        yield from self.models
        yield from self.importances
        if self.base is not None:
            yield self.base

    @property
    def dtype(self) -> str:
        """The dtype in which they are computed; their own where they are no floats."""
        kinds = [node.output.dtype for node in self]
        return working(kinds) if all(is_float(kind) for kind in kinds) else kinds[0]


@dataclass(frozen=True, eq=False, slots=True)
class Survey:
    """A named pass over many tensors, before the steps, whose result is a setting of some of them.

    Attributes:
        title: what is found, as the plan shows it: `mean absolute change of layer 5`.
        measure: function of (groups, **settings): for every group the parts of its tensors, one tensor after the other.
        groups: the tensors under the names that the measure knows them by, those that meet in one operation together;
            taken as deltas where there is a base.
        settings: passed on to the measure.
        held: bytes that the measure holds at once, on each thread, beside a part.
        compiled: the same measure over parts as they are stored, for the compiled library.

    """

    title: str
    measure: Measure
    groups: Mapping[Any, tuple[Inputs, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    held: int = 0
    compiled: Measure | None = None

    def __iter__(self) -> Iterator[Node]:
        """Go through all nodes that it reads."""
        return (node for group in self.groups.values() for inputs in group for node in inputs)

    @property
    def nbytes(self) -> int:
        """The bytes that it reads."""
        return sum(source.spec.nbytes for node in self for source in sources(node))


@dataclass(frozen=True, slots=True)
class Finding:
    """One of the things that a survey finds, as a setting: what stands under a key of its result."""

    survey: Survey
    key: Any

    def __str__(self) -> str:
        """What a plan shows as long as the survey has not been carried out."""
        return f"by {self.survey.title}"


@dataclass(frozen=True, eq=False, slots=True)
class Step:
    """How one output tensor is made.

    Attributes:
        output: name, dtype and shape of the result.
        operator: what is done.
        settings: its settings for this tensor; a Finding stands for what a survey will find.
        inputs: the tensors that it is done to: stored ones, or the results of other steps. Where an operator takes
            deltas and there is no base, they are deltas themselves, and so is the result.
        labels: what the models are called; feeds the random streams.
        why: the recipe line that asked for it.

    """

    output: TensorSpec
    operator: Operator
    settings: Mapping[str, Any]
    inputs: Inputs
    labels: tuple[str, ...] = ()
    why: str = ""

    def __post_init__(self) -> None:
        """Hold the shapes together: compositions have checked them."""
        assert all(node.output.shape == self.output.shape for node in self.inputs), self.output.name

    @property
    def on_deltas(self) -> bool:
        """Tell whether the operator is given deltas, and the base is added to its result."""
        return self.operator.on_deltas and self.inputs.base is not None

    @property
    def every_setting(self) -> dict[str, Any]:
        """The settings, and the operator's defaults of those that are not given."""
        return {**{name: one.default for name, one in self.operator.settings.items()}, **self.settings}

    @property
    def is_copy(self) -> bool:
        """Tell whether it takes a tensor as it is."""
        return self.operator.name == "copy" and set(each(self.settings.get("factor", 1.0), 1)) == {1.0}


Read = Callable[[int, slice | None], "Tensor"]  # of the input of this number: a flat run, or all of it in its shape


class Maker(Protocol):
    """Makes a tensor of others that it must see whole: a low-rank product, a selection of entries."""

    def prepare(self, read: Read) -> Any:
        """Find what must be known before any run of entries is made; it is kept until the tensor is done."""

    def run(self, span: slice, read: Read, prepared: Any) -> Tensor:
        """Make a flat run of entries [span.stop - span.start]. The same bits, wherever runs begin."""


class Shared(Protocol):
    """What several tensors share: computed once for all of them."""

    @property
    def learned(self) -> Any:
        """What it found out on the way and will be asked for, in what JSON has."""

    def recall(self, learned: Any) -> None:
        """Take what it learned in an earlier build, whose tensors are kept."""


@dataclass(frozen=True, eq=False, slots=True)
class Made:
    """A tensor made of others of any shapes.

    Attributes:
        output: name, dtype and shape of the result.
        maker: what makes it.
        inputs: the tensors that it is made of.
        held: bytes that the maker holds at once beside a part.
        together: what it shares with other tensors, computed once for all: one thread makes them, one after the other.
        compiled: says the same as the maker to the compiled library.

    """

    output: TensorSpec
    maker: Maker
    inputs: tuple[Node, ...]
    held: int = 0
    together: Shared | None = None
    compiled: MakerForm | None = None


Node = Source | Made | Step


def copy_of(node: Node, output: TensorSpec, label: str, why: str = "") -> Step:
    """Make the step that takes a tensor as it is."""
    return Step(output, find("copy"), {}, Inputs((node,)), (label,), why)


def sources(node: Node) -> Iterator[Source]:
    """Go through the stored tensors that a node is made from."""
    if isinstance(node, Source):
        yield node
    else:
        for inner in node.inputs:
            yield from sources(inner)


def steps(node: Node) -> Iterator[Step]:
    """Go through the steps that make a node: its own, and before it those inside."""
    if not isinstance(node, Source):
        for inner in node.inputs:
            yield from steps(inner)
    if isinstance(node, Step):
        yield node


def surveys(node: Node) -> Iterator[Survey]:
    """Go through the surveys that a node waits for, inner ones first."""
    if isinstance(node, Step):
        for value in node.settings.values():
            if isinstance(value, Finding):
                yield from (found for inner in value.survey for found in surveys(inner))
                yield value.survey
    if not isinstance(node, Source):
        for inner in node.inputs:
            yield from surveys(inner)
