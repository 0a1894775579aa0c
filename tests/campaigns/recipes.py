"""Small models with every kind of tensor, and five recipes over them: ties, nested steps, surveys, sparse, factors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RECIPES = {
    "ties": "merge: {ties: {base: base, models: {a: 0.6, b: 0.4}, density: 0.3}}\noutput: {shard_size: 2MB}\n",
    "nested": (
        "steps: {soup: {dare: {base: base, models: [a, b], density: 0.5, seed: 7}}}\n"
        "merge: {slerp: {models: [soup, a], t: 0.3}}\noutput: {dtype: float16, tokenizer: a}\n"
    ),
    "chosen_layers": (
        "merge: {layer_swap: {task: a, language: b, base: base, layers: auto, by: module, threshold: 0.0001}}\n"
        "output: {shard_size: 1MB}\n"
    ),
    "extract_sparse": (
        'merge: {extract_sparse: {base: base, tuned: a, density: 0.05, dense: "*norm*", pytorch_diff: true}}\n'
    ),
    "extract_lora": "merge: {extract_lora: {base: base, tuned: b, rank: 8}}\n",
}
_TIME_FIELDS = ("seconds", "seal")  # the seal is a digest over the seconds, too


def tensors(seed: int, layers: int, width: int) -> dict[str, Tensor]:
    """Draw the tensors of a model; without a seed of its own every one is a small step away from the first."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = {"model.embed_tokens.weight": draw(1000, width), "lm_head.weight": draw(1000, width)}
    found["model.norm.weight"] = draw(width)
    for i in range(layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"model.layers.{i}.self_attn.{name}.weight"] = draw(width, width)
        for name, shape in {"up": (4 * width, width), "gate": (4 * width, width), "down": (width, 4 * width)}.items():
            found[f"model.layers.{i}.mlp.{name}_proj.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{name}.weight"] = draw(width)
    return found


def write_inputs(folder: Path, *, layers: int = 8, width: int = 96) -> None:
    """Write a base, two models and the recipes."""
    base = tensors(0, layers, width)
    for seed, name in enumerate(("base", "a", "b")):
        (folder / name).mkdir(parents=True)
        drawn = tensors(seed, layers, width)
        own = {key: value + (0.05 * drawn[key] if seed else 0) for key, value in base.items()}
        stored: Mapping[str, Tensor] = {key: value.to(torch.bfloat16) for key, value in own.items()}
        save_file(dict(stored), folder / name / "model.safetensors")
        config = {"model_type": "llama", "hidden_size": width, "num_hidden_layers": layers, "vocab_size": 1000}
        (folder / name / "config.json").write_text(json.dumps(config))
        vocabulary = {str(i): i for i in range(1000)}
        (folder / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text)


def contents(out: Path) -> dict[str, str]:
    """Give a digest of every file of a result; the receipt's without what tells the time."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        raw = path.read_bytes()
        if path.name == "portmanteau.json":
            receipt = json.loads(raw)
            raw = json.dumps({key: one for key, one in receipt.items() if key not in _TIME_FIELDS}).encode()
        found[path.relative_to(out).as_posix()] = hashlib.sha256(raw).hexdigest()
    return found
