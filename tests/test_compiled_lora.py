"""LoRA factors multiplied by the compiled library, by torch and by numpy: the same bits."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.merge import TensorSpec
from portmanteau.merge.adapters.low_rank import low_rank
from portmanteau.merge.compiled import library, making
from portmanteau.merge.dtypes import torch_dtype
from portmanteau.merge.evaluate import Evaluation, Session
from portmanteau.merge.node import Inputs, Step
from portmanteau.merge.registry import find
from tests.conftest import WithoutLibrary

DTYPES = ("F32", "BF16", "F16")

pytestmark = pytest.mark.skipif(library.library() is None, reason="there is no C compiler here")


def one_after_the_other(left: np.ndarray, right: np.ndarray, scale: float) -> np.ndarray:
    """Multiply in fp64, the sums taken in the order of the rank."""
    total = left[:, :1] * right[0]
    for column, row in zip(left.T[1:], right[1:], strict=True):
        total = total + column[:, None] * row
    return (total * scale).astype(np.float32)


def a_fold(seed: int) -> tuple[Step, np.ndarray]:
    """Make a step that folds two adapters into a base of drawn sizes and dtypes; and what it gives, in fp32."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, width = draw.choice(((1, 1), (7, 300), (300, 7), (257, 1031), (1100, 320), (70_000, 3)))
    tensors: dict[str, Tensor] = {}

    def stored(name: str, *shape: int) -> np.ndarray:
        tensors[name] = torch.randn(shape, generator=generator).to(torch_dtype(draw.choice(DTYPES)))
        found: np.ndarray = tensors[name].float().numpy()
        return found

    expected, specs = stored("base", rows, width), []
    for number in range(2):
        rank, transposed, scale = draw.choice((1, 2, 5, 16, 70)), draw.random() < 0.4, draw.choice((1.0, 0.3))
        across, down = (rows, width) if transposed else (width, rows)
        a, b = stored(f"a{number}", rank, across).astype(float), stored(f"b{number}", down, rank).astype(float)
        change = one_after_the_other(*((a.T, b.T) if transposed else (b, a)), scale)
        expected = expected + change * np.float32(0.7)
        specs.append((transposed, scale))
    memory = merge.InMemory("memory", tensors)
    dense = TensorSpec("tensor", "F32", (rows, width))
    changes = [
        low_rank(dense, memory.node(f"a{i}"), memory.node(f"b{i}"), scale, transposed=transposed)
        for i, (transposed, scale) in enumerate(specs)
    ]
    settings = {"weight": (1.0, 0.7, 0.7), "normalize": False}
    return Step(dense, find("linear"), settings, Inputs((memory.node("base"), *changes)), ("base", "a", "b")), expected


@pytest.mark.parametrize("seed", range(40))
def test_the_library_and_torch_and_numpy_give_the_same_bits(seed: int) -> None:
    step, expected = a_fold(seed)
    assert making.is_compiled(step, Session())
    by_torch = torch.cat([values for _, values in Evaluation(Session()).parts(step)]).numpy()
    compiled = [b"".join(map(bytes, making.made(step, Session(part=part)))) for part in (1 << 18, 1 << 16)]
    assert expected.tobytes() == by_torch.tobytes() == compiled[0] == compiled[1]


def test_a_change_of_minus_zero_leaves_the_zeros_of_the_base_as_they_are() -> None:
    tensors = {"base": torch.tensor([[-0.0, 0.0]]), "a": torch.tensor([[-1.0, -1.0]]), "b": torch.zeros(1, 1)}
    memory, spec = merge.InMemory("memory", tensors), TensorSpec("tensor", "F32", (1, 2))
    change = low_rank(spec, memory.node("a"), memory.node("b"), 1.0, transposed=False)
    step = Step(spec, find("linear"), {"normalize": False}, Inputs((memory.node("base"), change)), ("base", "a"))
    assert b"".join(map(bytes, making.made(step, Session()))) == tensors["base"].numpy().tobytes()


@pytest.mark.parametrize("way", ["folded", "from an SVD", "in a step that goes through it twice"])
def test_a_folded_model_is_the_same_with_and_without_the_library(
    way: str,
    tmp_path: Path,
    save_tensors: Callable[[str, Mapping[str, Tensor]], Path],
    without_library: WithoutLibrary,
) -> None:
    generator = torch.Generator().manual_seed(1)
    module = "model.layers.0.mlp.up_proj"
    base = {
        f"{module}.weight": torch.randn(1100, 320, generator=generator).bfloat16(),
        "model.norm.weight": torch.ones(9),
    }
    factors = {
        f"base_model.model.{module}.lora_A.weight": torch.randn(4, 320, generator=generator),
        f"base_model.model.{module}.lora_B.weight": torch.randn(1100, 4, generator=generator),
    }
    folder = save_tensors("adapter", factors)
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    config = '{"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["up_proj"]}'
    (folder / "adapter_config.json").write_text(config, encoding="utf-8")
    one = merge.open(save_tensors("base", base))
    made = compositions.lora(base=one, adapters=[merge.open_adapter(folder)], combine="svd" if "SVD" in way else "cat")
    if "step" in way:
        made = compositions.tensorwise("ties", models={"folded": made}, base=one)
    receipts = [merge.build(made, tmp_path / str(threads), threads=threads) for threads in (1, 2)]
    with without_library():
        receipts.append(merge.build(made, tmp_path / "without"))
    assert receipts[0].outputs == receipts[1].outputs == receipts[2].outputs
