"""Several LoRA adapters combined into one: which factors meet, and how the factors of their sum are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from portmanteau.merge import Adapter, Composed, MergeError, TensorSpec
from portmanteau.merge.adapters.adapter import Module
from portmanteau.merge.adapters.decomposition import OfMatrix, OfProducts, factors, side_by_side, zeros
from portmanteau.merge.adapters.low_rank import low_rank
from portmanteau.merge.dtypes import is_float, working
from portmanteau.merge.errors import Mistake, nearest, some
from portmanteau.merge.names import Layers, align
from portmanteau.merge.node import Inputs, Made, Node, Step
from portmanteau.merge.registry import find, operators

from .lora_folder import Folder, Pair, Saved, agreed
from .matching import Met
from .tensorwise import check, step_on_deltas

Combine = Literal["cat", "svd", "linear"] | Mapping[str, Any]
_FOLD_FIRST = "fold it into its base (lora with a base), and take the result's LoRA with extract_lora"
_MATRIX = 2


@dataclass(frozen=True)
class Term:
    """What one adapter does to one module: weight · scaling · B A."""

    adapter: Adapter
    module: Module
    weight: float

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.weight * self.module.scaling

    @property
    def a(self) -> Node:
        """A [rank, in]."""
        return self.adapter.stored.node(self.module.a)

    @property
    def b(self) -> Node:
        """B [out, rank]."""
        return self.adapter.stored.node(self.module.b)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of B A."""
        return self.b.output.shape[0], self.a.output.shape[1]


@dataclass(frozen=True)
class Together:
    """Several adapters under the module names of the first.

    Attributes:
        terms: path of the module → what each adapter that changes it does.
        saved: name in the base → the adapters that store it whole, with the node.
        notes: on names that were changed, and modules that are not in every adapter.

    """

    terms: Mapping[str, tuple[Term, ...]]
    saved: Mapping[str, Mapping[Adapter, Node]]
    notes: tuple[str, ...]


def combined(weights: Mapping[Adapter, float], combine: Combine, rank: int | None) -> Composed:
    """Combine adapters into an adapter. Raises MergeError with every mistake found."""
    way = _Way.of(combine, rank)
    mistakes = [*way.mistakes(weights)]
    if mistakes:
        raise MergeError.of(mistakes)
    met = bring_together(weights)
    mistakes = [*_without_magnitudes(weights), *_saved_once(met, weights)]
    if way.name == "linear":
        mistakes += _of_one_rank(met)
    if mistakes:
        raise MergeError.of(mistakes)
    largest = max(term.module.rank for terms in met.terms.values() for term in terms)
    way = replace(way, rank=way.rank or largest)
    layers = Layers([f"{path}.weight" for path in met.terms])
    pairs = {path: way.pair(path, terms, weights, layers) for path, terms in met.terms.items()}
    saved = {name: Saved(node, one.label) for name, holders in met.saved.items() for one, node in holders.items()}
    settings, notes = agreed(list(weights))
    return Folder(pairs, saved, settings, (*met.notes, *notes)).composed("lora")


def bring_together(weights: Mapping[Adapter, float]) -> Together:
    """Find the modules that adapters change, under the names of the first. Raises MergeError where they do not fit."""
    first, *_ = weights
    terms: dict[str, list[Term]] = {}
    saved: dict[str, dict[Adapter, Node]] = {}
    notes = []
    for adapter, weight in weights.items():
        alignment = align(adapter.targets, first.targets) if adapter is not first else None
        renamed = alignment.renamed if alignment else {}
        for path, module in adapter.modules.items():
            name = renamed.get(f"{path}.weight", f"{path}.weight").removesuffix(".weight")
            terms.setdefault(name, []).append(Term(adapter, module, float(weight)))
        for name, own in adapter.saved.items():
            saved.setdefault(renamed.get(name, name), {})[adapter] = adapter.stored.node(own)
        if alignment:
            notes.append(alignment.note(adapter.label, first.label))
    mistakes = [mistake for path, found in terms.items() for mistake in _not_fitting(path, found)]
    if mistakes:
        raise MergeError.of(mistakes)
    for adapter in weights:
        lacking = [path for path, found in terms.items() if all(term.adapter is not adapter for term in found)]
        if lacking:
            notes.append(f"{adapter.label}: lacks {len(lacking)} modules of the others; its change of them is zero")
    return Together({path: tuple(found) for path, found in terms.items()}, saved, tuple(notes))


