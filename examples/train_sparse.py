"""Train two sparse fine-tunes of the example's base: the task in language A, and language B.

    python examples/train_sparse.py DEST [--density 0.08] [--quick]

Lottery-ticket sparse fine-tuning (LT-SFT) by `training.lottery_ticket`: train all weights, keep the share of them
that changed most, set everything back, train only those. The world, the text and the base are those of
`train_experts.py` and `models/`; norms and the output head are held still, so the two can be added to each other.

DEST gets `task` and `language`, folders with a sparse fine-tune each. They are added to the base by the recipe

    merge: {sparse_fine_tune: {base: examples/models/base, diffs: [DEST/task, DEST/language]}}

`--quick` trains for a few steps only, to see it run.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_experts import BATCH, Batches, World, Writer
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from portmanteau import merge
from portmanteau.compositions.training import lottery_ticket

MODELS = Path(__file__).parent / "models"
HELD_STILL = ("lm_head.*", "*norm*")


@dataclass(frozen=True)
class Length:
    """How many steps each phase takes."""

    dense: int
    sparse: int


FULL, QUICK = Length(dense=80, sparse=160), Length(dense=2, sparse=2)


@dataclass(frozen=True)
class Sort:
    """What is trained: its name, its text, its learning rate."""

    name: str
    batch: Callable[[], Tensor]
    learning_rate: float


def sorts(batches: Batches) -> tuple[Sort, Sort]:
    """Give what is trained: the task in A, and plain text in B."""
    return Sort("task", batches.task, 3e-3), Sort("language", batches.language, 2e-3)


@dataclass(frozen=True)
class Training:
    """Makes the trainers of one sparse fine-tune."""

    sort: Sort
    length: Length
    seed: int
    folder: str

    def trainer(self, model: PreTrainedModel, phase: lottery_ticket.Phase) -> Trainer:
        """Make the stock Trainer of one phase, with text of its own."""
        steps = self.length.dense if phase == "dense" else self.length.sparse
        tokens = torch.cat([self.sort.batch() for _ in range(steps)])
        arguments = TrainingArguments(
            output_dir=self.folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=self.sort.learning_rate,
            warmup_steps=steps // 10,
            seed=self.seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        examples = [{"input_ids": document, "labels": document} for document in tokens]
        trainer = Trainer(model=model, args=arguments, train_dataset=examples)
        trainer.remove_callback(PrinterCallback)
        return trainer


def train(training: Training, base: merge.StoredCheckpoint, density: float, folder: Path) -> str:
    """Train and save one sparse fine-tune; say in a line what was done."""
    model: Any = base.to_model()
    model.float()
    began = time.monotonic()
    found = lottery_ticket.fine_tune(model, training.trainer, density=density, freeze=HELD_STILL, base=base)
    found.save(folder, base)
    layers = sum(len(entries.indices) for name, entries in found.entries.items() if ".layers." in name)
    return (
        f"{training.sort.name}: {found.count:,} of {found.details['maskable entries']} weights trained, {layers:,} of"
        f" them in the layers, {training.length.dense} + {training.length.sparse} steps in"
        f" {time.monotonic() - began:.0f} s → {folder}"
    )


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train a sparse fine-tune of the task and one of the language.")
    parser.add_argument("folder", metavar="DEST", type=Path)
    parser.add_argument("--density", type=float, default=0.08, help="the share of the weights that is trained")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="another number gives slightly different weights")
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    base = merge.open(MODELS / "base")
    world = World.load(MODELS / "world.json")
    batches = Batches(
        Writer(world, random.Random(f"sparse text {given.seed}")), AutoTokenizer.from_pretrained(MODELS / "base")
    )
    for sort in sorts(batches):
        with tempfile.TemporaryDirectory() as scratch:
            training = Training(sort, QUICK if given.quick else FULL, given.seed, scratch)
            print(train(training, base, given.density, given.folder / sort.name), flush=True)


if __name__ == "__main__":
    main()
