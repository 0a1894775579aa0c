"""Builds: exact arithmetic, the same bytes whatever the machine, and nothing left behind when they fail."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import blake3
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.compositions import tensorwise
from portmanteau.merge import Checkpoint, Composed, MergeError, OutputError, Progress, Step, TensorSpec
from portmanteau.merge.adapters.decomposition import Factors, OfMatrix, factors
from portmanteau.merge.limits import Limits
from portmanteau.merge.node import Made, Read
from portmanteau.merge.registry import find

SaveTensors = Callable[[str, Mapping[str, Tensor]], Path]
MB = 1 << 20


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """One tensor larger than a part, small ones of other dtypes, and a counter that all models share."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "embed.weight": torch.randn(300, 701, generator=generator).to(dtype),
        **{f"layers.{i}.w.weight": torch.randn(40, 30, generator=generator).to(dtype) for i in range(4)},
        "norm.weight": torch.randn(30, generator=generator),
        "scale": torch.tensor(float(seed)),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "ids": torch.arange(7),
    }


@pytest.fixture
def three(save_tensors: SaveTensors) -> dict[str, Path]:
    """A base and two models."""
    return {name: save_tensors(name, tensors(seed)) for seed, name in enumerate(("base", "a", "b"))}


def ties_of(three: Mapping[str, Path]) -> Composed:
    models: dict[str, Checkpoint] = {name: merge.open(three[name]) for name in ("a", "b")}
    return tensorwise("ties", models=models, base=merge.open(three["base"]), settings={"density": 0.3})


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors*"))}


def values(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# the same bytes


def test_threads_and_memory_change_no_byte(three: dict[str, Path], tmp_path: Path) -> None:
    merged, found = ties_of(three), []
    for i, (threads, memory) in enumerate([(1, 256 * MB), (2, 8 * MB), (8, 32 * MB), (8, 256 * MB), (1, 8 * MB)]):
        merge.build(merged, tmp_path / f"out{i}", threads=threads, memory=memory, shard_size=300_000)
        found.append(weights(tmp_path / f"out{i}"))
    assert all(one == found[0] for one in found)
    assert len(found[0]) == 4  # what comes before the large tensor, it, what comes after, and the index


def test_the_hash_seed_changes_no_byte(three: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from portmanteau import merge; from portmanteau.compositions import tensorwise\n"
        "base, a, b = map(merge.open, sys.argv[1:4])\n"
        "for name in ('dare', 'ties'):\n"
        "    merge.build(tensorwise(name, models={'a': a, 'b': b}, base=base), f'{sys.argv[4]}/{name}')"
    )
    found = []
    for seed in ("1", "2"):
        run = [sys.executable, "-c", code, *map(str, three.values()), str(tmp_path / seed)]
        subprocess.run(run, check=True, timeout=120, env={**os.environ, "PYTHONHASHSEED": seed})
        found.append({name: weights(tmp_path / seed / name) for name in ("dare", "ties")})
    assert found[0] == found[1]


def test_a_tensor_made_alone_is_the_one_that_a_build_writes(three: dict[str, Path], tmp_path: Path) -> None:
    merged = ties_of(three)
    merge.build(merged, tmp_path / "out")
    for name, tensor in values(tmp_path / "out").items():
        assert (merged[name].dtype, merged[name].shape) == (tensor.dtype, tensor.shape)
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=0)
        torch.testing.assert_close(merged.read(name, slice(1, 9)), tensor.reshape(-1)[1:9], rtol=0, atol=0)


def test_too_little_memory_is_refused_with_what_is_needed(three: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"--memory: 1\.0 MB is too small: this plan needs \d"):
        merge.build(ties_of(three), tmp_path / "out", memory=1_000_000)
    assert "out" not in listing(tmp_path)


# arithmetic


