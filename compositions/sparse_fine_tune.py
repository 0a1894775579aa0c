"""Sparse fine-tunes added to their base, or to each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from portmanteau.merge import Checkpoint, Composed, MergeError, SparseFineTune, Step, StoredCheckpoint
from portmanteau.merge.dtypes import is_float, working
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import align
from portmanteau.merge.node import Inputs, Made, Node, copy_of
from portmanteau.merge.registry import find
from portmanteau.merge.sparse.entries import scattered
from portmanteau.merge.sparse.fingerprint import fingerprint
from portmanteau.merge.tensor_spec import TensorSpec

from .composition import composition

_OTHER = "name the base that it was made for, or say other_base: allow where you know better"
_DENSE = "say dense: false for all but one: {sft: {dense: false}}"

Weight = Annotated[float, Field(allow_inf_nan=False)]
OtherBase = Annotated[
    Literal["error", "allow"], Field(description="a sparse fine-tune that was made for another base: refuse, or add")
]


@dataclass(frozen=True)
class Term:
    """How one sparse fine-tune is added."""

    weight: Weight = 1.0
    dense: bool = True
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}


@composition(
    source="Ansell et al. 2022 (arXiv 2110.07560), section 3.2: θ + φ_task + φ_language; composable-sft at 29f7872",
    example="sparse_fine_tune: {base: ./base, diffs: [./math-sparse, ./swahili-sparse]}",
)
def sparse_fine_tune(
    *,
    base: Annotated[Checkpoint, Field(description="the model that the sparse fine-tunes were made for")],
    diffs: Annotated[
        Mapping[SparseFineTune, Weight | Term] | Sequence[SparseFineTune],
        Field(description="sparse fine-tunes: a list, or a mapping to weights, or to {weight: , dense: }"),
    ],
    dense: Annotated[bool, Field(description="take the tensors that they store whole, such as a head")] = True,
    other_base: OtherBase = "error",
) -> Composed:
    """Add sparse fine-tunes to their base.

    Formula: θ + Σ wᵢ φᵢ in fp32, in the order given, cast once to the base's dtype; where two change the same entry,
    both are added. A weight of −1 subtracts, which restores the base up to rounding (`revert_sparse` restores its
    bytes). Entries that none changes keep their bytes. What a sparse fine-tune stores whole (`dense`, a head) replaces
    the base's tensor or is added to it; for a language on a task, say `dense: false`.

    >>> from portmanteau import merge
    >>> base = merge.open("examples/models/base")
    >>> diffs = [merge.open_sparse(f"examples/models/{name}-sparse") for name in ("task", "language")]
    >>> both = sparse_fine_tune(base=base, diffs=diffs)
    >>> name = "model.layers.0.mlp.up_proj.weight"
    >>> [diff.values(name).spec.entries for diff in diffs], int((both[name] != base[name]).sum())  # 2 are in both
    ([61, 16], 75)

    Raises MergeError, with every mistake found, for other bases, shapes and names, and for two heads in one place.
    """
    terms = _terms(diffs, dense)
    fitted = fit(terms, base, other_base)
    mistakes = [mistake for one in fitted for mistake in one.mistakes]
    mistakes += _dense_mistakes(terms)
    if len(terms) < len(diffs):
        mistakes.append(Mistake("diffs", "a sparse fine-tune is named twice", "give it a weight instead"))
    if mistakes:
        raise MergeError.of(mistakes)
    weights = [term.weight for term in terms.values()]
    nodes: dict[str, Node] = {name: _step(base.node(name), spec, fitted, weights) for name, spec in base.specs.items()}
    notes = [*base.notes, *(note for one in fitted for note in one.notes)]
    for one, term in zip(fitted, terms.values(), strict=True):
        if term.dense:
            added = [name for name in one.dense if name not in base.specs]
            for name, own in one.dense.items():
                nodes[name] = _whole(one, own, base.specs.get(name))
            if added:
                notes.append(f"{one.label}: adds tensors that the base lacks; its config is kept: {some(added)}")
    return Composed("sparse_fine_tune", nodes, base.companions, tuple(notes))


@dataclass(frozen=True)
class Fitted:
    """One sparse fine-tune under the names of a base.

    Attributes:
        diff: the sparse fine-tune.
        names: name in the base → its own name, of the tensors that it changes in some entries.
        dense: name in the base → its own name, of those that it stores whole.
        mistakes: what does not fit.
        notes: what a user should know.

    """

    diff: SparseFineTune
    names: Mapping[str, str]
    dense: Mapping[str, str]
    mistakes: tuple[Mistake, ...]
    notes: tuple[str, ...]

    @property
    def label(self) -> str:
        """What messages call it."""
        return self.diff.label


def fit(diffs: Iterable[SparseFineTune], base: Checkpoint, other_base: str) -> list[Fitted]:
    """Bring sparse fine-tunes under the names of a base, and find everything that does not fit."""
    every = list(diffs)
    asked = other_base == "error" and any(diff.base for diff in every)
    mark = fingerprint(base) if asked and isinstance(base, StoredCheckpoint) else ""
    return [_fitted(diff, base, mark) for diff in every]


def _fitted(diff: SparseFineTune, base: Checkpoint, mark: str) -> Fitted:
    alignment = align(list(diff.shapes), base.specs)
    renamed = alignment.renamed if alignment else {}
    names = {renamed.get(name, name): name for name in diff.shapes}
    dense = {renamed.get(name, name): name for name in diff.dense}
    mistakes = [*_not_of_the_base(diff, base, mark), *_do_not_fit(diff, base, names, dense)]
    notes = [alignment.note(diff.label, "the base")] if alignment else []
    if not diff.base:
        notes.append(f"{diff.label}: does not say for which base it was made; only names and shapes were compared")
    elif not isinstance(base, StoredCheckpoint):
        notes.append(f"{diff.label}: {base.label} is made, so it was not compared with the base that it was made for")
    return Fitted(diff, names, dense, tuple(mistakes), tuple(notes))


def _not_of_the_base(diff: SparseFineTune, base: Checkpoint, mark: str) -> Iterator[Mistake]:
    """Compare the base's fingerprint, where it was taken, with that of the base which the file names."""
    if mark and diff.base and mark != diff.base:
        what = f"{diff.label} was made for another base (fingerprint {diff.base[:12]}, {base.label} has {mark[:12]})"
        yield Mistake("diffs", what, _OTHER)


