"""LoRA adapters folded into their base, tensor by tensor, or combined into one adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from portmanteau.merge import Adapter, Checkpoint, Composed, MergeError, Step, TensorSpec
from portmanteau.merge.adapters.adapter import Module, adapter_of
from portmanteau.merge.adapters.folder import CONFIG
from portmanteau.merge.adapters.low_rank import low_rank, rescaled
from portmanteau.merge.companions import INPUT_EMBEDDINGS
from portmanteau.merge.dtypes import is_float, working
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import align, matches
from portmanteau.merge.node import Inputs, Made, Node, copy_of
from portmanteau.merge.registry import find

from .combine_lora import Combine, combined, wrong
from .composition import composition
from .matching import HEADS, is_tied

_ALONE = "fold it in alone and at weight 1, in a step of its own; a task vector of the result can be weighted"
_FACTORS = 2  # A and B; DoRA has its magnitudes and the base besides
_OTHER_BASE = "the adapter was trained on another base: name that one, in the same dtype"

Weight = Annotated[float, Field(allow_inf_nan=False)]


@composition(
    source="Hu et al. 2022 (arXiv 2106.09685), section 4.1; files, scaling, DoRA and ways to combine as in peft 0.21.2",
    example="lora: {base: ./base, adapters: {./swahili-lora: 1.0, ./math-lora: 0.7}}",
)
def lora(
    *,
    base: Annotated[
        Checkpoint | None,
        Field(description="the model that the adapters were trained on; without it the result is an adapter"),
    ] = None,
    adapters: Annotated[
        Mapping[Adapter, Weight] | Sequence[Adapter],
        Field(description="adapter folders or Hub ids with their weights, or a list, each at weight 1"),
    ],
    combine: Annotated[
        Combine,
        Field(
            description="cat: the exact sum; svd: the sum cut to a rank; linear: A and B added by themselves, as peft "
            "does, with cross terms; {OPERATOR: {SETTING: VALUE}, rank: RANK}: an operator on the changes, then SVD"
        ),
    ] = "cat",
    rank: Annotated[
        int | None, Field(ge=1, description="the rank for svd and operators; default: the largest of the adapters'")
    ] = None,
) -> Composed:
    """Fold LoRA adapters into their base, or combine them into one adapter.

    Formula: W + Σ wᵢ sᵢ BᵢAᵢ with s = alpha / rank, or alpha / √rank (rsLoRA), each from the adapter's own config;
    summed in fp32 and cast once to the base's dtype. A module that an adapter lacks gets nothing from it; tensors that
    no adapter changes are the base's, byte for byte. What an adapter stores whole (`modules_to_save`, biases)
    replaces the base's tensor. DoRA: m / ‖W + sBA‖ · (W + sBA), along every row.

    Without a base the result is an adapter folder whose scaling is 1. With c = w s, `cat` is A = [c₁A₁; c₂A₂; …],
    B = [B₁ B₂ …]: the exact sum, its rank the sum of ranks. `svd` is the best approximation of the sum of a given
    rank, exact where that suffices. `linear` is A = Σ sgn(c) √|c| A and B = Σ √|c| B, which adds to the sum the cross
    terms √|cᵢcⱼ| BᵢAⱼ. An operator is applied to the changes sᵢBᵢAᵢ, and the result decomposed. With a base and any
    `combine` but `cat`, that adapter is folded in.

    >>> from portmanteau import merge
    >>> task, language = (merge.open_adapter(f"examples/adapters/{name}") for name in ("task", "language"))
    >>> lora(base=merge.open("examples/models/base"), adapters={task: 1.0, language: 0.5})
    <Composed lora: 75 tensors, 0.7 MB>
    >>> both = lora(adapters=[task, language])  # an adapter, of rank 4 + 4
    >>> both.specs["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].shape
    (8, 64)

    Raises MergeError, with every mistake found, for adapters that do not fit the base or each other.
    """
    weights = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    if not weights:
        raise MergeError("adapters", "names no adapter")
    if len(weights) < len(adapters):
        raise MergeError("adapters", "an adapter is named twice", "give it a weight instead")
    if base is None:
        return combined(weights, combine, rank)
    if combine == "cat" and rank is None:
        return _folded(base, weights)
    one = combined(weights, combine, rank)
    config = json.loads(one.companions.texts[CONFIG])
    return _folded(base, {adapter_of(one, config, "adapters"): 1.0}, one.notes)


def _folded(base: Checkpoint, weights: Mapping[Adapter, float], notes: tuple[str, ...] = ()) -> Composed:
    """Add adapters to a base."""
    fitted = [_fitted(adapter, base) for adapter in weights]
    mistakes = [mistake for one in fitted for mistake in one.mistakes]
    mistakes += _together(weights, fitted)
    if mistakes:
        raise MergeError.of(mistakes)
    terms = [_Term(one, float(weights[one.adapter])) for one in fitted]
    nodes = {name: _step(base.node(name), spec, terms) for name, spec in base.specs.items()}
    told = (*base.notes, *notes, *(note for one in fitted for note in one.notes), *_lacking(fitted))
    return Composed("lora", nodes, base.companions, told)


def _lacking(fitted: Sequence[_Fitted]) -> Iterator[str]:
    """Say which adapters change nothing where others do."""
    every = {name for one in fitted for name in one.changes}
    for one in fitted:
        lacking = sorted(every - one.changes.keys() - one.saved.keys())
        if lacking:
            yield f"{one.adapter.label}: lacks {len(lacking)} modules of the others, so adds nothing to {some(lacking)}"


@dataclass(frozen=True)
class _Fitted:
    """One adapter under the names of the base, and what does not fit."""

    adapter: Adapter
    changes: Mapping[str, Made]
    saved: Mapping[str, str]
    copies: Mapping[str, str]
    mistakes: tuple[Mistake, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Term:
    """One term of the sum."""

    fitted: _Fitted
    weight: float

    def stored(self, name: str) -> Node:
        """Give a tensor of the adapter."""
        return self.fitted.adapter.stored.node(name)


def _step(node: Node, spec: TensorSpec, terms: Sequence[_Term]) -> Step:
    """Make the step for one tensor of the base."""
    name = spec.name
    for term in terms:
        if name in term.fitted.saved:
            return copy_of(term.stored(term.fitted.saved[name]), spec, term.fitted.adapter.label)
    changing = [term for term in terms if name in term.fitted.changes]
    if not changing:
        return copy_of(node, spec, "base")
    labels = tuple(term.fitted.adapter.label for term in changing)
    changes = tuple(term.fitted.changes[name] for term in changing)
    if _rescales(changes[0]):
        return copy_of(changes[0], spec, labels[0])
    copies = [term.stored(copy) for term in changing if (copy := term.fitted.copies.get(name))]
    if copies:
        node = Step(spec, find("equal"), {"reason": _OTHER_BASE}, Inputs((node, *copies)), ("base", *labels))
    inputs = Inputs((node, *changes))
    settings = {"weight": (1.0, *(term.weight for term in changing)), "normalize": False}
    return Step(spec, find("linear"), settings, inputs, ("base", *labels))


def _fitted(adapter: Adapter, base: Checkpoint) -> _Fitted:
    """Find the tensors of the base that an adapter changes, and everything that does not fit."""
    targets = list(adapter.targets)
    alignment = align(targets, base.specs)
    renamed = alignment.renamed if alignment else {}
    specs = {path: base.specs.get(renamed.get(f"{path}.weight", f"{path}.weight")) for path in adapter.modules}
    flag = _flag(adapter, specs)
    mistakes = list(_not_to_be_changed(adapter, [renamed.get(name, name) for name in targets], base))
    changes = {}
    for path, spec in specs.items():
        if spec is not None:
            found = _change(adapter, adapter.modules[path], spec, base.node(spec.name), flag)
            if isinstance(found, Made):
                changes[spec.name] = found
            else:
                mistakes.append(found)
    saved = {renamed.get(name, name): own for name, own in adapter.saved.items()}
    copies = {renamed.get(name, name): own for name, own in adapter.copies.items()}
    for name, own in {**saved, **copies}.items():
        mistakes += _not_of_its_shape(adapter, own, base.specs.get(name))
    notes = (alignment.note(adapter.label, "the base"),) if alignment else ()
    return _Fitted(adapter, changes, saved, copies, tuple(mistakes), notes)


def _not_to_be_changed(adapter: Adapter, names: Sequence[str], base: Checkpoint) -> Iterator[Mistake]:
    """Find targets that the base lacks, that are quantised, or whose change would move another tensor too."""
    config = base.companions.config or {}
    lacking = [name for name in names if name not in base.specs]
    tied = is_tied(base)
    if lacking:
        head = tied and any(matches(HEADS, name) for name in lacking)
        hint = "the base's head is tied to its embedding" if head else "name the base that it was trained on"
        yield wrong(adapter, f"the base lacks {len(lacking)} tensors that it changes: {some(lacking)}", hint)
    packed = [name for name in names if name in base.specs and not is_float(base.specs[name].dtype)]
    if packed or config.get("quantization_config"):
        what = f"the base is quantised: {some(packed) or 'its config has a quantization_config'}"
        yield wrong(adapter, what, "name the base as it was before it was quantised")
    moved = [name for name in names if tied and matches(INPUT_EMBEDDINGS, name)]
    if moved:
        hint = "write the base with a head of its own (tie_word_embeddings: false) first"
        yield wrong(adapter, f"changes {some(moved)}, and the base's head, which is tied to it, would move too", hint)


def _flag(adapter: Adapter, specs: Mapping[str, TensorSpec | None]) -> bool | None:
    """Give `fan_in_fan_out` where the modules whose shape shows it agree with it; None where they do not.

    peft writes down what the last module was, and a model may have modules of both kinds.
    """
    for path, module in adapter.modules.items():
        spec = specs[path]
        ways = _ways(adapter, module, spec) if spec is not None and not module.embedding else []
        if len(ways) == 1 and ways[0] != adapter.fan_in_fan_out:
            return None
    return adapter.fan_in_fan_out


def _ways(adapter: Adapter, module: Module, spec: TensorSpec) -> list[bool]:
    """Tell in which ways the change has the tensor's shape: as it is (False), transposed (True)."""
    a, b = adapter.stored.specs[module.a].shape, adapter.stored.specs[module.b].shape
    if len(a) != 2 or len(b) != 2 or len(spec.shape) != 2 or a[0] != b[1]:
        return []
    shapes = {False: (b[0], a[1]), True: (a[1], b[0])}
    return [way for way, shape in shapes.items() if shape == spec.shape]


def _change(adapter: Adapter, module: Module, spec: TensorSpec, node: Node, flag: bool | None) -> Made | Mistake:
    """Fit the change of one module to its tensor."""
    a, b = adapter.stored.specs[module.a], adapter.stored.specs[module.b]
    shapes = f"A {list(a.shape)}, B {list(b.shape)}"
    ways = [way for way in _ways(adapter, module, spec) if way or not module.embedding]
    if not ways:
        convolution = "convolutions are not supported" if len(a.shape) > 2 else "name the base that it was trained on"
        return wrong(adapter, f"{spec.name} {list(spec.shape)}: its factors do not fit: {shapes}", convolution)
    if not (is_float(a.dtype) and is_float(b.dtype)):
        return wrong(adapter, f"{spec.name}: its factors are {a.dtype} and {b.dtype}, no floats")
    if a.shape[0] != module.rank:
        what = f"{spec.name}: its factors have rank {a.shape[0]}, its config gives {module.rank}"
        return wrong(adapter, what, "config and weights come from different saves: download it again")
    if len(ways) == 2 and not module.embedding and flag is None:
        hint = "its other modules contradict fan_in_fan_out in its config"
        return wrong(adapter, f"{spec.name} is square: nothing shows whether it is stored transposed", hint)
    transposed = module.embedding or (ways[0] if len(ways) == 1 else bool(flag))
    dense = replace(spec, dtype=working([spec.dtype, a.dtype, b.dtype]))
    factors = (adapter.stored.node(module.a), adapter.stored.node(module.b))
    if not module.magnitude:
        return low_rank(dense, *factors, module.scaling, transposed=transposed)
    if transposed:
        what = f"{spec.name}: DoRA of tensors stored transposed (Conv1D, embeddings) is not supported"
        return wrong(adapter, what, "fold it in with peft")
    magnitude = adapter.stored.specs[module.magnitude]
    if magnitude.entries != spec.shape[0]:
        return wrong(adapter, f"{spec.name} has {spec.shape[0]} rows, its magnitude vector {magnitude.entries} entries")
    return rescaled(dense, *factors, module.scaling, adapter.stored.node(module.magnitude), node)


def _rescales(change: Made) -> bool:
    """Tell whether it is the new value of a tensor (DoRA), not something to be added to it."""
    return len(change.inputs) > _FACTORS


def _not_of_its_shape(adapter: Adapter, own: str, spec: TensorSpec | None) -> Iterator[Mistake]:
    """Compare a tensor that the adapter stores whole with the base's."""
    stored = adapter.stored.specs[own]
    if spec is not None and stored.shape != spec.shape:
        what = f"{spec.name}: stored whole as {list(stored.shape)}, the base has {list(spec.shape)}"
        yield wrong(adapter, what, "where tokens were added, resize the base to the adapter's vocabulary first")
    elif spec is not None and is_float(stored.dtype) != is_float(spec.dtype):
        yield wrong(adapter, f"{spec.name}: stored whole as {stored.dtype}, the base has {spec.dtype}")


def _together(weights: Mapping[Adapter, float], fitted: Sequence[_Fitted]) -> Iterator[Mistake]:
    """Find what an adapter does only alone and in full: replace tensors, rescale rows."""
    holders: dict[str, list[str]] = {}
    for one in fitted:
        weight = weights[one.adapter]
        for name in one.saved:
            holders.setdefault(name, []).append(one.adapter.label)
        changed = [name for other in fitted if other is not one for name in one.saved if name in other.changes]
        if changed:
            yield wrong(one.adapter, f"replaces tensors that another adapter changes: {some(changed)}", _ALONE)
        if one.saved and weight != 1:
            what = f"replaces tensors, which cannot be done at weight {weight:g}: {some(one.saved)}"
            yield wrong(one.adapter, what, _ALONE)
        if any(map(_rescales, one.changes.values())) and (len(fitted) > 1 or weight != 1):
            how = "beside other adapters" if len(fitted) > 1 else f"at weight {weight:g}"
            yield wrong(one.adapter, f"is DoRA: it rescales the sum, and is not defined {how}", _ALONE)
    several = [name for name, labels in holders.items() if len(labels) > 1]
    if several:
        labels = ", ".join(dict.fromkeys(label for name in several for label in holders[name]))
        yield Mistake("adapters", f"{labels} replace the same tensors: {some(several)}", _ALONE)
