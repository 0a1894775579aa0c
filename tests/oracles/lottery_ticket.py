"""The runs that composable-sft and our training have in common: the model, the examples, the arguments."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

FIXTURES = Path(__file__).parent / "fixtures"


@dataclass(frozen=True)
class Run:
    """One run: how many entries, how long, how many micro-batches a step, what is frozen."""

    name: str
    count: int = 200
    iterations: int = 1
    accumulation: int = 1
    frozen: str = ""
    dense_steps: int = 5
    sparse_steps: int = 7


RUNS = (
    Run("plain"),
    Run("accumulation", accumulation=2),
    Run("frozen_norms", frozen="*LayerNorm*"),
    Run("iterations", iterations=2),
)


def new_model() -> BertForSequenceClassification:
    """Make a BERT of two layers with 6 thousand weights and dropout, from its config."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            num_labels=3,
        )
    )


def load_model(run: Run) -> BertForSequenceClassification:
    """Load the start in fp64 and freeze what the run freezes."""
    model = new_model()
    model.load_state_dict(load_file(FIXTURES / "lottery_ticket" / "start.safetensors"), strict=False)
    model.double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not fnmatchcase(name, run.frozen))
    return model


def examples() -> list[dict[str, torch.Tensor]]:
    """Read the examples: token numbers [8] and one of three labels."""
    stored = load_file(FIXTURES / "lottery_ticket" / "examples.safetensors")
    pairs = zip(stored["input_ids"].long(), stored["labels"].long(), strict=True)
    return [{"input_ids": tokens, "labels": label} for tokens, label in pairs]


def arguments(run: Run, phase: str, folder: Path) -> TrainingArguments:
    """Give the arguments of one phase: AdamW as transformers has it, no weight decay, gradients clipped at 1."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=run.dense_steps if phase == "dense" else run.sparse_steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=run.accumulation,
        learning_rate=1e-2,
        seed=7,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )


def digest(model: torch.nn.Module) -> str:
    """Hash all weights."""
    whole = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(whole).hexdigest()
