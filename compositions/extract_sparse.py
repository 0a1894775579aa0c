"""A sparse fine-tune extracted from a full one: the entries that changed most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from portmanteau.merge import Checkpoint, Composed, MergeError, StoredCheckpoint, Survey, Surveyed
from portmanteau.merge.companions import Companions
from portmanteau.merge.dtypes import is_float
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import matches
from portmanteau.merge.node import Inputs, Node, copy_of
from portmanteau.merge.sparse import compiled_selection
from portmanteau.merge.sparse import file as sparse_file
from portmanteau.merge.sparse.entries import selected
from portmanteau.merge.sparse.fingerprint import fingerprint
from portmanteau.merge.sparse.selection import Selection, select

from .composition import composition
from .matching import Met, match

_ENTRY = 8 + 8  # the most bytes that a position and its value take


@composition(
    source="Ansell et al. 2022 (arXiv 2110.07560), section 3.1: the selection; cambridgeltl/composable-sft at 29f7872",
    example="extract_sparse: {base: ./base, tuned: ./math, density: 0.08}",
)
def extract_sparse(
    *,
    base: Annotated[Checkpoint, Field(description="what the model was trained from")],
    tuned: Annotated[Checkpoint, Field(description="the fine-tuned model")],
    count: Annotated[int | None, Field(gt=0, description="how many entries to take")] = None,
    density: Annotated[float | None, Field(gt=0, lt=1, description="instead: the share of all entries")] = None,
    exclude: Annotated[str, Field(description="tensors to leave as the base has them: a pattern")] = "",
    dense: Annotated[str, Field(description="tensors to store whole, such as a head: a pattern")] = "",
    pytorch_diff: Annotated[
        bool, Field(description="write pytorch_diff.bin as well, which composable-sft reads")
    ] = False,
) -> Surveyed:
    """Extract a sparse fine-tune: the changes of those entries that changed most, over all tensors together.

    Formula: δ = tuned − base in fp32; of all δ but those of `exclude` and `dense`, the k = count (or ⌊density · n⌋) of
    largest |δ|, exactly k; of equal ones those that come first by tensor and row-major position. Tensors under
    `dense` are stored whole. This is the selection of LT-SFT, without its second training phase: the values are those
    of the full fine-tune.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> base = InMemory("base", {"weight": torch.tensor([1.0, 1.0, 1.0, 1.0])})
    >>> tuned = InMemory("tuned", {"weight": torch.tensor([1.5, 1.0, -1.0, 2.0])})
    >>> made = extract_sparse(base=base, tuned=tuned, count=2)
    >>> made["weight:indices"], made["weight:values"]
    (tensor([2, 3]), tensor([-2.,  1.]))

    Raises MergeError for models that do not fit, and, once the data are read, where fewer entries differ.
    """
    if (count is None) == (density is None):
        raise MergeError("", "takes either count or density", "density: 0.08 takes 8 % of the entries")
    sparse, whole, notes = _sorted(base, tuned, exclude, dense)
    entries = sum(met.spec.entries for met in sparse.values())
    wanted = count if count is not None else int((density or 0) * entries)
    if not 0 < wanted <= entries:
        raise MergeError("count" if count else "density", f"asks for {wanted:,} of {entries:,} entries")
    groups = {name: (Inputs((met.nodes["tuned"],), met.nodes["base"]),) for name, met in sparse.items()}
    wide = "F64" in {inputs.dtype for (inputs,) in groups.values()}
    title, settings = f"the {wanted:,} largest of {entries:,} changes", {"count": wanted, "wide": wide}
    survey = Survey(title, select, groups, settings, compiled=compiled_selection.select)
    shapes = {name: met.spec.shape for name, met in sparse.items()}
    about = {"selected": str(wanted), "of": str(entries), "base label": base.label, "tuned label": tuned.label}
    beside = sparse_file.companions(shapes, fingerprint(base) if isinstance(base, StoredCheckpoint) else "", about)
    if pytorch_diff:
        beside = replace(beside, derived={sparse_file.PUBLISHED: sparse_file.export})
    most = wanted * _ENTRY + sum(node.output.nbytes for node in whole.values())
    settle = partial(_settled, sparse, whole, beside)
    return Surveyed("extract_sparse", survey, settle, most, beside, notes)


def _settled(sparse: Mapping[str, Met], whole: Mapping[str, Node], beside: Companions, found: Selection) -> Composed:
    """Make the tensors of the file, once it is known how many entries each has."""
    nodes: dict[str, Node] = {}
    for name, met in sparse.items():
        if any(found.counts[name]):
            pair = (met.nodes["tuned"], met.nodes["base"])
            for made in selected(name, *pair, found.boundary, found.counts[name], found.ties[name]):
                nodes[made.output.name] = copy_of(made, made.output, "largest changes")
    for name, node in whole.items():
        nodes[name + sparse_file.DENSE] = node
    return Composed("extract_sparse", nodes, beside)


def _sorted(
    base: Checkpoint, tuned: Checkpoint, exclude: str, dense: str
) -> tuple[dict[str, Met], dict[str, Node], tuple[str, ...]]:
    """Sort the tensors: those to select from, and those to store whole; and say what is left out."""
    matching = match({"tuned": tuned, "base": base}, "base", "keep")
    sparse: dict[str, Met] = {}
    whole: dict[str, Node] = {}
    unasked: dict[str, list[str]] = {}
    for name, met in matching.tensors.items():
        if dense and matches(dense, name) and "tuned" in met.nodes:
            whole[name] = met.nodes["tuned"]
        elif exclude and matches(exclude, name):
            unasked.setdefault("excluded", []).append(name)
        elif not met.complete:
            unasked.setdefault("lacking" if "tuned" in met.nodes else "gone", []).append(name)
        elif not is_float(met.spec.dtype):
            unasked.setdefault("no floats", []).append(name)
        else:
            sparse[name] = met
    mistakes = list(_mistakes(unasked, sparse, matching.tensors, exclude, dense))
    if mistakes:
        raise MergeError.of(mistakes)
    # what only one of them has is named here, or a mistake
    return sparse, whole, (*matching.told, *_notes(unasked))


def _mistakes(
    unasked: Mapping[str, list[str]], sparse: Mapping[str, Met], every: Mapping[str, Any], exclude: str, dense: str
) -> Iterator[Mistake]:
    for key, pattern in (("exclude", exclude), ("dense", dense)):
        if pattern and not any(matches(pattern, name) for name in every):
            yield Mistake(key, f"{pattern!r} fits no tensor", f"they are called {some(every)}")
    if "lacking" in unasked:
        hint = "name them under dense, which stores them whole, or under exclude"
        yield Mistake("", f"the base lacks tensors that tuned has: {some(unasked['lacking'])}", hint)
    if "gone" in unasked:
        yield Mistake("", f"tuned lacks tensors that the base has: {some(unasked['gone'])}", "name them under exclude")
    if not sparse:
        yield Mistake("", "no tensor is left to select from")


def _notes(unasked: Mapping[str, list[str]]) -> Iterator[str]:
    for why in ("excluded", "no floats"):
        if why in unasked:
            yield f"{len(unasked[why])} tensors are left as the base has them, {why}: {some(unasked[why])}"