def _not_fitting(path: str, terms: Sequence[Term]) -> Iterator[Mistake]:
    """Compare the factors of one module with its config, and with those of the other adapters."""
    good = []
    for term in terms:
        a, b = term.a.output, term.b.output
        shapes = f"A {list(a.shape)}, B {list(b.shape)}"
        if len(a.shape) != _MATRIX or len(b.shape) != _MATRIX or not (is_float(a.dtype) and is_float(b.dtype)):
            yield wrong(term.adapter, f"{path}: its factors are no matrices of floats: {shapes}")
        elif not a.shape[0] == b.shape[1] == term.module.rank:
            hint = "config and weights come from different saves: download it again"
            yield wrong(term.adapter, f"{path}: its config gives rank {term.module.rank}, its factors {shapes}", hint)
        else:
            good.append(term)
    if len({(term.shape, term.module.embedding) for term in good}) > 1:
        shown = ", ".join(f"{term.adapter.label} {list(term.shape)}" for term in good)
        yield Mistake("adapters", f"{path}: shapes differ: {shown}", "combine adapters of one base")


def _without_magnitudes(weights: Mapping[Adapter, float]) -> Iterator[Mistake]:
    for adapter in weights:
        if any(module.magnitude for module in adapter.modules.values()):
            yield wrong(adapter, "is DoRA: what it does depends on its base and cannot be combined", _FOLD_FIRST)


def _saved_once(met: Together, weights: Mapping[Adapter, float]) -> Iterator[Mistake]:
    """Let one adapter at most, at weight 1, store tensors whole."""
    holders = list(dict.fromkeys(adapter for found in met.saved.values() for adapter in found))
    if len(holders) > 1:
        labels = ", ".join(adapter.label for adapter in holders)
        what = f"{labels} store tensors whole, which only one of the adapters may: {some(met.saved)}"
        yield Mistake("adapters", what, _FOLD_FIRST)
    for adapter in holders:
        if weights[adapter] != 1:
            what = f"stores tensors whole, which cannot be done at weight {weights[adapter]:g}: {some(met.saved)}"
            yield wrong(adapter, what, _FOLD_FIRST)
    changed = [name for name in met.saved if name.removesuffix(".weight") in met.terms]
    if changed:
        yield Mistake("adapters", f"stored whole by one adapter and changed by another: {some(changed)}", _FOLD_FIRST)


def _of_one_rank(met: Together) -> Iterator[Mistake]:
    for path, terms in met.terms.items():
        ranks = {term.adapter.label: term.module.rank for term in terms}
        if len(set(ranks.values())) > 1:
            shown = ", ".join(f"{label} {rank}" for label, rank in ranks.items())
            yield Mistake("combine", f"linear adds A and B by themselves, and the ranks of {path} differ: {shown}")


def wrong(adapter: Adapter, what: str, hint: str = "") -> Mistake:
    """Name a mistake of one adapter."""
    return Mistake("adapters", f"{adapter.label}: {what}", hint)


