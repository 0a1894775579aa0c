"""Compare composed sparse fine-tunes with dense task vectors and with random masks of equal size.

    python examples/compose_sparse.py [--quick] [--out FILE.json]

The world, the base and the text are those of `train_experts.py` and `models/`. With every seed the task (in language A)
and language B are fine-tuned from the base in five ways, and each pair is added to the base:

* **LT-SFT**: a dense phase, the share of the weights that changed most, back to the base, a phase that trains those.
* **random masks**: that second phase alone, under as many entries drawn at random from the same tensors.
* **dense**: that second phase alone, with all these entries; the two changes are added as task vectors.
* **dense, slower**: the same at a quarter of the learning rate, because a rate that suits few weights may be too high.
* **largest changes of dense**: as many entries as the masks have, taken out of the dense ones by `extract_sparse`.

The phase has the same text, steps and order of batches in all of them; norms and the output head are held still. All is
computed in float32, from a float32 copy of the base. Each fine-tune is measured alone and composed, by `evaluate.Exam`.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from average_snapshots import spread
from evaluate import Exam
from torch import Tensor
from train_experts import Batches, World, Writer
from train_sparse import HELD_STILL, MODELS, Length, Training, sorts
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.utils.logging import disable_progress_bar

from portmanteau import compositions, merge
from portmanteau.compositions.training import lottery_ticket
from portmanteau.compositions.training.masks import masked
from portmanteau.compositions.training.sparse_result import Entries, SparseFineTuning
from portmanteau.merge.names import matches

NAMES = ("task", "language")
LENGTH = Length(dense=60, sparse=120)
MEASURES = ("task A", "task B", "loss A", "loss B")
Part = merge.SparseFineTune | merge.StoredCheckpoint
report = partial(print, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Setting:
    """Everything that was fixed beforehand."""

    seeds: tuple[int, ...] = (0, 1, 2)
    density: float = 0.08  # of the entries that may train
    length: Length = LENGTH
    slower: float = 0.25  # the learning rate of the slower dense fine-tunes, as a share
    pairs: int | None = None  # of goods to ask about; all of the split


QUICK = Setting((0,), length=Length(dense=2, sparse=2), pairs=20)


def random_masks(shapes: Mapping[str, Sequence[int]], count: int, key: str) -> dict[str, Tensor]:
    """Draw `count` entries from all tensors together, each entry as likely as any other: name → bool [*shape]."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    dice = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    drawn = torch.zeros(sum(sizes), dtype=torch.bool)
    drawn[torch.randperm(len(drawn), generator=dice)[:count]] = True
    return {n: flat.view(*shape) for (n, shape), flat in zip(shapes.items(), drawn.split(sizes), strict=True)}


def composed(base: merge.Checkpoint, parts: Mapping[str, Part]) -> merge.Checkpoint:
    """Add fine-tunes to their base: sparse ones entry by entry, dense ones as task vectors."""
    sparse = [part for part in parts.values() if isinstance(part, merge.SparseFineTune)]
    if sparse:
        return compositions.sparse_fine_tune(base=base, diffs=sparse)
    dense = {name: part for name, part in parts.items() if isinstance(part, merge.StoredCheckpoint)}
    return compositions.tensorwise("task_arithmetic", models=dense, base=base)


def dictated(world: World, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Batches]:
    """Make batches of the world's text whose dice depend on a key alone."""
    return lambda key: Batches(Writer(world, random.Random(key)), tokenizer)


