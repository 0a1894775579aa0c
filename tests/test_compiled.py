"""The compiled library against the operators' definitions in torch: the same bits, for every operator with a form."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from portmanteau import merge
from portmanteau.merge import TensorSpec
from portmanteau.merge.compiled import library, making, measures
from portmanteau.merge.dtypes import torch_dtype
from portmanteau.merge.evaluate import Evaluation, Session
from portmanteau.merge.kernels import one_thread
from portmanteau.merge.node import Inputs, Source, Step
from portmanteau.merge.non_finite import Watch
from portmanteau.merge.registry import find, operators
from tests.conftest import WithoutLibrary
from tests.imports import heavy_imports

DTYPES = ("F32", "BF16", "F16")
SIZES = (0, 1, 4095, 4097, 65536, 70000, 200001)  # around the rows of sums and the parts
WEIGHTS = (1.0, 0.3, 0.7, -0.5, 0.0, 2.0)

pytestmark = pytest.mark.skipif(library.library() is None, reason="there is no C compiler here")


def densities(draw: random.Random, count: int) -> tuple[float, ...]:
    return tuple(draw.choice((0.1, 0.3, 0.9, 1.0)) for _ in range(count))


def weights(draw: random.Random, count: int) -> tuple[float, ...]:
    found = tuple(draw.choice(WEIGHTS) for _ in range(count))
    return found if abs(sum(found)) > 0.1 else (1.0,) * count


SETTINGS: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
    "copy": lambda draw, count: {"factor": draw.choice((1.0, 0.5, 1.7))},
    "linear": lambda draw, count: {"weight": weights(draw, count), "normalize": draw.random() < 0.5},
    "slerp": lambda draw, count: {"t": draw.random()},
    "task_arithmetic": lambda draw, count: {
        "weight": weights(draw, count),
        "normalize": draw.random() < 0.5,
        "scale": draw.choice((1.0, 0.6)),
    },
    "ties": lambda draw, count: {
        "weight": weights(draw, count),
        "density": densities(draw, count),
        "rescale": draw.choice(("l1", "none")),
        "elect": draw.choice(("weighted", "unweighted")),
        "divide": draw.choice(("none", "weights", "count")),
        "scale": draw.choice((1.0, 0.6)),
    },
    "dare": lambda draw, count: {
        "weight": weights(draw, count),
        "density": densities(draw, count),
        "rescale": draw.choice(("l1", "density", "none")),
        "elect": draw.choice(("none", "weighted", "unweighted")),
        "divide": draw.choice(("none", "weights", "count")),
        "scale": draw.choice((1.0, 0.6)),
        "seed": draw.choice((0, 5, 1 << 62)),
    },
}


def drawn(draw: random.Random, entries: int, dtype: str, around: Tensor | None = None) -> Tensor:
    """Draw a tensor with entries of zero, of either sign, and with many that are equal in 16 bits."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    values = torch.randn(entries, generator=generator) * (1.0 if around is None else 0.1)
    values = values if around is None else values + around.float()
    values[torch.rand(entries, generator=generator) < 0.1] = 0.0
    return (values * draw.choice((1, -1))).to(torch_dtype(dtype))


def a_step(name: str, seed: int) -> Step:
    """Make a step with drawn tensors, dtypes and settings."""
    draw = random.Random(seed)
    operator, entries = find(name), draw.choice(SIZES)
    count = operator.takes or draw.choice((1, 2, 3))
    base = drawn(draw, entries, draw.choice(DTYPES))
    tensors = {f"model {i}": drawn(draw, entries, draw.choice(DTYPES), base) for i in range(count)}
    memory = merge.InMemory("memory", {"base": base, **tensors})
    inputs = Inputs(tuple(memory.node(one) for one in tensors), memory.node("base") if operator.needs_base else None)
    spec = TensorSpec("tensor", draw.choice(DTYPES), (entries,))
    return Step(spec, operator, SETTINGS[name](draw, count), inputs, tuple(tensors))


def by_torch(step: Step) -> bytes:
    with one_thread():
        parts = [values for _, values in Evaluation(Session()).parts(step)]
    return b"".join(values.contiguous().view(torch.uint8).numpy().tobytes() for values in parts)