def bits(*values: float, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {"x": torch.tensor(values, dtype=dtype)}


def test_a_mean_is_taken_in_fp32_and_cast_once(save_tensors: SaveTensors, tmp_path: Path) -> None:
    """The mean of 256, 1, 1.5 and 1.5 is 65. A sum in bf16, where 256 + 1 is 256, would be less."""
    models = {f"m{i}": merge.open(save_tensors(f"m{i}", bits(v))) for i, v in enumerate((256.0, 1.0, 1.5, 1.5))}
    merge.build(tensorwise("linear", models=models), tmp_path / "out")
    assert values(tmp_path / "out")["x"].tolist() == [65.0]


def test_a_step_inside_a_step_is_not_rounded_between(save_tensors: SaveTensors, tmp_path: Path) -> None:
    """With u = 2⁻⁷, the last place of bf16 at 1: mean(mean(1, 1 + u), 1 + u) = 1 + 3u/4, nearest to 1 + u.

    Rounded between, mean(1, 1 + u) = 1 + u/2 goes to 1, and mean(1, 1 + u) to 1 again.
    """
    u = 2.0**-7
    a, b, c = (merge.open(save_tensors(name, bits(x))) for name, x in (("a", 1.0), ("b", 1 + u), ("c", 1 + u)))
    inner = tensorwise("linear", models={"a": a, "b": b})
    assert inner["x"].tolist() == [1.0]
    outer = tensorwise("linear", models={"inner": inner, "c": c})
    assert outer["x"].tolist() == [1 + u]
    merge.build(outer, tmp_path / "out")
    assert values(tmp_path / "out")["x"].tolist() == [1 + u]


def test_a_base_made_on_the_way_is_not_rounded(save_tensors: SaveTensors, tmp_path: Path) -> None:
    """The base is mean(1, 1 + u) = 1 + u/2 and the task vector to 1 + u is u/2: the base plus thrice it is 1 + 2u.

    From a base rounded to 1 the vector would be u, and the result 1 + 3u.
    """
    u = 2.0**-7
    a, b = (merge.open(save_tensors(name, bits(x))) for name, x in (("a", 1.0), ("b", 1 + u)))
    base = tensorwise("linear", models={"a": a, "b": b})
    merged = tensorwise("task_arithmetic", models={"b": b}, base=base, settings={"scale": 3.0})
    merge.build(merged, tmp_path / "out")
    assert values(tmp_path / "out")["x"].tolist() == [1 + 2 * u]


def test_fp64_stays_fp64(save_tensors: SaveTensors, tmp_path: Path) -> None:
    low, high = bits(1.0, dtype=torch.float64), bits(1 + 2.0**-50, dtype=torch.float64)
    models = {name: merge.open(save_tensors(name, x)) for name, x in (("low", low), ("high", high))}
    merge.build(tensorwise("linear", models=models), tmp_path / "out")
    assert values(tmp_path / "out")["x"].tolist() == [1 + 2.0**-51]


@pytest.mark.parametrize(
    ("one", "other", "result"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.float32, torch.float64, torch.float64),
        (torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e4m3fn),
    ],
)
def test_mixed_dtypes_give_one_that_holds_both(
    one: torch.dtype, other: torch.dtype, result: torch.dtype, save_tensors: SaveTensors, tmp_path: Path
) -> None:
    models = {n: merge.open(save_tensors(n, bits(v, dtype=d))) for n, v, d in (("a", 1.0, one), ("b", 2.0, other))}
    merge.build(tensorwise("linear", models=models), tmp_path / "out")
    found = values(tmp_path / "out")["x"]
    assert (found.dtype, found.float().tolist()) == (result, [1.5])


def test_the_output_dtype_is_that_asked_for_and_integers_stay(three: dict[str, Path], tmp_path: Path) -> None:
    merge.build(merge.open(three["a"]), tmp_path / "out", dtype="float16")
    found, expected = values(tmp_path / "out"), load_file(three["a"] / "model.safetensors")
    assert torch.equal(found.pop("ids"), torch.arange(7))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].to(torch.float16), rtol=0, atol=0)


# the receipt


def test_the_digests_are_those_of_the_bytes_that_the_library_reads(three: dict[str, Path], tmp_path: Path) -> None:
    receipt = merge.build(ties_of(three), tmp_path / "out", shard_size=300_000)
    written = json.loads((tmp_path / "out" / "portmanteau.json").read_text())
    found = values(tmp_path / "out")
    assert found.keys() == receipt.outputs.keys()
    for name, tensor in found.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert written["outputs"][name] == receipt.outputs[name] == blake3.blake3(raw).hexdigest()


def test_the_receipt_names_the_inputs_by_header_digest(three: dict[str, Path], tmp_path: Path) -> None:
    receipt = merge.build(ties_of(three), tmp_path / "out")
    assert {Path(entry["checkpoint"]).name for entry in receipt.inputs} == {"base", "a", "b"}
    for entry in receipt.inputs:
        raw = (Path(entry["checkpoint"]) / "model.safetensors").read_bytes()
        header = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
        (file,) = entry["files"]
        assert (file["file"], file["bytes"]) == ("model.safetensors", len(raw))
        assert file["header"] == blake3.blake3(header).hexdigest()