@dataclass(frozen=True)
class Run:
    """What is trained with one seed; every fine-tune gets a folder of its own in `folder`."""

    base: merge.StoredCheckpoint
    batches: Callable[[str], Batches]  # of a key that their dice are seeded with
    setting: Setting
    seed: int
    folder: Path

    def pairs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Train task and language in each way."""
        tickets = {name: self.lottery_ticket(name) for name in NAMES}
        yield "LT-SFT", tickets
        yield "random masks", {name: self.random(name, tickets[name].count) for name in NAMES}
        dense = {name: self.dense("dense", name) for name in NAMES}
        yield "dense", dense
        yield "dense, slower", {name: self.dense("dense, slower", name, self.setting.slower) for name in NAMES}
        yield "largest changes of dense", {name: self.largest(dense[name], tickets[name].count) for name in NAMES}

    def lottery_ticket(self, name: str) -> merge.SparseFineTune:
        """Train a sparse fine-tune under the mask of the entries that change most."""
        model: Any = self.base.to_model()
        make = partial(self.trainer, name)
        density = self.setting.density
        found = lottery_ticket.fine_tune(model, make, density=density, freeze=HELD_STILL, base=self.base)
        return self.opened(found, "LT-SFT", name)

    def random(self, name: str, count: int) -> merge.SparseFineTune:
        """Train a sparse fine-tune under a mask of random entries."""
        _, training = self.model()
        shapes = {n: tuple(parameter.shape) for n, parameter in training.items()}
        return self.under(random_masks(shapes, count, f"{name} {self.seed}"), "random masks", name)

    def under(self, masks: Mapping[str, Tensor], kind: str, name: str) -> merge.SparseFineTune:
        """Train a sparse phase alone, under masks that are given."""
        model, training = self.model()
        start = {n: training[n].detach().clone() for n in masks}
        with masked(model, masks):
            self.trainer(name, model, "sparse").train()
        entries = {n: Entries.under(mask, start[n], training[n]) for n, mask in masks.items()}
        shapes = {n: tuple(mask.shape) for n, mask in masks.items()}
        return self.opened(SparseFineTuning(entries, {}, shapes, {"method": kind}), kind, name)

    def dense(self, kind: str, name: str, share: float = 1.0) -> merge.StoredCheckpoint:
        """Train all entries, for the steps and on the text of a sparse phase."""
        model, _ = self.model()
        self.trainer(name, model, "sparse", share).train()
        trained = merge.InMemory(name, model.state_dict(), self.base.companions)
        merge.build(trained, self.folder / kind / name)
        return merge.open(self.folder / kind / name)

    def largest(self, tuned: merge.StoredCheckpoint, count: int) -> merge.SparseFineTune:
        """Take the entries that a dense fine-tune changed most."""
        folder = self.folder / "largest changes of dense" / tuned.folder.name
        still = "|".join(HELD_STILL)
        merge.build(compositions.extract_sparse(base=self.base, tuned=tuned, count=count, exclude=still), folder)
        return merge.open_sparse(folder)

    def model(self) -> tuple[Any, dict[str, Tensor]]:
        """Make the base with norms and head held still, and name the parameters that train."""
        model: Any = self.base.to_model()
        parameters = dict(model.named_parameters())
        held = {n for n in parameters if any(matches(pattern, n) for pattern in HELD_STILL)}
        for n in held:
            parameters[n].requires_grad_(False)
        return model, {n: parameter for n, parameter in parameters.items() if n not in held}

    def trainer(self, name: str, model: PreTrainedModel, phase: lottery_ticket.Phase, share: float = 1.0) -> Trainer:
        """Make the trainer of a phase: its text depends on the seed, the name and the phase alone."""
        sort = next(s for s in sorts(self.batches(f"{name} {phase} {self.seed}")) if s.name == name)
        sort = replace(sort, learning_rate=sort.learning_rate * share)
        return Training(sort, self.setting.length, self.seed, str(self.folder / "trainer")).trainer(model, phase)

    def opened(self, found: SparseFineTuning, kind: str, name: str) -> merge.SparseFineTune:
        """Save a sparse fine-tune and open it again."""
        found.save(self.folder / kind / name, self.base)
        return merge.open_sparse(self.folder / kind / name)


def meeting(parts: Sequence[merge.SparseFineTune]) -> dict[str, float | None]:
    """Say how far two sparse fine-tunes are in each other's way."""
    *_, whole = compositions.overlaps(parts)
    size = whole.counts[0]
    return {
        "shared": whole.shared / size,
        "by chance": whole.by_chance / size,
        "opposed": whole.opposed_share,
        "cosine": whole.cosine,
    }


