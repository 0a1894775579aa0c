"""Measure the example: task accuracy and language-model loss in both languages, for the models and their merges.

    python examples/evaluate.py [--models examples/models] [--split test] [--json]

The list of merges is fixed here and holds those of the recipes beside this file; the README says how it was chosen. An
`upper-bound` beside the three models is measured too.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from train_experts import DOCUMENT, GOODS, PLAIN, Language, World, Writer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from portmanteau import compositions, merge

BOTTOM, TOP, TRANSITION = 3, 0, 1
PLAIN_DOCUMENTS = 256
Models = Mapping[str, merge.Checkpoint]


@dataclass(frozen=True)
class Score:
    """What one model reached, by language: accuracy, its binomial standard error, loss in nats per token."""

    model: str
    items: int
    accuracy: dict[Language, float]
    error: dict[Language, float]
    loss: dict[Language, float]


def candidates(models: Models) -> Iterator[tuple[str, merge.Checkpoint]]:
    """Name the models and the merges to measure."""
    base, task, language = models["base"], models["task-expert"], models["language-expert"]
    experts = {"task": task, "language": language}
    yield "base", base
    yield "task expert (zero-shot)", task
    yield "language expert", language
    yield "soup", compositions.tensorwise("linear", models=experts, settings={"weight": 0.5})
    yield "TIES", compositions.tensorwise("ties", models=experts, base=base, settings={"weight": 1.0, "density": 0.3})
    yield "task arithmetic", compositions.tensorwise("task_arithmetic", models=experts, base=base)
    swap = partial(compositions.layer_swap, task=task, language=language)
    yield "layer swap", swap(bottom=BOTTOM, top=TOP, transition=TRANSITION)
    yield "layer swap, no transition", swap(bottom=BOTTOM, top=TOP, transition=0)
    yield "layer swap, top layer too", swap(bottom=BOTTOM, top=1, transition=TRANSITION)
    yield "control: roles exchanged", swap(task=language, language=task, bottom=BOTTOM, top=TOP, transition=TRANSITION)
    yield "control: embeddings only", swap(bottom=0, top=0)
    if "upper-bound" in models:
        yield "upper bound", models["upper-bound"]


@dataclass(frozen=True)
class Exam:
    """The questions and the plain text that every model is measured on."""

    world: World
    tokenizer: PreTrainedTokenizerBase
    split: str

    def score(self, name: str, checkpoint: merge.Checkpoint) -> Score:
        """Measure one model, computing in float32."""
        model: Any = checkpoint.to_model()
        model.float()
        languages: tuple[Language, Language] = ("A", "B")
        items = len(self.world.questions("A", self.split))
        accuracy = {language: self._accuracy(model, language) for language in languages}
        error = {language: math.sqrt(p * (1 - p) / items) for language, p in accuracy.items()}
        return Score(name, items, accuracy, error, {language: self._loss(model, language) for language in languages})

    def _accuracy(self, model: Callable[..., Any], language: Language) -> float:
        """Return the share of questions whose likeliest next token is the answer."""
        prompts, answers = zip(*self.world.questions(language, self.split), strict=True)
        with torch.inference_mode():
            found = model(**self._encode(prompts)).logits[:, -1].argmax(-1)
        right = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(answers)))
        return float((found == right).double().mean())

    def _loss(self, model: Callable[..., Any], language: Language) -> float:
        """Return the mean loss on plain text about all goods."""
        writer = Writer(self.world, random.Random(f"evaluation {self.world.seed}"))
        documents = [writer.document(language, PLAIN, GOODS) for _ in range(PLAIN_DOCUMENTS)]
        encoded = self._encode(documents)
        with torch.inference_mode():
            return float(model(**encoded, labels=encoded["input_ids"]).loss)

    def _encode(self, texts: Any) -> dict[str, torch.Tensor]:
        encoded = self.tokenizer(list(texts), truncation=True, max_length=DOCUMENT, return_tensors="pt")
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}


def table(scores: list[Score]) -> str:
    """Lay the scores out as a Markdown table."""
    lines = [f"| model ({scores[0].items} items) | task A | task B | loss A | loss B |", "|---|---|---|---|---|"]
    for s in scores:
        task = " | ".join(f"{s.accuracy[x]:.3f} ± {s.error[x]:.3f}" for x in s.accuracy)
        lines.append(f"| {s.model} | {task} | " + " | ".join(f"{loss:.3f}" for loss in s.loss.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description="Measure the example's models and their merges.")
    parser.add_argument("--models", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--split", choices=["test", "development"], default="test")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    names = ("base", "task-expert", "language-expert", "upper-bound")
    models = {name: merge.open(folder) for name in names if (folder := arguments.models / name).is_dir()}
    tokenizer = AutoTokenizer.from_pretrained(arguments.models / "base")
    exam = Exam(World.load(arguments.models / "world.json"), tokenizer, arguments.split)
    scores = [exam.score(name, checkpoint) for name, checkpoint in candidates(models)]
    print(json.dumps([asdict(s) for s in scores], indent=2) if arguments.json else table(scores))


if __name__ == "__main__":
    main()