def test_the_receipt_keeps_the_seeds_of_inner_steps_too(three: dict[str, Path], tmp_path: Path) -> None:
    base, a, b = (merge.open(path) for path in three.values())
    inner = tensorwise("dare", models={"a": a}, base=base, settings={"seed": 5})
    outer = tensorwise("dare", models={"inner": inner, "b": b}, base=base, settings={"seed": 9})
    assert set(merge.build(outer, tmp_path / "out").seeds) == {5, 9}


# nothing left behind


def failing(merged: Composed, name: str, error: BaseException) -> Composed:
    """Make the step of one tensor raise."""

    def fail(*_: object, **__: object) -> Tensor:
        raise error

    nodes = {n: merged.node(n) for n in merged}
    step = nodes[name]
    assert isinstance(step, Step)
    broken = replace(find("linear"), apply=fail, compiled=None)
    return Composed("failing", {**nodes, name: replace(step, operator=broken, settings={})}, merged.companions)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("error", [MergeError("", "no"), RuntimeError("broken"), MemoryError(), KeyboardInterrupt()])
def test_a_step_that_fails_leaves_nothing(
    error: BaseException, threads: int, three: dict[str, Path], tmp_path: Path
) -> None:
    before = listing(tmp_path)
    with pytest.raises(type(error)):
        merge.build(failing(ties_of(three), "layers.2.w.weight", error), tmp_path / "out", threads=threads)
    assert listing(tmp_path) == before
    assert not any(thread.name.startswith("merge") for thread in threading.enumerate())


def test_a_failure_names_tensor_operator_and_models(three: dict[str, Path], tmp_path: Path) -> None:
    broken = failing(ties_of(three), "layers.2.w.weight", MergeError("", "cannot be", "do otherwise"))
    with pytest.raises(MergeError) as caught:
        merge.build(broken, tmp_path / "out")
    assert "tensor layers.2.w.weight of " in str(caught.value)
    assert str(three["a"]) in str(caught.value)
    assert "linear: cannot be\n  hint: do otherwise" in str(caught.value)


def test_integers_that_differ_stop_the_build_and_leave_nothing(save_tensors: SaveTensors, tmp_path: Path) -> None:
    folders = [save_tensors(name, {"w": torch.ones(4), "ids": torch.tensor(ids)}) for name, ids in (("a", 1), ("b", 2))]
    merged = tensorwise("linear", models={path.name: merge.open(path) for path in folders})
    with pytest.raises(MergeError, match=r"tensor ids of .*: equal: the models differ here\n  hint: choose one"):
        merge.build(merged, tmp_path / "out", threads=1)  # two could finish the other tensor first, which is then kept
    assert listing(tmp_path) == {"a", "b"}


def test_an_interrupt_from_the_keyboard_keeps_what_is_finished(three: dict[str, Path], tmp_path: Path) -> None:
    once = threading.Semaphore(1)  # a second interrupt could come when the build is over

    class Interrupting(Progress):
        def advance(self, nbytes: int, tensors: int = 0) -> None:
            if tensors and once.acquire(blocking=False):
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    before = listing(tmp_path)
    with pytest.raises(KeyboardInterrupt) as caught:
        merge.build(ties_of(three), tmp_path / "out", threads=2, progress=Interrupting())
    assert listing(tmp_path) == {*before, ".out.portmanteau-partial"}
    assert "the same command continues, with --fresh it starts anew" in caught.value.__notes__[0]
    assert merge.build(ties_of(three), tmp_path / "out").outcome == "continued"
    assert listing(tmp_path) == {*before, "out"}