@dataclass(frozen=True)
class Experiment:
    """A setting, the split of the questions, and where the fine-tunes go."""

    setting: Setting
    split: str
    folder: Path

    def measure(self) -> dict[str, Any]:
        """Train and measure everything."""
        world = World.load(MODELS / "world.json")
        tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
        base = self.base()
        asked = replace(world, pairs={self.split: world.pairs[self.split][: self.setting.pairs]})
        exam = Exam(asked, tokenizer, self.split)

        def score(checkpoint: merge.Checkpoint) -> dict[str, float]:
            found = exam.score("", checkpoint)
            return dict(zip(MEASURES, [*found.accuracy.values(), *found.loss.values()], strict=True))

        rows, met = [], []
        for seed in self.setting.seeds:
            run = Run(base, dictated(world, tokenizer), self.setting, seed, self.folder / f"seed-{seed}")
            for kind, parts in run.pairs():
                alone = {f"{name} only": score(composed(base, {name: parts[name]})) for name in NAMES}
                rows.append({"seed": seed, "kind": kind, **alone, "composed": score(composed(base, parts))})
                if isinstance(parts["task"], merge.SparseFineTune):
                    met.append({"seed": seed, "kind": kind, **meeting(list(parts.values()))})
                report(rows[-1])
        setting = {"split": self.split, "questions": len(asked.questions("A", self.split)), **asdict(self.setting)}
        return {"setting": setting, "base": score(base), "models": rows, "overlaps": met}

    def base(self) -> merge.StoredCheckpoint:
        """Write a copy of the base in float32, so that no sum is rounded to bfloat16."""
        model: Any = merge.open(MODELS / "base").to_model()
        model.float().save_pretrained(self.folder / "base")
        return merge.open(self.folder / "base")


def tables(results: Mapping[str, Any]) -> str:
    """Lay the results out as three Markdown tables: scores, what composing changed, overlaps."""
    kinds = list(dict.fromkeys(row["kind"] for row in results["models"]))
    rows = {kind: [row for row in results["models"] if row["kind"] == kind] for kind in kinds}
    lines = [f"| fine-tunes | added to the base | {' | '.join(MEASURES)} |", "|---" * 6 + "|"]
    lines.append(f"| base | nothing | {' | '.join(spread([results['base'][m]]) for m in MEASURES)} |")
    for kind, which in product(kinds, (*(f"{name} only" for name in NAMES), "composed")):
        found = " | ".join(spread([row[which][m] for row in rows[kind]]) for m in MEASURES)
        lines.append(f"| {kind} | {which} | {found} |")
    lines += ["", "| what composing changed | task A | task B | loss B | composed, task B by seed |", "|---" * 5 + "|"]
    for kind in kinds:
        pairs = (("task A", "task only"), ("task B", "task only"), ("loss B", "language only"))
        found = " | ".join(spread([row["composed"][m] - row[alone][m] for row in rows[kind]]) for m, alone in pairs)
        by_seed = ", ".join(spread([row["composed"]["task B"]]) for row in rows[kind])
        lines.append(f"| {kind} | {found} | {by_seed} |")
    figures = ("shared", "by chance", "opposed", "cosine")
    lines += ["", f"| task and language | {' | '.join(figures)} |", "|---" * 5 + "|"]
    for kind in dict.fromkeys(row["kind"] for row in results["overlaps"]):
        chosen = [row for row in results["overlaps"] if row["kind"] == kind]
        lines.append(f"| {kind} | {' | '.join(spread([row[figure] for row in chosen]) for figure in figures)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, train, measure, print."""
    parser = argparse.ArgumentParser(description="Compare ways of composing a task and a language.")
    parser.add_argument("--quick", action="store_true", help="only see that it runs; the numbers mean nothing")
    parser.add_argument("--seeds", type=int, nargs="+", help="other seeds than those that were fixed beforehand")
    parser.add_argument("--split", choices=["test", "development"], default="test")
    parser.add_argument("--runs", type=Path, help="keep the fine-tunes in this new folder")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as scratch:
        setting = QUICK if arguments.quick else Setting()
        setting = replace(setting, seeds=tuple(arguments.seeds)) if arguments.seeds else setting
        results = Experiment(setting, arguments.split, arguments.runs or Path(scratch)).measure()
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(tables(results))


if __name__ == "__main__":
    main()
