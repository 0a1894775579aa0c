"""Measure checkpoint and run averaging on a small classifier that is trained in language A and tested in A and in B.

    python examples/average_snapshots.py [--setting constant] [--quick] [--out FILE.json]

Everything is synthetic (`topic_world.py`). A small encoder of XLM-R's kind is trained from scratch on text in languages
A and B. The stock Trainer then fine-tunes it on a task in A alone, with a weight-only snapshot after each of 10 epochs,
for every learning rate, batch size and seed of a grid. The test is in A (source) and in B (target, zero-shot).

There are two settings. In `decaying` the learning rate falls to 0 and the loss still falls after the first epoch; in
`constant` it stays, batches are small, and some labels are wrong, so that the snapshots wander.

As in Schmidt et al. 2023 the head is trained once, in a run of its own, and every run of the grid trains the encoder
alone below that head, frozen. Per run: the last snapshot, the average of all, the average without the first half. Per
cell: the averages over the seeds. The control averages runs that brought heads of their own, which `average` refuses
unless it is told `shared=""`. The Trainer needs accelerate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from topic_world import World, pretrain
from torch import Tensor

from portmanteau import compositions, merge

SAVING = {"save_strategy": "epoch", "save_only_model": True, "logging_strategy": "epoch", "use_cpu": True}
QUIET = {"report_to": "none", "disable_tqdm": True}
LANGUAGES = {"source": "A", "target": "B"}
report = partial(print, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Setting:
    """What is trained: everything that was fixed beforehand."""

    learning_rates: tuple[float, ...] = (3e-5, 3e-4, 1e-3, 3e-3)
    batches: tuple[int, ...] = (32, 64)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 10  # a snapshot after each
    examples: int = 2000
    tested: int = 1000  # in each language
    pretraining: int = 1200  # batches of 64 texts
    middle: tuple[float, int] = (1e-3, 32)  # learning rate and batch of the run that gives the head, and of the control
    head_seed: int = 1000
    skip_first: float = 0.5
    weight_decay: float = 0.05
    warm_up: float = 0.1  # as a share of all steps
    schedule: str = "linear"  # of the learning rate after that, as the Trainer names it
    noise: float = 0.0  # so large a share of the training labels is wrong


SETTINGS = {
    "decaying": Setting(),
    "constant": Setting(
        learning_rates=(3e-5, 3e-4, 1e-3, 2e-3),
        batches=(16, 32),
        examples=1500,
        middle=(1e-3, 16),
        warm_up=0.02,
        schedule="constant_with_warmup",
        noise=0.1,
    ),
}
QUICK = partial(
    replace,
    learning_rates=(1e-4, 1e-3),
    batches=(32,),
    seeds=(0, 1),
    epochs=4,
    examples=64,
    tested=50,
    pretraining=3,
    middle=(1e-3, 32),
)


@dataclass(frozen=True)
class Run:
    """One fine-tuning run, and the folder of its snapshots."""

    learning_rate: float
    batch: int
    seed: int
    folder: Path

    def train(self, world: World, setting: Setting, encoder: Path, head: Mapping[str, Tensor] | None) -> None:
        """Fine-tune with the stock Trainer; a head that is given is frozen."""
        transformers.set_seed(self.seed)
        model = transformers.XLMRobertaForSequenceClassification.from_pretrained(encoder, num_labels=3)
        if head is not None:
            model.load_state_dict(head, strict=False)
            model.classifier.requires_grad_(False)
        pairs, labels = world.task(setting.examples, "A", "train", setting.noise)
        arguments = transformers.TrainingArguments(
            output_dir=str(self.folder),
            num_train_epochs=setting.epochs,
            learning_rate=self.learning_rate,
            per_device_train_batch_size=self.batch,
            weight_decay=setting.weight_decay,
            warmup_steps=setting.warm_up,
            lr_scheduler_type=setting.schedule,
            seed=self.seed,
            **(SAVING | QUIET),
        )
        rows = [{"input_ids": pair, "labels": label} for pair, label in zip(pairs, labels, strict=True)]
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()

    @property
    def snapshots(self) -> list[merge.Checkpoint]:
        """Open the snapshots, in the order of their steps."""
        folders = sorted(self.folder.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
        return [merge.open(folder) for folder in folders]


def averages(snapshots: Sequence[merge.Checkpoint], skip_first: float) -> dict[str, merge.Checkpoint]:
    """Name what one run gives."""
    mean, second_half = (compositions.average(models=snapshots, skip_first=share) for share in (0.0, skip_first))
    return {"last": snapshots[-1], "average": mean, "average, first half left out": second_half}


@dataclass(frozen=True)
class Experiment:
    """A world, a setting, and where the models go."""

    world: World
    setting: Setting
    split: str
    folder: Path

    def measure(self) -> dict[str, Any]:
        """Train and measure everything."""
        loss = pretrain(self.world, self.setting.pretraining, self.folder / "encoder")
        giver = self.run(*self.setting.middle, self.setting.head_seed, "head").snapshots[-1]
        head = {name: giver[name] for name in giver.specs if name.startswith("classifier.")}
        rows, groups = [], []
        for rate, batch in product(self.setting.learning_rates, self.setting.batches):
            runs = [self.run(rate, batch, seed, "grid", head) for seed in self.setting.seeds]
            rows += [self.single(run) for run in runs]
            groups.append({"learning_rate": rate, "batch": batch, **self.over_runs([run.snapshots for run in runs])})
        return {
            "setting": {"world": self.world.seed, "split": self.split, **asdict(self.setting)},
            "pretraining loss": loss,
            "run that gives the head": self.score(giver),
            "runs": rows,
            "averages over the seeds": groups,
            "control: heads of their own": self.control(),
        }

    def run(self, rate: float, batch: int, seed: int, kind: str, head: Mapping[str, Tensor] | None = None) -> Run:
        """Train one run."""
        run = Run(rate, batch, seed, self.folder / f"{kind}-{rate:g}-{batch}" / f"seed-{seed}")
        run.train(self.world, self.setting, self.folder / "encoder", head)
        report(f"trained {run.folder.relative_to(self.folder)}")
        return run

    def score(self, checkpoint: merge.Checkpoint) -> dict[str, float]:
        """Measure a model in both languages: the share of pairs whose likeliest class is right."""
        model, result = checkpoint.to_model(), {}
        for name, language in LANGUAGES.items():
            pairs, labels = self.world.task(self.setting.tested, language, self.split)
            with torch.inference_mode():
                result[name] = float((model(input_ids=pairs).logits.argmax(-1) == labels).double().mean())
        return result

    def single(self, run: Run) -> dict[str, Any]:
        """Measure what one run gives, and whether portmanteau notes that its first snapshot was not settled."""
        scores = {name: self.score(m) for name, m in averages(run.snapshots, self.setting.skip_first).items()}
        noted = any("skip_first" in note for note in compositions.average(models=run.snapshots).notes)
        return {"learning_rate": run.learning_rate, "batch": run.batch, "seed": run.seed, **scores, "noted": noted}

    def over_runs(self, runs: Sequence[Sequence[merge.Checkpoint]], **keys: Any) -> dict[str, dict[str, float]]:
        """Measure the average of the runs' last snapshots, and of all their snapshots."""
        models = {"last": [run[-1] for run in runs], "all": [snapshot for run in runs for snapshot in run]}
        return {name: self.score(compositions.average(models=chosen, **keys)) for name, chosen in models.items()}

    def control(self) -> dict[str, Any]:
        """Average runs whose heads were trained apart, after making sure that this is refused at first."""
        runs = [self.run(*self.setting.middle, seed, "control").snapshots for seed in self.setting.seeds]
        try:
            merge.build(compositions.average(models=[run[-1] for run in runs]), self.folder / "refused")
        except merge.MergeError as error:
            refusal = str(error).splitlines()[0].replace(f"{self.folder}/", "")
        else:
            raise AssertionError("runs with heads of their own were averaged without a word")
        singles = {"refusal": refusal, "single runs": [self.score(run[-1]) for run in runs]}
        return {**singles, **self.over_runs(runs, shared="")}


