"""Random Llama-shaped checkpoints for the benchmark: a base and two fine-tunings of it, in bf16, three shards each.

Run by run.py in a process of its own: what this one holds in memory must not show in the measured ones.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARDS = 3
MODELS = ("base", "one", "two")
_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCALES = {
    "full": {  # TinyLlama's shape: 1.1 billion parameters, 2.2 GB for each model
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "vocab_size": 256,
        "max_position_embeddings": 64,
    },
}


def shapes(config: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give name and shape of every tensor of a Llama, in the order in which transformers saves them."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    grouped = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (grouped, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (grouped, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def tensor(model: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw a tensor: the base's, and for a fine-tuning a tenth as much again on top of it."""
    drawn = _normal(f"base {name}", shape).mul_(0.02)
    if model != "base":
        drawn.add_(_normal(f"{model} {name}", shape), alpha=0.002)
    return drawn.bfloat16()


def _normal(seed: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(seed.encode())))


def write(folder: Path, model: str, config: dict[str, int]) -> None:
    """Write one checkpoint. The folder takes its name when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    total, before = sum(math.prod(shape) for _, shape in shapes(config)), 0
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(SHARDS)]
    for name, shape in shapes(config):
        shards[before * SHARDS // total].append((name, shape))
        before += math.prod(shape)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
        save_file({name: tensor(model, name, shape) for name, shape in shard}, partial / file, {"format": "pt"})
        weight_map.update(dict.fromkeys((name for name, _ in shard), file))
    index = {"metadata": {"total_size": 2 * total}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (partial / "config.json").write_text(json.dumps({**_COMMON, **config}, indent=2), encoding="utf-8")
    partial.rename(folder)


def main() -> None:
    """Write those checkpoints that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", choices=SCALES, default="full")
    arguments = parser.parse_args()
    for model in MODELS:
        if not (arguments.folder / model).exists():
            write(arguments.folder / model, model, SCALES[arguments.scale])


if __name__ == "__main__":
    main()