def _do_not_fit(
    diff: SparseFineTune, base: Checkpoint, names: Mapping[str, str], dense: Mapping[str, str]
) -> Iterator[Mistake]:
    lacking = [name for name in names if name not in base.specs]
    if lacking:
        what = f"{diff.label}: the base lacks {len(lacking)} tensors that it changes: {some(lacking)}"
        yield Mistake("diffs", what, "name the base that it was made for")
    for name, own in names.items():
        spec = base.specs.get(name)
        if spec is not None and (spec.shape != diff.shapes[own] or not is_float(spec.dtype)):
            found = f"{list(diff.shapes[own])}, the base has {list(spec.shape)} {spec.dtype}"
            yield Mistake("diffs", f"{diff.label}: {name} is {found}", "the base has another vocabulary or shape")
    for name, own in dense.items():
        spec, stored = base.specs.get(name), diff.whole(own).spec
        if spec is not None and spec.shape != stored.shape:
            what = f"{diff.label}: {name} is stored whole as {list(stored.shape)}, the base has {list(spec.shape)}"
            yield Mistake("diffs", what, "dense: false leaves it as the base has it")


def _terms(diffs: Any, dense: bool) -> dict[SparseFineTune, Term]:
    """Give weight and choice for each, whichever way they were written."""
    given = diffs if isinstance(diffs, Mapping) else dict.fromkeys(diffs, 1.0)
    terms = {diff: value if isinstance(value, Term) else Term(float(value)) for diff, value in given.items()}
    return {diff: replace(term, dense=term.dense and dense) for diff, term in terms.items()}


def _dense_mistakes(terms: Mapping[SparseFineTune, Term]) -> Iterator[Mistake]:
    """Find whole tensors that two bring, or that would have to be weighted."""
    if not terms:
        yield Mistake("diffs", "names no sparse fine-tune")
    holders: dict[str, list[str]] = {}
    for diff, term in terms.items():
        if term.dense and diff.dense and term.weight != 1:
            what = f"{diff.label}: stores tensors whole, which have no weight {term.weight:g}: {some(diff.dense)}"
            yield Mistake("diffs", what, "say dense: false for it")
        for name in diff.dense if term.dense else ():
            holders.setdefault(name, []).append(diff.label)
    several = [name for name, labels in holders.items() if len(labels) > 1]
    if several:
        labels = ", ".join(dict.fromkeys(label for name in several for label in holders[name]))
        yield Mistake("diffs", f"{labels} store the same tensors whole: {some(several)}", _DENSE)


def _whole(one: Fitted, own: str, spec: TensorSpec | None) -> Step:
    node = one.diff.whole(own)
    return copy_of(node, spec or replace(node.spec, name=own), one.label)


def _step(node: Node, spec: TensorSpec, fitted: Sequence[Fitted], weights: Sequence[float]) -> Step:
    """Make the step for one tensor of the base."""
    changing = [(one, weight) for one, weight in zip(fitted, weights, strict=True) if spec.name in one.names]
    if not changing:
        return copy_of(node, spec, "base")
    changes = tuple(_dense(spec, one, weight) for one, weight in changing)
    settings = {"weight": 1.0, "normalize": False}
    labels = ("base", *(one.label for one, _ in changing))
    return Step(spec, find("linear"), settings, Inputs((node, *changes)), labels)


def _dense(spec: TensorSpec, one: Fitted, weight: float) -> Made:
    own = one.names[spec.name]
    indices, values = one.diff.indices(own), one.diff.values(own)
    dtype = working([spec.dtype, values.spec.dtype])
    return scattered(replace(spec, dtype=dtype), indices, values, weight, one.label)
