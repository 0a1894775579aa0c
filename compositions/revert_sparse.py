"""Sparse fine-tunes taken out of a model again: the base's bytes where they changed it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from portmanteau.merge import Checkpoint, Composed, MergeError, SparseFineTune, Step, TensorSpec
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import align
from portmanteau.merge.node import Node, copy_of
from portmanteau.merge.sparse.entries import restored

from .composition import composition
from .matching import match
from .sparse_fine_tune import Fitted, OtherBase, fit


@composition(
    source="Ansell et al. 2022 (arXiv 2110.07560); composable-sft's `revert` subtracts, which rounds",
    example="revert_sparse: {tuned: ./math, base: ./base, diffs: [./math-sparse]}",
)
def revert_sparse(
    *,
    tuned: Annotated[Checkpoint, Field(description="the model to take them out of")],
    base: Annotated[Checkpoint, Field(description="the model that the sparse fine-tunes were made for")],
    diffs: Annotated[Sequence[SparseFineTune], Field(description="the sparse fine-tunes to take out")],
    other_base: OtherBase = "error",
) -> Composed:
    """Take sparse fine-tunes out of a model: every entry that they change gets the base's bytes again.

    Formula: base where one of them has an entry, else tuned. Tensors that they store whole are the base's again,
    where it has them. Nothing is subtracted, so nothing is rounded; an entry that another sparse fine-tune, which
    stays in, changes too is the base's afterwards.

    >>> from portmanteau import merge
    >>> from portmanteau.compositions import sparse_fine_tune
    >>> base = merge.open("examples/models/base")
    >>> task, language = (merge.open_sparse(f"examples/models/{name}-sparse") for name in ("task", "language"))
    >>> both = sparse_fine_tune(base=base, diffs=[task, language])
    >>> reverted = revert_sparse(tuned=both, base=base, diffs=[language])
    >>> name = "model.layers.0.mlp.up_proj.weight"
    >>> [int((one[name] != base[name]).sum()) for one in (both, reverted)]  # of 61 of the task 2 are the language's too
    [75, 59]

    Raises MergeError, with every mistake found, for models and sparse fine-tunes that do not fit.
    """
    matching = match({"tuned": tuned, "base": base}, "tuned", "keep")
    fitted = [_spelled_as(tuned, base, one) for one in fit(diffs, base, other_base)]
    mistakes = [mistake for one in fitted for mistake in one.mistakes]
    if not fitted:
        mistakes.append(Mistake("diffs", "names no sparse fine-tune"))
    pairs = {name: met.nodes for name, met in matching.tensors.items() if "tuned" in met.nodes}
    dtypes = [name for name, pair in pairs.items() if len({node.output.dtype for node in pair.values()}) > 1]
    if dtypes:
        what = f"has another dtype than the base: {some(dtypes)}"
        mistakes.append(Mistake("tuned", what, "bytes cannot be restored"))
    if mistakes:
        raise MergeError.of(mistakes)
    nodes: dict[str, Node] = {name: _step(tuned.specs[name], pair, fitted) for name, pair in pairs.items()}
    left = [name for one in fitted for name in one.dense if name in pairs and "base" not in pairs[name]]
    notes = [*matching.told, *(note for one in fitted for note in one.notes)]
    if left:
        notes.append(f"tensors that the base lacks stay: {some(left)}")
    return Composed("revert_sparse", nodes, tuned.companions, tuple(notes))


def _spelled_as(tuned: Checkpoint, base: Checkpoint, one: Fitted) -> Fitted:
    """Give a sparse fine-tune that fits the base under the names that the tuned model has for the base's tensors."""
    alignment = align(base.specs, tuned.specs) if base.specs.keys() != tuned.specs.keys() else None
    renamed = alignment.renamed if alignment else {}
    names, dense = ({renamed.get(name, name): own for name, own in of.items()} for of in (one.names, one.dense))
    return replace(one, names=names, dense=dense)


def _step(spec: TensorSpec, pair: Mapping[str, Node], fitted: Sequence[Fitted]) -> Step:
    """Make the step for one tensor: the base's where a sparse fine-tune stores it whole, or its entries there."""
    node, label = pair["tuned"], "tuned"
    if "base" in pair:
        for one in fitted:
            if spec.name in one.dense:
                node, label = pair["base"], "base"
            elif spec.name in one.names:
                node = restored(spec, node, pair["base"], one.diff.indices(one.names[spec.name]), one.label)
    return copy_of(node, spec, label)
