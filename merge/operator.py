"""What an operator is: a plain function from several tensors to one, its settings read from its signature.

Positional parameters are tensors and their names say what they are; keyword-only parameters are settings:

    models       [n, *shape]   the weights of n models
    deltas       [n, *shape]   their weights minus the base's; the result is a delta too, and the base is added to it
    vectors      [n, *shape]   deltas where a base is given, else models; the result is of the same kind
    importances  [n, *shape]   how much every entry of each model counts, such as a diagonal Fisher
    base         [*shape]      the weights of the base

An operator is applied to a flat part of a tensor at a time. Its result for an entry may depend on that entry of its
inputs and on what its `measure` found in the whole tensor, never on where the parts begin. One that needs the whole row
in which an entry lies says so (`rows`), and gets parts of whole rows.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from .errors import MergeError

if TYPE_CHECKING:
    from torch import Tensor

    from .compiled.runs import Form

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

PerModel = Union[T, Sequence[T]]  # one value for all models, or one for each

Measure = Callable[..., Any]


@dataclass(frozen=True)
class Parts:
    """The positional tensors of an operator, part by part, as a measure goes through them: as often as it needs.

    Attributes:
        runs: gives anew, part by part, what reads it.
        models: how many models there are.
        shape: the tensor's; several tensors, one after the other, count as one of one dimension.
        threads: how many parts `map` may read and work on at once.
        name: the tensor's, for methods of others that ask for it; empty for several tensors.

    """

    runs: Callable[[], Iterable[Callable[[], tuple[Tensor, ...]]]]
    models: int
    shape: tuple[int, ...]
    threads: int = 1
    name: str = ""

    @property
    def entries(self) -> int:
        """How many entries all parts of one model have together."""
        return math.prod(self.shape)

    @classmethod
    def whole(cls, *tensors: Tensor) -> Parts:
        """Make one part of whole tensors, the first of them stacked [n, *shape]."""
        return cls(lambda: [lambda: tensors], len(tensors[0]), tuple(tensors[0].shape[1:]))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Go through the parts."""
        return (run() for run in self.runs())

    def placed(self) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Go through the parts, each with the flat index of its first entry."""
        start = 0
        for part in self:
            yield start, part
            start += part[0][0].numel()

    def gathered(self, model: int) -> Tensor:
        """Put the parts of one model together, [*shape], and hold no more than it and a part."""
        import torch

        whole: Tensor | None = None
        for start, (models, *_) in self.placed():
            values = models[model].reshape(-1)
            whole = values.new_empty(self.entries) if whole is None else whole
            whole[start : start + len(values)] = values
        return torch.empty(self.shape, device="cpu") if whole is None else whole.view(self.shape)

    def map(self, function: Callable[..., T]) -> Iterator[T]:
        """Give function(*part) for every part, in order; it is called on several threads, a few parts ahead."""
        return mapped(function, self.runs(), self.threads)


def mapped(function: Callable[..., T], runs: Iterable[Callable[[], tuple[Any, ...]]], threads: int) -> Iterator[T]:
    """Give function(*run()) for every run, in order, worked on by so many threads, a few runs ahead."""
    if threads == 1:
        yield from (function(*run()) for run in runs)
        return
    with ThreadPoolExecutor(threads, "survey") as pool:
        ahead: deque[Future[T]] = deque()
        try:
            for run in runs:
                ahead.append(pool.submit(lambda run: function(*run()), run))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Part:
    """Which entries of its tensor an operator is given: what it must know beyond them to give the same bits.

    Attributes:
        start: flat index of the first entry.
        shape: the whole tensor's; None: that of what is given.
        streams: a number per model, made from the tensor's and the model's names: it picks the random stream.
        measured: what the operator's measure found in the whole tensor; None: not measured yet.

    """

    start: int = 0
    shape: tuple[int, ...] | None = None
    streams: tuple[int, ...] = ()
    measured: Any = None


WHOLE = Part()


def row_width(shape: tuple[int, ...]) -> int:
    """Give the entries of a row: the last dimension; a vector is one row.

    >>> row_width((4, 3)), row_width((12,)), row_width(())
    (3, 12, 1)
    """
    return max(1, shape[-1] if shape else 1)


@dataclass(frozen=True, slots=True)
class Setting:
    """A keyword-only parameter: its name, its type, its default, and what it means."""

    name: str
    annotation: Any  # for one model, where per_model
    default: Any
    description: str
    per_model: bool

    @property
    def required(self) -> bool:
        """Tell whether a recipe must give it."""
        return self.default is inspect.Parameter.empty

    def check(self, value: object) -> Any:
        """Validate one value (for one model, where per_model). Raises pydantic.ValidationError."""
        return _adapter(self.annotation).validate_python(value)

    @property
    def type_name(self) -> str:
        """The type and bounds as help shows them: `float, > 0, ≤ 1`."""
        plain, bounds = self.annotation, []
        if typing.get_origin(plain) is Annotated:
            plain, *extra = typing.get_args(plain)
            bounds = [bound(piece) for field in extra for piece in getattr(field, "metadata", ())]
        if typing.get_origin(plain) is typing.Literal:
            name = " | ".join(str(choice) for choice in typing.get_args(plain))
        else:
            name = plain.__name__ if isinstance(plain, type) else str(plain)
        return ", ".join([name, *filter(None, bounds)])


def bound(piece: object) -> str:
    """Write a bound that an annotation sets, for people: `≥ 0`; nothing for what is none."""
    for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
        if hasattr(piece, attribute):
            return f"{sign} {getattr(piece, attribute):g}"
    return ""


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


@dataclass(frozen=True)
class Operator:
    """A registered operator: the function, what its signature says, and where it comes from."""

    name: str
    apply: Callable[..., Tensor]
    roles: tuple[str, ...]
    settings: Mapping[str, Setting]
    source: str
    laws: frozenset[str]
    measure: Measure | None
    takes: int | None  # exactly so many models; None: one or more
    refuse: Callable[..., str] | None
    rows: bool
    holds: int
    holds_each: int = 0
    compiled: Callable[..., Form | None] | None = None
    base_optional: bool = False  # `base` may be left out: only methods of plugins have that

    @property
    def needs_base(self) -> bool:
        """Tell whether it works on a base and models."""
        return self.takes_base and "vectors" not in self.roles and not self.base_optional

    @property
    def takes_base(self) -> bool:
        """Tell whether a base can be given."""
        return not {"deltas", "vectors", "base"}.isdisjoint(self.roles)

    @property
    def on_deltas(self) -> bool:
        """Tell whether it takes and gives deltas, where there is a base."""
        return self.roles[0] in ("deltas", "vectors")

    def refuses(self, count: int, settings: Mapping[str, Any]) -> str:
        """Say why these settings cannot be meant for so many models; nothing where they can."""
        if self.takes is not None and count != self.takes:
            return f"takes exactly {self.takes} model{'s' if self.takes > 1 else ''}, and {count} are given"
        for name, value in settings.items():
            if isinstance(value, tuple) and len(value) != count:
                return f"{name} has {len(value)} values for {count} models"
        return call(self.refuse, count=count, **settings) if self.refuse else ""

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (self.apply.__doc__ or "").strip().splitlines()[0]


LAWS = {
    "identity": "equal models give that model back (equal deltas that delta), with the defaults",
    "permutation": "the order of the models does not matter, up to rounding",
    "base": "models equal to the base give the base",
    "scaling": "scaling all inputs by a power of two scales the result",
}

REGISTRY: dict[str, Operator] = {}


def operator(
    *,
    source: str,
    laws: Iterable[str] = (),
    measure: Measure | None = None,
    takes: int | None = None,
    refuse: Callable[..., str] | None = None,
    rows: bool = False,
    holds: int = 0,
    holds_each: int = 0,
    compiled: Callable[..., Form | None] | None = None,
) -> Callable[[F], F]:
    """Register a function as the operator of its name, and hand it back unchanged.

    >>> import torch
    >>> from pydantic import Field
    >>> @operator(source="an example")
    ... def highest(models, *, times: Annotated[float, Field(gt=0, description="what it is multiplied by")] = 1.0):
    ...     "Take the highest value of each entry."
    ...     return times * models.amax(dim=0)
    >>> highest(torch.tensor([[1.0, 4.0], [3.0, 2.0]]), times=2.0)
    tensor([6., 8.])
    >>> found = REGISTRY["highest"]  # what recipes find under the name
    >>> found.roles, found.settings["times"].type_name, found.summary
    (('models',), 'float, > 0', 'Take the highest value of each entry.')

    Args:
        source: the paper and section, or the reference code at a commit.
        laws: the names of the laws that it obeys (`LAWS`); the law tests hold it to them.
        measure: function of (parts, **settings) that finds in the whole tensor what `apply` needs, as `part.measured`.
        takes: the exact number of models, where it is fixed.
        refuse: function of (count, **settings) that says why they cannot be meant; it is asked while planning.
        rows: whether an entry's result depends on its whole row (the last dimension; all of a vector).
        holds: how many matrices of the tensor's size it holds in memory, where it needs all of it at once.
        holds_each: how many more it holds for each of its inputs.
        compiled: function of (count, **settings) that says the same to the compiled library; None where it cannot.

    """

    def register(function: F) -> F:
        found = read_signature(function)
        kept = frozenset(laws)
        assert kept <= LAWS.keys(), f"unknown laws: {kept - LAWS.keys()}"
        name = function.__name__
        REGISTRY[name] = Operator(
            name, function, *found, source, kept, measure, takes, refuse, rows, holds, holds_each, compiled
        )
        return function

    return register


def read_signature(function: Callable[..., Any]) -> tuple[tuple[str, ...], Mapping[str, Setting]]:
    """Read roles (positional names) and settings (keyword-only, but for `part`) from a signature."""
    hints = typing.get_type_hints(function, localns={"Tensor": object, "Part": Part}, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    roles = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
    keyword = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "part"]
    return roles, {p.name: _setting(p.name, hints[p.name], p.default) for p in keyword}


def _setting(name: str, annotation: Any, default: Any) -> Setting:
    """Take `PerModel[…]` (a union of T and Sequence[T]) and the description off an annotation."""
    per_model = False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        one, *others = typing.get_args(annotation)
        if [typing.get_origin(other) for other in others] == [Sequence]:
            annotation, per_model = one, True
    fields = typing.get_args(annotation)[1:] if typing.get_origin(annotation) is Annotated else ()
    description = next((f.description or "" for f in fields if isinstance(f, FieldInfo)), "")
    return Setting(name, annotation, default, description, per_model)


def each(value: PerModel[T], count: int) -> tuple[T, ...]:
    """Spread a per-model setting over the models.

    >>> each(0.5, 2), each([0.25, 0.75], 2)
    ((0.5, 0.5), (0.25, 0.75))
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (value,) * count
    if len(value) != count:
        raise MergeError("", f"{len(value)} values for {count} models", "give one value, or one for each model")
    return tuple(value)


def call(function: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """Call a function with those of the settings that it names; with all if it takes any."""
    named = _parameters(function)
    return function(*arguments, **{key: value for key, value in settings.items() if named is None or key in named})


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str] | None:
    """Give the names of a function's parameters; None where it takes any."""
    found = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values())
    return None if takes_any else frozenset(found)
