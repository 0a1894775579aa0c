"""Random Llama-shaped checkpoints for the benchmarks: a base, fine-tunings of it and a LoRA adapter, in bf16.

Run by the benchmarks in a process of its own: what this one holds in memory must not show in the measured ones.

Entries are drawn once into a pool of 2^23 - 15 (a prime, so that repetitions never line up in a matrix), and a tensor
is that pool, begun at a place that its name gives and repeated as often as it needs: every byte is written, and
writing takes as long as the disk does. A fine-tuning has a pool of its own, the base's plus a tenth as much again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

Shape = tuple[int, ...]
Bits = NDArray[np.uint16]  # bf16 by its bits

POOL = 2**23 - 15
RANK = 16
_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 2048,
}
_DIMENSIONS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SCALES = {
    scale: dict(zip(_DIMENSIONS, sizes, strict=True))
    for scale, sizes in {
        "tiny": (64, 176, 6, 4, 1, 256),
        "0.1B": (768, 2048, 12, 12, 4, 32_000),  # 124 million entries
        "0.3B": (1024, 2816, 24, 16, 4, 32_000),  # 336 million
        "1.1B": (2048, 5632, 22, 32, 4, 32_000),  # TinyLlama
        "8B": (4096, 14_336, 32, 32, 8, 128_256),  # Llama 3.1 8B
        "70B": (8192, 28_672, 80, 64, 8, 128_256),  # Llama 3.1 70B
    }.items()
}
_SHARD_BYTES = {"tiny": 500_000, "0.1B": 100_000_000, "0.3B": 250_000_000, "1.1B": 800_000_000}  # some for each model
_LARGE_SHARD = 5_000_000_000


def shapes(config: dict[str, int]) -> Iterator[tuple[str, Shape]]:
    """Give name and shape of every tensor of a Llama, in the order in which transformers saves them."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        for module, shape in matrices(config):
            yield f"model.layers.{layer}.{module}.weight", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (hidden,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def matrices(config: dict[str, int]) -> Iterator[tuple[str, Shape]]:
    """Give name and shape of the linear modules of one layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    grouped = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield from (("self_attn.q_proj", (hidden, hidden)), ("self_attn.k_proj", (grouped, hidden)))
    yield from (("self_attn.v_proj", (grouped, hidden)), ("self_attn.o_proj", (hidden, hidden)))
    yield from (("mlp.gate_proj", (inner, hidden)), ("mlp.up_proj", (inner, hidden)))
    yield "mlp.down_proj", (hidden, inner)


def pool(model: str) -> Bits:
    """Draw the entries of a model: the base's, and for a fine-tuning a tenth as much again on top of it."""
    drawn = 0.02 * _normal("base")
    return _bf16(drawn if model == "base" else drawn + 0.002 * _normal(model))


def _normal(seed: str) -> NDArray[np.float32]:
    return np.random.Generator(np.random.SFC64(zlib.crc32(seed.encode()))).standard_normal(POOL, dtype=np.float32)


def _bf16(values: NDArray[np.float32]) -> Bits:
    """Round to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def put(file: BinaryIO, drawn: Bits, name: str, shape: Shape) -> None:
    """Write the entries of one tensor."""
    left, at = math.prod(shape), zlib.crc32(name.encode()) % len(drawn)
    while left:
        run = drawn[at : at + left]
        file.write(run.data)
        left, at = left - len(run), 0


def save(path: Path, tensors: dict[str, Shape], drawn: Bits | None) -> None:
    """Write one safetensors file of bf16 tensors; without entries, a sparse file of zeros behind its header."""
    entries, end = {}, 0
    for name, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        if drawn is None:
            file.truncate(8 + len(header) + end)
        else:
            for name, shape in tensors.items():
                put(file, drawn, name, shape)


def sharded(config: dict[str, int], limit: int) -> list[dict[str, Shape]]:
    """Share the tensors out over files of at most so many bytes."""
    shards: list[dict[str, Shape]] = [{}]
    size = 0
    for name, shape in shapes(config):
        nbytes = 2 * math.prod(shape)
        if shards[-1] and size + nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    return shards


def write_model(folder: Path, scale: str, drawn: Bits | None) -> None:
    """Write a checkpoint in shards, with index and config."""
    config = SCALES[scale]
    shards = sharded(config, _SHARD_BYTES.get(scale, _LARGE_SHARD))
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save(folder / file, shard, drawn)
        where.update(dict.fromkeys(shard, file))
    total = sum(2 * math.prod(shape) for _, shape in shapes(config))
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    _write_json(folder / "config.json", {**_COMMON, **config})


def write_adapter(folder: Path, scale: str) -> None:
    """Write a LoRA adapter of all linear modules, as peft saves it."""
    config = SCALES[scale]
    tensors: dict[str, Shape] = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (rows, columns) in matrices(config):
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors |= {f"{prefix}.lora_A.weight": (RANK, columns), f"{prefix}.lora_B.weight": (rows, RANK)}
    save(folder / "adapter_model.safetensors", tensors, pool("adapter"))
    modules = [module.rpartition(".")[2] for module, _ in matrices(config)]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    _write_json(folder / "adapter_config.json", {**settings, "target_modules": modules})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def make(folder: Path, write: Callable[[Path], None]) -> None:
    """Make what is not there yet. The folder takes its name when it is whole."""
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        partial.rename(folder)


def refuse_what_does_not_fit(folder: Path, scale: str, models: list[str]) -> None:
    """Look whether the models that are not there yet fit on the disk, with two more for results."""
    missing = sum(not (folder / model).exists() for model in models if model != "adapter")
    needed = (missing + 2) * sum(2 * math.prod(shape) for _, shape in shapes(SCALES[scale]))
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        sys.exit(f"{folder}: {scale} needs {needed / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free")


def main() -> None:
    """Write those checkpoints that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+", help="`adapter` is a LoRA adapter, any other name a model")
    parser.add_argument("--scale", choices=SCALES, required=True)
    parser.add_argument("--headers", action="store_true", help="headers and holes, no entries")
    arguments = parser.parse_args()
    scale: str = arguments.scale
    if not arguments.headers:
        refuse_what_does_not_fit(arguments.folder, scale, arguments.models)
    for model in arguments.models:
        if model == "adapter":
            make(arguments.folder / model, lambda folder: write_adapter(folder, scale))
        elif arguments.headers:
            make(arguments.folder / model, lambda folder: write_model(folder, scale, None))
        else:
            make(arguments.folder / model, lambda folder, model=model: write_model(folder, scale, pool(model)))


if __name__ == "__main__":
    main()
