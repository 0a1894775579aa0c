"""The synthetic world of `average_snapshots.py`: its text, its task, and an encoder that is pre-trained on its text.

A *world* has topics, and every topic prefers some meanings; languages A and B have one word each for a meaning, none in
common. A text is two sentences, each drawn from one topic. The task asks whether both share their topic, only its
field, or neither. The encoder is a small one of XLM-R's kind, trained on masked words in A, in B and code-switched.
"""

from __future__ import annotations

import statistics
import zlib
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # in XLM-R's order
MEANINGS, TOPICS, FIELD, WORDS = 120, 12, 3, 8  # a field is so many topics; a sentence so many words
LENGTH, CONCENTRATION, BACKGROUND = 2 * WORDS + 2, 0.05, 0.2
MASKED, SHARES = 0.25, (0.25, 0.25, 0.5)  # of the text for pre-training: in A, in B, code-switched
SHAPE = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}


class World:
    """Topics, the words that they prefer, and two languages with one word each for a meaning."""

    def __init__(self, seed: int) -> None:
        """Draw, for every topic, how likely it uses each meaning: [TOPICS, MEANINGS]."""
        self.seed = seed
        dice = np.random.default_rng((seed, 0))
        own = dice.dirichlet([CONCENTRATION] * MEANINGS, TOPICS)
        self.likely = torch.from_numpy((1 - BACKGROUND) * own + BACKGROUND / MEANINGS)

    def text(self, topics: Tensor, share_b: Tensor, dice: torch.Generator) -> Tensor:
        """Write pairs of sentences about topics [n, 2], so large a share of their words in B [n]: [n, LENGTH]."""
        meanings = torch.multinomial(self.likely[topics.flatten()], WORDS, replacement=True, generator=dice)
        in_b = torch.rand(len(topics), 2 * WORDS, generator=dice) < share_b[:, None]
        words = len(SPECIAL) + meanings.view(len(topics), -1) + MEANINGS * in_b
        begin, end = (torch.full((len(topics), 1), SPECIAL.index(sign)) for sign in ("<s>", "</s>"))
        return torch.cat([begin, words[:, :WORDS], end, words[:, WORDS:]], 1)

    def plain(self, count: int, dice: torch.Generator) -> Tensor:
        """Write text for pre-training, each pair in A, in B or code-switched: [count, LENGTH]."""
        topics = torch.randint(TOPICS, (count, 2), generator=dice)
        topics[: count // 2, 1] = topics[: count // 2, 0]
        kinds = torch.multinomial(torch.tensor(SHARES), count, replacement=True, generator=dice)
        return self.text(topics, torch.tensor([0.0, 1.0, 0.5])[kinds], dice)

    def task(self, count: int, language: str, split: str, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Write pairs [count, LENGTH] and their relation [count]: same topic, same field, neither.

        So large a share of the labels, as `noise` says, is one of the two wrong ones; the pairs are the same without.
        """
        dice = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {language} {split}".encode()))
        labels = torch.randint(3, (count,), generator=dice)
        first = torch.randint(TOPICS, (count,), generator=dice)
        fields = TOPICS // FIELD
        within = (first + torch.randint(1, FIELD, (count,), generator=dice)) % FIELD + first // FIELD * FIELD
        other = (first // FIELD + torch.randint(1, fields, (count,), generator=dice)) % fields
        apart = other * FIELD + torch.randint(FIELD, (count,), generator=dice)
        second = torch.stack([first, within, apart], 1)[torch.arange(count), labels]
        share = torch.full((count,), float(language == "B"))
        pairs = self.text(torch.stack([first, second], 1), share, dice)
        wrong = torch.rand(count, generator=dice) < noise
        return pairs, torch.where(wrong, (labels + torch.randint(1, 3, (count,), generator=dice)) % 3, labels)


def pretrain(world: World, steps: int, folder: Path) -> float:
    """Train an encoder from scratch on masked words, save it, and give its last loss (mean of 50 batches)."""
    transformers.set_seed(world.seed)
    words = {"vocab_size": len(SPECIAL) + 2 * MEANINGS, "max_position_embeddings": LENGTH + 2, "type_vocab_size": 1}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.1}
    config = transformers.XLMRobertaConfig(**words, **SHAPE, **dropout)
    model = transformers.XLMRobertaForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 100) * (1 - 0.95 * i / steps))
    dice, losses = torch.Generator().manual_seed(world.seed), []
    for _ in range(steps):
        text = world.plain(64, dice)
        hidden = (torch.rand(text.shape) < MASKED) & (text >= len(SPECIAL))
        labels = text.masked_fill(~hidden, -100)
        loss = model(input_ids=text.masked_fill(hidden, SPECIAL.index("<mask>")), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    return statistics.fmean(losses[-50:])