@dataclass(frozen=True)
class _Way:
    """How the changes of one module are combined: cat, svd, linear, or the name of an operator with settings."""

    name: str
    rank: int | None
    settings: Mapping[str, Any] | None = None  # of an operator
    unclear: tuple[Mistake, ...] = ()

    @classmethod
    def of(cls, combine: Combine, rank: int | None) -> _Way:
        """Read it as it is given: a name, or `{OPERATOR: {SETTING: VALUE}, rank: RANK}`."""
        if isinstance(combine, str):
            return cls(combine, rank)
        names = [key for key in combine if key != "rank"]
        inner = combine.get("rank")
        settings = (combine[names[0]] or {}) if names else {}
        unclear = []
        if len(names) != 1 or not isinstance(settings, Mapping):
            hint = "for example: combine: {ties: {density: 0.3}, rank: 16}"
            unclear.append(Mistake("combine", "must name one operator, with its settings", hint))
        if inner is not None and (rank is not None or type(inner) is not int or inner < 1):
            what = "rank is given twice" if rank is not None else f"rank is {inner!r}, not a whole number above 0"
            unclear.append(Mistake("combine.rank", what))
        return cls(names[0] if names else "", inner or rank, settings, tuple(unclear))

    def mistakes(self, weights: Mapping[Adapter, float]) -> Iterator[Mistake]:
        """Find what cannot be meant."""
        yield from self.unclear
        if self.unclear:
            return
        if self.settings is None:
            if self.name != "svd" and self.rank is not None:
                yield Mistake("rank", f"combine: {self.name} chooses the rank itself", "combine: svd takes a rank")
            return
        if self.name not in operators():
            hint = nearest(self.name, ["cat", "svd", "linear", *operators()])
            yield Mistake(f"combine.{self.name}", f"unknown operator {self.name!r}", hint)
            return
        operator = find(self.name)
        if "base" in operator.roles:
            what = f"{self.name} needs the base's weights, and adapters are combined by their changes alone"
            yield Mistake(f"combine.{self.name}", what, "merge the folded models instead: lora: in models")
            return
        if "weight" in self.settings:
            yield Mistake(f"combine.{self.name}.weight", "the weights stand beside the adapters")
        elif "weight" not in operator.settings and any(weight != 1 for weight in weights.values()):
            yield Mistake("adapters", f"{self.name} takes no weights", "give the adapters as a list")
        labels = [adapter.label for adapter in weights]
        for path, what, hint in check(self.name, labels, operator.needs_base, self._given(weights), ()):
            yield Mistake(".".join(map(str, ("combine", self.name, *path))), what, hint)

    def _given(self, weights: Mapping[Adapter, float]) -> dict[str, Any]:
        own = {adapter.label: float(weight) for adapter, weight in weights.items()}
        return {**({"weight": own} if "weight" in find(self.name).settings else {}), **(self.settings or {})}

    def pair(self, path: str, terms: tuple[Term, ...], weights: Mapping[Adapter, float], layers: Layers) -> Pair:
        """Make the factors for one module."""
        dtype = working([node.output.dtype for term in terms for node in (term.a, term.b)])
        label = ", ".join(term.adapter.label for term in terms)
        embedding = terms[0].module.embedding
        if self.name == "cat" and self.settings is None:
            return concatenated(terms, dtype, label)
        if self.name == "linear" and self.settings is None:
            a, b = _added(terms, dtype)
            return Pair(a, b, embedding=embedding, label=label)
        out, width = terms[0].shape
        most = sum(term.module.rank for term in terms) if self.settings is None else min(out, width)
        assert self.rank is not None
        rank = min(self.rank, most, out, width)
        specs = TensorSpec("", dtype, (rank, width)), TensorSpec("", dtype, (out, rank))
        if self.settings is None:
            products = OfProducts(tuple(term.scale for term in terms), rank)
            inputs = [node for term in terms for node in (term.a, term.b)]
            held = products.held(out, width, most)
            a, b = factors(*specs, products, inputs, held)
        else:
            dense = self._dense(path, terms, weights, layers)
            matrix = OfMatrix(path, rank)
            a, b = factors(*specs, matrix, [dense], matrix.held(out, width))
        return Pair(a, b, embedding=embedding, label=f"{self.name} of {label}")

    def _dense(self, path: str, terms: tuple[Term, ...], weights: Mapping[Adapter, float], layers: Layers) -> Step:
        """Apply the operator to the changes themselves; an adapter that lacks the module has a change of zero."""
        dtype = working([node.output.dtype for term in terms for node in (term.a, term.b)])
        spec = TensorSpec(f"{path}.weight", dtype, terms[0].shape)
        changes = {
            term.adapter: low_rank(spec, term.a, term.b, term.module.scaling, transposed=False) for term in terms
        }
        nodes: dict[str, Node] = {one.label: changes.get(one) or zeros(spec) for one in weights}
        met = Met(spec, nodes, complete=True)
        return step_on_deltas(self.name, self._given(weights), met, layers.place(spec.name))


def concatenated(terms: Sequence[Term], dtype: str, label: str) -> Pair:
    """Put the factors of a weighted sum together, exactly: A = [c₁A₁; c₂A₂; …], B = [B₁ B₂ …]. One is left as it is."""
    (out, width), rank = terms[0].shape, sum(term.module.rank for term in terms)
    embedding = terms[0].module.embedding
    if len(terms) == 1 and terms[0].scale > 0:
        return Pair(terms[0].a, terms[0].b, terms[0].scale, embedding, label=label)
    a = side_by_side(
        TensorSpec("", dtype, (rank, width)), [term.a for term in terms], [term.scale for term in terms], dim=0
    )
    b = side_by_side(TensorSpec("", dtype, (out, rank)), [term.b for term in terms], [1.0] * len(terms), dim=1)
    return Pair(a, b, embedding=embedding, label=f"cat of {label}")


def _added(terms: Sequence[Term], dtype: str) -> tuple[Step | Made, Step | Made]:
    """Add the factors themselves, as peft's `linear` does: Σ sgn(c) √|c| A and Σ √|c| B."""
    roots = tuple(abs(term.scale) ** 0.5 for term in terms)
    signed = tuple(-root if term.scale < 0 else root for root, term in zip(roots, terms, strict=True))
    labels = tuple(term.adapter.label for term in terms)

    def added(nodes: tuple[Node, ...], weights: tuple[float, ...]) -> Step:
        spec = replace(nodes[0].output, dtype=dtype)
        return Step(spec, find("linear"), {"weight": weights, "normalize": False}, Inputs(nodes), labels)

    return added(tuple(term.a for term in terms), signed), added(tuple(term.b for term in terms), roots)
