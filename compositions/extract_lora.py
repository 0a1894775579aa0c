"""The LoRA adapter of a full fine-tune: every change of a matrix cut to a low rank, and what else changed."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from portmanteau.merge import Checkpoint, Composed, MergeError, StoredCheckpoint, Survey, Surveyed, TensorSpec
from portmanteau.merge.adapters.decomposition import Decomposition, OfMatrix, factors
from portmanteau.merge.companions import INPUT_EMBEDDINGS, Companions
from portmanteau.merge.dtypes import is_float, working
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import matches, module
from portmanteau.merge.node import Inputs
from portmanteau.merge.surveys import changes_and_ranks
from portmanteau.merge.units import readable

from .composition import composition
from .lora_folder import Folder, Pair, Saved, form
from .matching import Met, is_tied, match

_MATRIX = 2
_WEIGHT = ".weight"
_TASKS = {
    "*ForCausalLM|*LMHeadModel": "CAUSAL_LM",
    "*ForSequenceClassification": "SEQ_CLS",
    "*ForTokenClassification": "TOKEN_CLS",
    "*ForQuestionAnswering": "QUESTION_ANS",
    "*ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_TITLE = "A LoRA adapter extracted from a model"
TABLE = "energy.csv"
Change = Mapping[str, Any]


@composition(
    source="Eckart and Young 1936; for large matrices Halko, Martinsson and Tropp 2011, algorithm 4.4",
    example="extract_lora: {base: ./base, tuned: ./math, rank: 32}",
)
def extract_lora(
    *,
    base: Annotated[Checkpoint, Field(description="the model that was trained")],
    tuned: Annotated[Checkpoint, Field(description="what it became")],
    rank: Annotated[int | None, Field(ge=1, description="the rank of every matrix's change")] = None,
    energy: Annotated[
        float | None,
        Field(gt=0, le=1, description="instead of a rank: the share of ‖Δ‖² to keep of each matrix, by a survey"),
    ] = None,
    modules: Annotated[
        str | None,
        Field(description="pattern of weights to take; default: the matrices in the layers, no embedding or head"),
    ] = None,
    rest: Annotated[
        Literal["store", "drop"], Field(description="what else changed: store it whole, or leave it out with a note")
    ] = "store",
    unmatched: Annotated[
        Literal["error", "drop"], Field(description="tensors that only one model has: refuse, or leave out")
    ] = "error",
) -> Surveyed:
    """Extract the LoRA adapter of a full fine-tune.

    Formula: Δ = tuned − base = U S Vᵀ; B = U S and A = Vᵀ of the largest `rank` singular values, the best approximation
    of that rank; or of as many as keep `energy` of ‖Δ‖² = Σ σ². Exact in fp64 for matrices whose shorter side is at
    most 1024 or less than eight times the rank, else by randomised subspace iteration. A survey finds which other
    tensors (norms, biases, embeddings, heads) changed. The share kept of each matrix is written to `energy.csv`.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> name = "model.layers.0.mlp.up_proj"
    >>> base = InMemory("base", {f"{name}.weight": torch.zeros(2, 2)})
    >>> tuned = InMemory("tuned", {f"{name}.weight": torch.tensor([[3.0, 0.0], [0.0, 1.0]])})
    >>> adapter = extract_lora(base=base, tuned=tuned, rank=1)
    >>> a, b = (adapter[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
    >>> b @ a  # the larger of both singular values is kept
    tensor([[3., 0.],
            [0., 0.]])

    Raises MergeError for models that do not fit, and where nothing is chosen or nothing changed.
    """
    if (rank is None) == (energy is None):
        raise MergeError("rank", "needs a rank or an energy, exactly one of them", "rank: 32, or energy: 0.9")
    matching = match({"base": base, "tuned": tuned}, "base", unmatched)
    floats = {name: met for name, met in matching.tensors.items() if is_float(met.spec.dtype)}
    chosen = {name: met for name, met in floats.items() if _is_chosen(met.spec, base, modules)}
    mistakes = list(_refusals(chosen, base, modules))
    if mistakes:
        raise MergeError.of(mistakes)
    others = len(matching.tensors) - len(floats)
    notes = (*matching.notes, *([f"{others} tensors that are no floats are not compared"] if others else []))
    job = _Job(base, chosen, floats, rank, rest, notes)
    looked_at = {name: met for name, met in floats.items() if energy is not None or name not in chosen}
    groups = {name: (Inputs((met.nodes["tuned"],), met.nodes["base"]),) for name, met in looked_at.items()}
    matrices = {name: met.spec.shape for name, met in chosen.items()}
    title = "changes outside the matrices" if energy is None else f"ranks that keep {energy:g} of each change"
    held = max(rows * columns * 8 + min(rows, columns) ** 2 * 16 for rows, columns in matrices.values())
    settings = {"matrices": matrices, "energy": energy}
    survey = Survey(title, changes_and_ranks, groups, settings, held if energy is not None else 0)
    return Surveyed("extract_lora", survey, job.settled, job.most, Companions(form=form(_TITLE)), notes)


def _is_chosen(spec: TensorSpec, base: Checkpoint, modules: str | None) -> bool:
    """Tell whether a tensor's change becomes factors."""
    if len(spec.shape) != _MATRIX or not spec.name.endswith(_WEIGHT):
        return False
    place = base.layers.place(spec.name)
    return matches(modules, spec.name) if modules else place is not None and module(place.inner) != "norm"


def _refusals(chosen: Mapping[str, Met], base: Checkpoint, modules: str | None) -> Iterator[Mistake]:
    if not chosen:
        what = f"no matrix is called {modules!r}" if modules else "the tensor names show no matrices in layers"
        yield Mistake("modules", what, "`portmanteau inspect --tensors` lists the names")
    tied = [name for name in chosen if is_tied(base) and matches(INPUT_EMBEDDINGS, name)]
    if tied:
        yield Mistake("modules", f"{some(tied)}: the head is tied to it, and would move too", "leave it out")


@dataclass(frozen=True)
class _Job:
    """What is asked for, apart from what the survey finds."""

    base: Checkpoint
    chosen: Mapping[str, Met]
    floats: Mapping[str, Met]
    rank: int | None
    rest: str
    notes: tuple[str, ...]

    @property
    def most(self) -> int:
        """Give the most bytes that the result can have."""
        factors = sum(self._rank(name, met.spec, {}) * sum(met.spec.shape) * 8 for name, met in self.chosen.items())
        return factors + sum(met.spec.nbytes for name, met in self.floats.items() if name not in self.chosen)

    def settled(self, found: Mapping[str, Change]) -> Composed:
        """Make the result of what the survey found."""
        return self._folder(found).composed("extract_lora")

    def _rank(self, name: str, spec: TensorSpec, found: Mapping[str, Change]) -> int:
        asked = self.rank if self.rank is not None else found.get(name, {}).get("rank", min(spec.shape))
        return min(asked, *spec.shape)

    def _folder(self, found: Mapping[str, Change]) -> Folder:
        flipped = _stored_transposed(self.chosen, self.floats)
        pairs: dict[str, Pair] = {}
        table: dict[str, Decomposition] = {}
        for name, met in self.chosen.items():
            rank, path = self._rank(name, met.spec, found), name.removesuffix(_WEIGHT)
            if rank:
                pairs[path], table[path] = self._pair(met, rank, flipped)
        if not pairs:
            raise MergeError("tuned", "does not differ from the base in any of the matrices")
        moved = {name: one for name, one in found.items() if name not in self.chosen and one["change"]}
        saved, notes = self._others(moved)
        settings = {**_about(self.base), "fan_in_fan_out": flipped}
        derived = {TABLE: lambda path: _write_table(path, table)}
        return Folder(pairs, saved, settings, (*self.notes, *notes), derived, _TITLE)

    def _pair(self, met: Met, rank: int, flipped: bool) -> tuple[Pair, Decomposition]:
        embedding = matches(INPUT_EMBEDDINGS, met.spec.name)
        transposed = embedding or flipped
        rows, columns = met.spec.shape
        out, width = (columns, rows) if transposed else (rows, columns)
        dtype = working([node.output.dtype for node in met.nodes.values()])
        matrix = OfMatrix(met.spec.name, rank, transposed, less=True)
        specs = TensorSpec("", dtype, (rank, width)), TensorSpec("", dtype, (out, rank))
        a, b = factors(*specs, matrix, [met.nodes["tuned"], met.nodes["base"]], matrix.held(rows, columns))
        assert isinstance(a.together, Decomposition)
        return Pair(a, b, embedding=embedding, label="svd of the change"), a.together

    def _others(self, moved: Mapping[str, Change]) -> tuple[dict[str, Saved], list[str]]:
        """Store what else changed, or say how much is lost."""
        if not moved:
            return {}, []
        shown = some(f"{name} ({_share(one)})" for name, one in moved.items())
        if self.rest == "drop":
            return {}, [f"{len(moved)} other tensors changed (‖Δ‖ / ‖base‖) and are left out: {shown}"]
        tied = [name for name in moved if is_tied(self.base) and matches(INPUT_EMBEDDINGS, name)]
        if tied:
            what = f"{some(tied)} changed, and the base's head, which is tied to it, would not be moved by an adapter"
            raise MergeError("rest", what, "rest: drop leaves it out")
        size = readable(sum(self.floats[name].spec.nbytes for name in moved))
        note = f"{len(moved)} other tensors changed (‖Δ‖ / ‖base‖) and are stored whole, {size}: {shown}"
        return {name: Saved(self.floats[name].nodes["tuned"], "tuned") for name in moved}, [note]


def _share(change: Change) -> str:
    return f"{change['change'] / change['base']:.2g}" if change["base"] else "from zero"


def _stored_transposed(chosen: Mapping[str, Met], floats: Mapping[str, Met]) -> bool:
    """Tell by the lengths of biases whether weights are stored [in, out], as GPT-2's Conv1D does."""
    for name, met in chosen.items():
        bias = floats.get(f"{name.removesuffix(_WEIGHT)}.bias")
        rows, columns = met.spec.shape
        if bias is not None and rows != columns and bias.spec.shape in ((rows,), (columns,)):
            return bias.spec.shape == (columns,)
    return False


def _about(base: Checkpoint) -> dict[str, Any]:
    """Give what the config says of the base: where it is, and the task of its architecture."""
    named = base.companions.architectures[:1]
    task = next((task for pattern, task in _TASKS.items() for name in named if matches(pattern, name)), None)
    where = (base.repository or str(base.folder.absolute())) if isinstance(base, StoredCheckpoint) else None
    revision = base.revision if isinstance(base, StoredCheckpoint) else None
    return {"base_model_name_or_path": where, "revision": revision, "task_type": task}


def _write_table(path: Path, table: Mapping[str, Decomposition]) -> None:
    """Write for each module its rank, the share of ‖Δ‖² that is kept, and ‖Δ‖."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("module", "rank", "energy", "change"))
        for name, one in table.items():
            if one.whole is not None and one.kept is not None:
                share = one.kept / one.whole if one.whole else 1.0
                rows.writerow((name, one.rank, f"{share:.9g}", f"{one.whole**0.5:.9g}"))