def compiled(step: Step, **chosen: Any) -> bytes:
    session = Session(**chosen)
    assert making.is_compiled(step, session)
    return b"".join(bytes(part) for part in making.made(step, session))


def test_every_compiled_form_is_tried_here() -> None:
    assert {name for name, operator in operators().items() if operator.compiled} == SETTINGS.keys()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("name", SETTINGS)
def test_the_compiled_form_gives_the_bits_of_the_definition(name: str, seed: int) -> None:
    step = a_step(name, seed)
    expected = by_torch(step)
    assert compiled(step, part=1 << 18) == expected
    assert compiled(step, part=1 << 16, keep=0) == expected


@pytest.mark.parametrize("room", [1 << 22, 1 << 10])
@pytest.mark.parametrize("density", [0.0001, 0.2, 0.9])
def test_a_boundary_is_found_wherever_the_first_look_expects_it(
    density: float, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first look sees one row of 4096 in sixteen of a run: these are larger than all others, which are equal."""
    monkeypatch.setattr(measures, "_ROOM", room)
    delta = torch.full((200, 4096), 0.5)
    delta[::16] = torch.linspace(1.0, 2.0, 4096)
    delta[1::2].neg_()
    memory = merge.InMemory("memory", {"base": torch.zeros(200 * 4096), "model": delta.flatten()})
    settings = {name: setting.default for name, setting in find("ties").settings.items()} | {"density": density}
    spec, inputs = TensorSpec("tensor", "F32", (200 * 4096,)), Inputs((memory.node("model"),), memory.node("base"))
    step = Step(spec, find("ties"), settings, inputs, ("model",))
    made = torch.frombuffer(bytearray(compiled(step)), dtype=torch.float32)
    assert int((made != 0).sum()) == int(density * 200 * 4096)
    assert compiled(step) == compiled(step, part=1 << 16, keep=0) == by_torch(step)


@pytest.mark.parametrize("largest", [0, 1 << 27])
@pytest.mark.parametrize("entry", [0.5, float("inf"), float("nan")])
@pytest.mark.parametrize("entries", [4097, 200_003])
def test_what_is_drawn_twice_is_the_same_marked_or_drawn_anew(
    entries: int, entry: float, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "_MARKED", largest)
    draw = random.Random(entries)
    tensors = {name: drawn(draw, entries, "BF16") for name in ("base", "one", "two")}
    tensors["two"][entries - 2] = entry
    memory = merge.InMemory("memory", tensors)
    inputs = Inputs((memory.node("one"), memory.node("two")), memory.node("base"))
    settings = {"density": (0.3, 1.0), "rescale": "l1", "elect": "weighted", "seed": 7}
    step = Step(TensorSpec("tensor", "BF16", (entries,)), find("dare"), settings, inputs, ("one", "two"))
    watch = Watch()
    assert compiled(step, part=1 << 16, watch=watch) == by_torch(step)
    watch.settle_inputs()
    assert len(watch.found) == (0 if entry == 0.5 else 1)


def test_steps_inside_steps_are_made_in_fp32_and_cast_once() -> None:
    draw = random.Random(3)
    tensors = {name: drawn(draw, 70000, "BF16") for name in "abc"}
    memory = merge.InMemory("memory", tensors)
    spec = TensorSpec("tensor", "BF16", (70000,))
    inner = Step(spec, find("slerp"), {"t": 0.3}, Inputs((memory.node("a"), memory.node("b"))), ("a", "b"))
    settings = {name: setting.default for name, setting in find("ties").settings.items()}
    outer = Step(
        spec,
        find("ties"),
        {**settings, "density": 0.4},
        Inputs((inner, memory.node("c")), memory.node("a")),
        ("s", "c"),
    )
    assert compiled(outer, part=1 << 16) == by_torch(outer)
    assert compiled(outer, part=1 << 16, keep=0) == by_torch(outer)


def test_steps_that_seek_boundaries_inside_such_steps_do_not_share_what_they_hold() -> None:
    draw = random.Random(4)
    memory = merge.InMemory("memory", {name: drawn(draw, 200001, "BF16") for name in "abcde"})
    spec, settings = TensorSpec("tensor", "BF16", (200001,)), {n: s.default for n, s in find("ties").settings.items()}

    def ties(density: float, *models: Source | Step) -> Step:
        labels = tuple("stuv"[: len(models)])
        return Step(spec, find("ties"), {**settings, "density": density}, Inputs(models, memory.node("a")), labels)

    inner = ties(0.7, *map(memory.node, "bcde"))  # it holds more than the outer one
    outer = ties(0.2, inner, memory.node("b"))
    assert compiled(outer, part=1 << 16) == compiled(outer, part=1 << 16, keep=0) == by_torch(outer)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as it is on machines of other kinds."""
    sources, built = Path(library.__file__).parent.glob("*.c"), tmp_path_factory.mktemp("portable") / "kernels"
    flags = ("-O1", "-std=c11", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden", "-DPORTABLE")
    subprocess.run([os.environ.get("CC", "cc"), *flags, "-o", built, *sources, "-lm"], check=True)
    return built


@pytest.mark.parametrize("name", SETTINGS)
def test_machines_without_wide_vectors_make_the_same_bits(
    name: str, portable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [a_step(name, seed) for seed in range(12)]
    expected = [compiled(step) for step in every]
    monkeypatch.setattr(library, "_FILE", portable)
    library.library.cache_clear()
    try:
        assert [compiled(step) for step in every] == expected
    finally:
        library.library.cache_clear()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_number_survives_the_way_through_fp32(dtype: str) -> None:
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch_dtype(dtype))
    every = every[every.isfinite()]
    memory = merge.InMemory("memory", {"every": every})
    step = Step(
        TensorSpec("tensor", dtype, tuple(every.shape)), find("copy"), {}, Inputs((memory.node("every"),)), ("m",)
    )
    assert compiled(step) == every.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_casts_round_to_nearest_even_as_torch_does(dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (1 << 20,), generator=generator, dtype=torch.int32)
    halfway = (bits & ~0x1FFF) | 0x1000  # between two halves; and between two of bfloat16 where bit 15 is set alone
    values = torch.cat([bits, halfway, (bits & ~0xFFFF) | 0x8000]).view(torch.float32)
    values = values[values.isfinite()]
    memory = merge.InMemory("memory", {"values": values})
    spec = TensorSpec("tensor", dtype, tuple(values.shape))
    step = Step(spec, find("copy"), {}, Inputs((memory.node("values"),)), ("m",))
    assert compiled(step) == values.to(torch_dtype(dtype)).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_comes_out_the_same_with_and_without_the_library(
    name: str,
    tmp_path: Path,
    save_tensors: Callable[[str, Mapping[str, Tensor]], Path],
    without_library: WithoutLibrary,
) -> None:
    from portmanteau.compositions import tensorwise

    draw = random.Random(name)
    tensors = {
        "model.norm.weight": 70,
        "model.layers.0.mlp.up_proj.weight": 130000,
        "model.layers.1.mlp.up_proj.weight": 9,
    }
    names = ("base", "one", "two")[: 3 if name != "copy" else 2]
    folders = {one: save_tensors(one, {k: drawn(draw, size, "BF16") for k, size in tensors.items()}) for one in names}
    models = {one: merge.open(folder) for one, folder in folders.items() if one != "base"}
    base = merge.open(folders["base"]) if find(name).needs_base else None
    made = tensorwise(name, models=models, base=base)
    outs = [merge.build(made, tmp_path / "with", threads=2), merge.build(made, tmp_path / "alone", threads=1)]
    with without_library():
        outs.append(merge.build(made, tmp_path / "without"))
    assert outs[0].outputs == outs[1].outputs == outs[2].outputs


def test_a_merge_with_a_compiled_form_does_not_import_torch(
    tmp_path: Path, save_tensors: Callable[[str, Mapping[str, Tensor]], Path]
) -> None:
    for name in "abc":
        save_tensors(name, {"w": torch.ones(5, dtype=torch.bfloat16), "ids": torch.arange(4)})
    recipe = "merge: {ties: {base: a, models: [b, c]}}"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert heavy_imports("build", "recipe.yaml", "out", cwd=tmp_path) == []
