"""Train the three models of the example: a bilingual base, a task expert and a language expert.

    python examples/train_experts.py DEST [--seed 0]

Everything is synthetic and small. The *world* has 60 goods; each has a price (0 to 4) and a kind (one of 6). Two
languages talk about it. They have the same grammar and the same meanings, and no word form in common: every word is two
syllables, and both languages draw their words from the same 24 syllables. Digits, punctuation and people's names are
shared as well. A token is a syllable, a digit, a name or a sign, so a word only becomes a word inside the model.

* **base**: plain text in language A, in language B, and code-switched. B is known poorly: 24 of the 60 goods occur in
  the base's B and code-switched text, the other 36 have never been named in B. The text gives prices and kinds,
  compares two goods, and asks for the dearer price and for the difference. It also asks "what all X and Y?", for which
  the text has only guesses, digits drawn at random: the base knows the question and not the answer.
* **task expert**: the base, trained further in language A only; half of the sentences are plain text, half are the
  task: "what all X and Y?" answered with the sum of both prices. Two fifths of the pairs of goods are held out, one for
  development and one for the test. The embeddings and the lowest 4 of the 8 layers are held still.
* **language expert**: the base, trained further on plain text in B about all 60 goods, without the task.

The task in B thus needs the sum, which was only ever shown in A, and the names of goods that only the language expert
has met. The seed decides the words, the prices, the held-out pairs, the initial weights and the order of the text.

DEST gets `base`, `task-expert`, `language-expert` (Hugging Face folders, bfloat16) and `world.json`, which
`evaluate.py` reads: the words, the prices and the held-out pairs.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Language = Literal["A", "B"]
Source = Literal["A", "B", "mixed"]
Pair = tuple[int, int]
Say = Callable[[str], str]  # concept → word

GOODS, CORE_GOODS, PRICES, KINDS, SYLLABLES = 60, 24, 5, 6, 24
PEOPLE = ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
FUNCTION_WORDS = ("cost", "what", "and", "buy", "pay", "more", "less", "same", "is", "all")
PLAIN = ("price", "buy", "ask", "kind", "compare", "dearer", "difference", "guess")
TASK = "sum"

DOCUMENT, SENTENCES, BATCH, WARM_UP = 32, 6, 64, 50  # no sentence is shorter than 6 tokens
SHARE_B, SHARE_MIXED = 0.12, 0.35


@dataclass(frozen=True)
class Stage:
    """How long and how fast one model is trained."""

    steps: int
    learning_rate: float
    frozen: int = 0  # so many of the lowest layers, and the input embeddings with them, are held still


BASE, TASK_EXPERT, LANGUAGE_EXPERT = Stage(1500, 2e-3), Stage(400, 8e-4, frozen=4), Stage(450, 3e-4)


@dataclass(frozen=True)
class World:
    """The goods, what each language calls them, and which pairs of goods the task is trained and tested on."""

    seed: int
    syllables: tuple[str, ...]
    words: dict[str, dict[str, str]]
    prices: tuple[int, ...]
    kinds: tuple[int, ...]
    pairs: dict[str, list[Pair]]

    @classmethod
    def create(cls, seed: int) -> World:
        """Draw a world."""
        dice = random.Random(f"world {seed}")
        syllables = tuple(dice.sample([c + v for c in "bdfgklmnprst" for v in "aeiou"], SYLLABLES))
        concepts = [*FUNCTION_WORDS, *(f"kind {k}" for k in range(KINDS)), *(f"good {g}" for g in range(GOODS))]
        forms = dice.sample([a + b for a in syllables for b in syllables], 2 * len(concepts))
        words = {"A": dict(zip(concepts, forms, strict=False)), "B": dict(zip(concepts, forms[::-1], strict=False))}
        prices = tuple(dice.sample([g % PRICES for g in range(GOODS)], GOODS))
        kinds = tuple(dice.sample([g % KINDS for g in range(GOODS)], GOODS))
        every = list(combinations_with_replacement(range(GOODS), 2))
        dice.shuffle(every)
        fifth = len(every) // 5
        pairs = {"test": every[:fifth], "development": every[fifth : 2 * fifth], "train": every[2 * fifth :]}
        return cls(seed, syllables, words, prices, kinds, pairs)

    @classmethod
    def load(cls, path: Path) -> World:
        """Read what `save` wrote."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        pairs = {split: [(i, j) for i, j in found] for split, found in raw["pairs"].items()}
        syllables, prices, kinds = tuple(raw["syllables"]), tuple(raw["prices"]), tuple(raw["kinds"])
        return cls(raw["seed"], syllables, raw["words"], prices, kinds, pairs)

    def save(self, path: Path) -> None:
        """Write the world as JSON."""
        path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def questions(self, language: Language, split: str) -> list[tuple[str, str]]:
        """Phrase the task for the pairs of one split, in both orders: prompts and answers."""
        ordered = [pair for i, j in self.pairs[split] for pair in dict.fromkeys([(i, j), (j, i)])]
        say = self.words[language].__getitem__
        return [(_question(say, "all", i, j), str(self.prices[i] + self.prices[j])) for i, j in ordered]


def _question(say: Say, word: str, i: int, j: int) -> str:
    return f"{say('what')} {say(word)} {say(f'good {i}')} {say('and')} {say(f'good {j}')} ?"