def spread(values: Sequence[float]) -> str:
    """Write a mean and the standard deviation (of a sample)."""
    return f"{statistics.fmean(values):.3f} ({statistics.stdev(values):.3f})" if len(values) > 1 else f"{values[0]:.3f}"


def above(runs: Sequence[Mapping[str, Any]], where: str) -> int:
    """Count the runs whose average of all snapshots is better than their last one."""
    return sum(run["average"][where] > run["last"][where] for run in runs)


def tables(results: Mapping[str, Any]) -> str:
    """Lay the results out as two Markdown tables: single runs, and averages over the seeds."""
    runs, groups, own = results["runs"], results["averages over the seeds"], results["control: heads of their own"]
    names = ("last", "average", "average, first half left out")
    lines = [f"| single runs | tested in | {' | '.join(names)} | average above last | noted |", "|---" * 7 + "|"]
    for where, rate in product(LANGUAGES, dict.fromkeys(run["learning_rate"] for run in runs)):
        chosen = [run for run in runs if run["learning_rate"] == rate]
        found = " | ".join(spread([run[name][where] for run in chosen]) for name in names)
        counts = [above(chosen, where), sum(run["noted"] for run in chosen)]
        lines.append(f"| {rate:g} | {where} | {found} | {' | '.join(f'{n} of {len(chosen)}' for n in counts)} |")
    seeds = len(results["setting"]["seeds"])  # the runs of a cell, next to each other
    for size, where in product((1, seeds), LANGUAGES):
        cells = [runs[i : i + size] for i in range(0, len(runs), size)]
        found = " | ".join(spread([statistics.fmean(run[name][where] for run in c) for c in cells]) for name in names)
        label, count = ("all runs", f"{above(runs, where)} of {len(runs)}") if size == 1 else ("means over seeds", "")
        lines.append(f"| **{label}** | {where} | {found} | {count} | |")
    lines.append("\n| averages over the seeds | tested in | single last | last of each | all of each |")
    lines.append("|---" * 5 + "|")
    for where in LANGUAGES:
        for i, group in enumerate([*groups, own]):
            single = own["single runs"] if group is own else [r["last"] for r in runs[i * seeds : (i + 1) * seeds]]
            label = "control: own heads" if group is own else f"{group['learning_rate']:g}, batch {group['batch']}"
            found = f"{spread([s[where] for s in single])} | {group['last'][where]:.3f} | {group['all'][where]:.3f}"
            lines.append(f"| {label} | {where} | {found} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, train, measure, print."""
    parser = argparse.ArgumentParser(description="Measure checkpoint and run averaging on a small classifier.")
    parser.add_argument("--setting", choices=list(SETTINGS), default="decaying", help="how the models are trained")
    parser.add_argument("--quick", action="store_true", help="only see that it runs; the numbers mean nothing")
    parser.add_argument("--world", type=int, default=0, help="seed of the world, its text and the encoder")
    parser.add_argument("--split", choices=["test", "development"], default="test")
    parser.add_argument("--runs", type=Path, help="keep the snapshots in this new folder")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory() as scratch:
        setting = SETTINGS[arguments.setting]
        setting = QUICK(setting) if arguments.quick else setting
        folder = arguments.runs or Path(scratch)
        results = Experiment(World(arguments.world), setting, arguments.split, folder).measure()
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(tables(results))


if __name__ == "__main__":
    main()