def test_torchs_threads_are_given_back(three: dict[str, Path], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    merge.build(ties_of(three), tmp_path / "out")
    with pytest.raises(RuntimeError):
        merge.build(failing(ties_of(three), "scale", RuntimeError()), tmp_path / "other")
    assert torch.get_num_threads() == before


def test_inputs_are_not_touched(three: dict[str, Path], tmp_path: Path) -> None:
    def state() -> dict[Path, tuple[str, int]]:
        files = [path for folder in three.values() for path in folder.iterdir()]
        return {p: (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns) for p in files}

    before = state()
    merge.build(ties_of(three), tmp_path / "out")
    assert state() == before


def test_progress_counts_every_byte_and_tensor(three: dict[str, Path], tmp_path: Path) -> None:
    lock, counted, begun = threading.Lock(), [0, 0], list[tuple[Any, ...]]()

    class Counting(Progress):
        def begin(self, title: str, nbytes: int, tensors: int) -> None:
            begun.append((title, nbytes, tensors))

        def advance(self, nbytes: int, tensors: int = 0) -> None:
            with lock:
                counted[0] += nbytes
                counted[1] += tensors

    merged = ties_of(three)
    merge.build(merged, tmp_path / "out", progress=Counting())
    assert begun == [("merge", merged.nbytes, len(merged))]
    assert counted == [merged.nbytes, len(merged)]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_survey_tells_what_it_has_read_while_it_reads(
    save_tensors: SaveTensors, tmp_path: Path, threads: int
) -> None:
    shapes = {"x": (700, 900), "y": (500, 800), "z": ()}
    for seed, label in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        save_tensors(label, {name: torch.randn(shape) for name, shape in shapes.items()})
    lock, told = threading.Lock(), list[tuple[str, int, int]]()

    class Telling(Progress):
        def begin(self, title: str, nbytes: int, tensors: int) -> None:
            told.append((title, nbytes, tensors))

        def advance(self, nbytes: int, tensors: int = 0) -> None:
            with lock:
                told.append((told[-1][0], nbytes, tensors))

    base, tuned = (merge.open(tmp_path / label) for label in ("base", "tuned"))
    taken = compositions.extract_sparse(base=base, tuned=tuned, count=1000)  # its survey goes through several times
    merge.build(taken, tmp_path / "out", threads=threads, memory=20 << 20, progress=Telling())
    title, nbytes, surveys = told[0]
    steps = [(read, done) for name, read, done in told[1:] if name == title]
    steps = steps[: 1 + next(i for i, (_, done) in enumerate(steps) if done)]
    assert (title, nbytes, surveys) == ("survey", base.nbytes + tuned.nbytes, 1)
    assert sum(read for read, _ in steps) == nbytes
    assert all(0 <= read < nbytes / 3 for read, _ in steps)
    assert [done for _, done in steps] == [0] * (len(steps) - 1) + [1]


def test_an_input_cut_short_under_way_is_named_and_nothing_is_left(save_tensors: SaveTensors, tmp_path: Path) -> None:
    folder = save_tensors("in", {"x": torch.ones(1000)})
    opened = merge.open(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(merge.CheckpointError, match="tensor x: cannot be read"):
        merge.build(opened, tmp_path / "out")
    assert listing(tmp_path) == {"in"}


@dataclass(frozen=True)
class _Counting:
    """Decomposes a matrix, and writes down on which thread."""

    threads: list[int]
    rank: int = 1

    def __call__(self, read: Read) -> Factors:
        self.threads.append(threading.get_ident())
        return OfMatrix("m", 1)(read)


def two_factors(save_tensors: SaveTensors, held: int) -> tuple[Composed, list[list[int]]]:
    """Make A and B of each of three matrices."""
    weights = merge.open(save_tensors("m", {f"m{i}": torch.rand(4, 3) for i in range(3)}))
    nodes: dict[str, Made] = {}
    asked: list[list[int]] = []
    for name in weights:
        asked.append([])
        specs = TensorSpec("", "F32", (1, 3)), TensorSpec("", "F32", (4, 1))
        a, b = factors(*specs, _Counting(asked[-1]), [weights.node(name)], held)
        nodes |= {f"a.{name}": a, f"b.{name}": b}
    return Composed("factors", nodes, weights.companions), asked


def test_what_tensors_share_is_computed_once_for_all(save_tensors: SaveTensors, tmp_path: Path) -> None:
    made, asked = two_factors(save_tensors, held=0)
    merge.build(made, tmp_path / "out", threads=2)
    assert [len(threads) for threads in asked] == [1, 1, 1]
    merge.build(made, tmp_path / "out", threads=2, force=True)
    assert [len(threads) for threads in asked] == [2, 2, 2]  # nothing is kept from build to build


def test_what_makers_hold_limits_the_threads(save_tensors: SaveTensors) -> None:
    for held, threads in ((0, 4), (100 << 20, 2), (1 << 30, 1)):
        plan = merge.make_plan(two_factors(save_tensors, held)[0])
        limits = Limits(threads=4, memory=256 << 20)
        assert limits.session(plan)[0] == threads
        assert limits.in_flight(plan) >= threads * held
        shutil.rmtree(next(iter(plan.checkpoints)).files[0].path.parent)