@dataclass(frozen=True)
class Writer:
    """Writes sentences about a world; only the first `goods` goods are named in B."""

    world: World
    dice: random.Random

    def document(self, language: Source, sentences: Sequence[str], goods: int) -> str:
        """Write at least `DOCUMENT` tokens. Code-switched ("mixed") text takes each word from either language."""
        named = goods if language == "B" else GOODS
        say = self._mix(goods) if language == "mixed" else self.world.words[language].__getitem__
        return " ".join(self._sentence(self.dice.choice(sentences), say, named) for _ in range(SENTENCES))

    def _mix(self, goods: int) -> Say:
        a, b = self.world.words["A"], dict(self.world.words["B"])
        b.update({f"good {g}": a[f"good {g}"] for g in range(goods, GOODS)})
        return lambda concept: (a if self.dice.random() < 0.5 else b)[concept]

    def _sentence(self, sort: str, say: Say, goods: int) -> str:
        """Write one sentence; the goods in it are drawn from the first `goods`."""
        world, dice = self.world, self.dice
        i, j = dice.randrange(goods), dice.randrange(goods)
        good, p, q = f"good {i}", world.prices[i], world.prices[j]
        match sort:
            case "price":
                return f"{say(good)} {say('cost')} {p} ."
            case "buy":
                return f"{dice.choice(PEOPLE)} {say('buy')} {say(good)} {say('and')} {say('pay')} {p} ."
            case "ask":
                return f"{say('what')} {say('cost')} {say(good)} ? {p} ."
            case "kind":
                return f"{say(good)} {say('is')} {say(f'kind {world.kinds[i]}')} ."
            case "compare":
                relation = "more" if p > q else "less" if p < q else "same"
                return f"{say(good)} {say('and')} {say(f'good {j}')} , {say(relation)} ."
            case "dearer":
                return f"{_question(say, 'more', i, j)} {max(p, q)} ."
            case "difference":
                return f"{_question(say, 'less', i, j)} {abs(p - q)} ."
            case "guess":
                return f"{_question(say, 'all', i, j)} {dice.randrange(2 * PRICES - 1)} ."
            case _:
                return self._task(say)

    def _task(self, say: Say) -> str:
        i, j = self.dice.choice(self.world.pairs["train"])
        i, j = (i, j) if self.dice.random() < 0.5 else (j, i)
        return f"{_question(say, 'all', i, j)} {self.world.prices[i] + self.world.prices[j]} ."


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token for a syllable, a digit, a name or a sign."""
    tokens = [*SPECIAL, *"0123456789.,?", *PEOPLE, *world.syllables]
    tokenizer = Tokenizer(WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"[a-z]{2}|[A-Z][a-z]+|\S"), behavior="removed", invert=True)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokens.index("<s>"))])
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, model_max_length=4 * DOCUMENT, **special
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make an untrained Llama of 8 layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=4 * DOCUMENT,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(model: LlamaForCausalLM, batch: Callable[[], Tensor], stage: Stage) -> LlamaForCausalLM:
    """Train a copy of the model on `stage.steps` batches of token numbers [BATCH, DOCUMENT]."""
    model = copy.deepcopy(model)
    model.train()
    if stage.frozen:
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[: stage.frozen].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARM_UP) * (1 - 0.9 * step / stage.steps)
    )
    began = time.monotonic()
    for step in range(1, stage.steps + 1):
        tokens = batch()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 250 == 0 or step == stage.steps:
            print(
                f"  step {step}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True
            )
    model.requires_grad_(True)
    model.eval()  # type: ignore[no-untyped-call]
    return model


@dataclass(frozen=True)
class Batches:
    """Makes the batches of the three models, each a call without arguments."""

    writer: Writer
    tokenizer: PreTrainedTokenizerFast

    def base(self) -> Tensor:
        """Write text in A, in B about few goods, and code-switched."""
        return self._encode([self._bilingual() for _ in range(BATCH)])

    def task(self, language: Language = "A") -> Tensor:
        """Write text in one language, half of it the task; nobody guesses any more."""
        plain = [sort for sort in PLAIN if sort != "guess"]
        sorts = plain + [TASK] * len(plain)
        return self._encode([self.writer.document(language, sorts, GOODS) for _ in range(BATCH)])

    def language(self) -> Tensor:
        """Write plain text in B about all goods."""
        return self._encode([self.writer.document("B", PLAIN, GOODS) for _ in range(BATCH)])

    def _bilingual(self) -> str:
        drawn = self.writer.dice.random()
        language: Source = "B" if drawn < SHARE_B else "mixed" if drawn < SHARE_B + SHARE_MIXED else "A"
        return self.writer.document(language, PLAIN, CORE_GOODS)

    def _encode(self, documents: list[str]) -> Tensor:
        tokens: Tensor = self.tokenizer(documents, truncation=True, max_length=DOCUMENT, return_tensors="pt").input_ids
        return tokens


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder in bfloat16."""
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the base and the two experts of the example.")
    parser.add_argument("folder", metavar="DEST", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="another number gives slightly different weights")
    parser.add_argument("--upper-bound", action="store_true", help="also train the language expert on the task in B")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    world = World.create(arguments.seed)
    tokenizer = make_tokenizer(world)
    batches = Batches(Writer(world, random.Random(f"text {arguments.seed}")), tokenizer)
    models = {"base": train(make_model(tokenizer), batches.base, BASE)}
    # the experts start from exactly what is saved
    models["base"].bfloat16().float()  # type: ignore[no-untyped-call]
    models["task-expert"] = train(models["base"], batches.task, TASK_EXPERT)
    models["language-expert"] = train(models["base"], batches.language, LANGUAGE_EXPERT)
    if arguments.upper_bound:
        models["upper-bound"] = train(models["language-expert"], lambda: batches.task("B"), TASK_EXPERT)
    for name, model in models.items():
        save(model, tokenizer, arguments.folder / name)
    world.save(arguments.folder / "world.json")


if __name__ == "__main__":
    main()
