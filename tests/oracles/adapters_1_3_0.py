"""The library adapters 1.3.0, asked as an oracle from an environment of its own: it needs transformers 4.

    python3.11 -m venv oracle
    oracle/bin/pip install adapters==1.3.0 transformers==4.57.6 'huggingface_hub<1' 'datasets<4' 'accelerate<2' \
        requests torch==2.13.0
    oracle/bin/python tests/oracles/adapters_1_3_0.py fixtures

writes the folders in `tests/oracles/fixtures/adapters_1_3_0/`, which tests compare with. Tests marked `adapters` call
`outputs`:

    oracle/bin/python tests/oracles/adapters_1_3_0.py outputs QUESTIONS.json ANSWERS.safetensors
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters.composition import Stack
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

FOLDER = Path(__file__).parent / "fixtures" / Path(__file__).stem
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 24,
    "max_position_embeddings": 12,
    "type_vocab_size": 1,
    "pad_token_id": 0,
}
INPUT = torch.tensor([[1, 5, 9, 23, 2, 7], [3, 3, 20, 11, 8, 4]])
AVERAGES = {"mean": [("first", 0.25), ("second", 0.75)], "languages": [("swahili", 3.0), ("quechua", 1.0)]}


def scattered(model: torch.nn.Module, seed: int) -> None:
    """Give adapters weights that matter: the library starts them close to zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "adapters." in name or "heads." in name:
            parameter.data = torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=generator)


def output(model: torch.nn.Module) -> torch.Tensor:
    """Run the base model with what is active [batch, tokens, hidden]."""
    with torch.no_grad():
        found: torch.Tensor = model.base_model(INPUT).last_hidden_state
    return found


def fixtures() -> None:
    """Save adapters, their averages and a stack as the library does, and what the model gives with them."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    os.chdir(FOLDER)  # the library writes the base's path down
    torch.manual_seed(0)
    BertModel(BertConfig(**TINY)).save_pretrained("base")
    model = adapters.AutoAdapterModel.from_pretrained("base").eval()
    kinds = {"first": "seq_bn[reduction_factor=4]", "second": "seq_bn[reduction_factor=4, dropout=0.1]"}
    kinds |= dict.fromkeys(("swahili", "quechua"), "seq_bn_inv[reduction_factor=2]")
    kinds |= {"task": "double_seq_bn[reduction_factor=8]"}
    for name, kind in kinds.items():
        model.add_adapter(name, config=kind)
    model.add_classification_head("task", num_labels=2)
    scattered(model, seed=1)
    for name in kinds:  # the default is a pickle; with_head takes a head of the same name along
        model.save_adapter(name, name, use_safetensors=name in ("second", "quechua"), with_head=name == "task")
    answers = {"plain": output(model)}
    for name, members in AVERAGES.items():
        # asked of a model with heads, average_adapter leaves the invertible adapters out without a word
        model.base_model.average_adapter(name, [one for one, _ in members], weights=[weight for _, weight in members])
        model.save_adapter(name, name, use_safetensors=True, with_head=False)
    for name, setup in {**{name: name for name in AVERAGES}, "stack": Stack("swahili", "task")}.items():
        model.set_active_adapters(setup)
        answers[name] = output(model)
    model.save_adapter_setup("stack", Stack("swahili", "task"), use_safetensors=True)
    save_file(answers, "outputs.safetensors")


def outputs(questions: Path, answers: Path) -> None:
    """Answer questions: name → {base, and adapter or setup, the folder to load} with outputs: name → tensor."""
    found = {}
    for name, asked in json.loads(questions.read_text(encoding="utf-8")).items():
        model = adapters.AutoAdapterModel.from_pretrained(asked["base"]).eval()
        missing: dict[str, list[str]] = {}
        if "setup" in asked:
            setup, _ = model.load_adapter_setup(asked["setup"], set_active=True, use_safetensors=True)
            assert isinstance(setup, Stack), setup
            found[f"{name}.head"] = model(INPUT).logits.detach()
        elif "stack" in asked:
            loaded = [model.load_adapter(one, use_safetensors=True) for one in asked["stack"]]
            model.set_active_adapters(Stack(*loaded))
            found[f"{name}.head"] = model(INPUT).logits.detach()
        else:
            label = model.load_adapter(asked["adapter"], use_safetensors=True, set_active=True, loading_info=missing)
            assert missing == {"missing_keys": [], "unexpected_keys": []}, missing
            found[f"{name}.name"] = torch.tensor(list(label.encode()))
        found[name] = output(model)
    save_file(found, answers)


if __name__ == "__main__":
    {"fixtures": fixtures, "outputs": outputs}[sys.argv[1]](*map(Path, sys.argv[2:]))
