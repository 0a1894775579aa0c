"""Steps made on another device than the processor: held to a pretended one, by what `tests/elsewhere.py` can show."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from portmanteau import compositions, merge
from portmanteau.merge import Operator, OutputError, TensorSpec, device
from portmanteau.merge.adapters import decomposition
from portmanteau.merge.device import Device, chosen, offered, whole_products
from portmanteau.merge.evaluate import Evaluation, Session
from portmanteau.merge.node import Source
from portmanteau.merge.registry import operators
from portmanteau.merge.rows import FILL, MEAN, ZERO, RowMap, rows_of
from tests.conftest import LLAMA
from tests.elsewhere import PLACE, elsewhere, sent
from tests.test_cli import run
from tests.test_lora import save_adapter
from tests.test_operators import LONG, assert_same_bits, made, mixed, named, smooth, stack_of, step_of, variants

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft calls transformers by an old name
)
ALL = operators()
FURTHER: dict[str, dict[str, Any]] = {  # settings that lead through other lines than the defaults and choices do
    "copy": {"factor": 0.3},
    "sce": {"density": 0.5},
    "emr": {"task": 1},
    "ram": {"r": 0.1},
    "linear": {"weight": (0.3, 0.7, -0.1)},
}
OTHERWISE = {  # operators that are made of more than IEEE 754's operations, and what of
    "arcee_fusion": {"_softmax", "log_"},
    "tsv": {"_linalg_svd", "mm"},
}


@pytest.mark.parametrize("operator", ALL.values(), ids=named)
def test_an_operator_gives_the_same_bits_on_another_device(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    models, base = stack_of(operator, LONG, make=mixed), mixed(LONG, 9)
    for settings in (*variants(operator), FURTHER.get(operator.name, {})):
        for dtype in (torch.float32, torch.float64) if not settings else (torch.float32,):
            step = step_of(operator, models.to(dtype), base.to(dtype), settings)
            here = made(step, Session())
            with elsewhere(monkeypatch) as inexact:
                parts = [values for _, values in Evaluation(Session(1 << 16, device=PLACE)).parts(step)]
            assert all(type(values) is Tensor for values in parts)  # fetched
            assert_same_bits(torch.cat(parts).reshape(LONG), here)
            assert inexact <= OTHERWISE.get(operator.name, set())


RECIPES = {
    "ties: {base: ./base, models: {./math: 0.6, ./swahili: 0.4}, density: 0.3}": set(),
    "nuslerp: {models: [./math, ./swahili], flatten: false}": set(),
    "fisher: {models: [./math, ./swahili], fishers: [./swahili, ./math]}": set(),
    "layer_swap: {base: ./base, task: ./math, language: ./swahili, layers: auto, threshold: 0.5}": set(),
    "layer_swap: {base: ./base, task: ./math, language: ./swahili, layers: auto, by: module}": set(),
    "layer_swap: {base: ./base, task: ./math, language: ./swahili, bottom: 0, top: 1, rescale: mav}": set(),
    "extract_sparse: {base: ./base, tuned: ./math, density: 0.08}": set(),
    "sparse_fine_tune: {base: ./base, diffs: {./sparse: 0.5}}": set(),
    "revert_sparse: {tuned: ./math, base: ./base, diffs: [./sparse]}": set(),
    "lora: {base: ./base, adapters: {./lora: 0.5, ./other: 1.0}}": set(),
    "lora: {base: ./base, adapters: [./dora]}": {"linalg_vector_norm"},
    "lora: {adapters: {./lora: 0.5, ./other: 1.0}, combine: cat}": set(),
    "lora: {adapters: {./lora: 0.5, ./other: 1.0}, combine: svd, rank: 2}": {"mm", "linalg_qr", "_linalg_svd"},
    "lora: {adapters: {./lora: 0.5, ./other: 1.0}, combine: {ties: {}, rank: 2}}": {"mm", "linalg_qr", "_linalg_svd"},
    "extract_lora: {base: ./base, tuned: ./math, rank: 2}": {"mm", "linalg_qr", "_linalg_svd"},
    "extract_lora: {base: ./base, tuned: ./math, energy: 0.3}": {"mm", "linalg_qr", "_linalg_svd", "_linalg_eigh"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a base, two models, three adapters and a sparse fine-tune."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    shape = {**LLAMA, "num_hidden_layers": 2, "hidden_size": 140, "intermediate_size": 150}
    for seed, name in enumerate(("base", "math", "swahili")):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(folder / name)
    for seed, name in enumerate(("lora", "other", "dora")):
        save_adapter(folder / "base", folder / name, seed=seed, r=2, target_modules=["q_proj"], use_dora=seed == 2)
    changed = compositions.extract_sparse(base=opened(folder, "base"), tuned=opened(folder, "math"), density=0.02)
    merge.build(changed, folder / "sparse")
    return folder


def opened(folder: Path, name: str) -> merge.StoredCheckpoint:
    return merge.open(folder / name)


@pytest.mark.parametrize("body", RECIPES)
def test_a_build_gives_the_same_bytes_on_another_device(
    body: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decomposition, "EXACT_UP_TO", 8)  # larger matrices are decomposed approximately
    (models / "recipe.yaml").write_text(f"merge: {{{body}}}", encoding="utf-8")
    composed = [compositions.compose(compositions.load(models / "recipe.yaml")) for _ in range(2)]
    here = merge.build(composed[0], tmp_path / "here", threads=2)
    with elsewhere(monkeypatch) as inexact:
        there = merge.build(composed[1], tmp_path / "there", threads=2, device=PLACE)
    assert there.outputs == here.outputs
    assert inexact == RECIPES[body]
    assert (here.device, there.device) == ("cpu", f"{PLACE}:0")


def test_a_table_of_rows_of_others_is_the_same_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [smooth((4, 3), seed) for seed in (1, 2)]
    stored = merge.InMemory("tables", {"a": tables[0], "b": tables[1]})
    source, row = array("i", [0, 0, ZERO, 1, MEAN, FILL]), array("i", [3, 1, 0, 2, 0, 0])
    owned = array("i", [-1, -1, -1, -1, 0, -1]), array("i", [-1, -1, -1, -1, 3, -1])
    made = rows_of(
        TensorSpec("t", "F32", (6, 3)),
        RowMap(source, row, owned, bytes([1, 1, 0, 0, 0, 0])),
        tuple(map(stored.node, "ab")),
    )
    with elsewhere(monkeypatch) as inexact:
        ((_, there),) = Evaluation(Session(device=PLACE)).parts(made)
    a, b = tables
    fill = (a[3].double() + a[1].double()) / 2
    expected = torch.stack([a[3], a[1], torch.zeros(3), b[2], (a[0] + b[3]) / 2, fill.float()])
    assert torch.equal(there.reshape(6, 3), expected)
    assert inexact == set()


def test_tensors_of_a_model_that_was_trained_elsewhere_are_read_here(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(6.0, dtype=torch.bfloat16)
    with elsewhere(monkeypatch):
        found = merge.InMemory("trained", {"w": sent(tensor)})
        raw = bytearray(4)
        found.read_into("w", memoryview(raw), 2)
        read = found.read("w"), found.read("w", slice(1, 3))
    assert [type(one) for one in read] == [Tensor, Tensor]
    assert torch.equal(read[0], tensor)
    assert raw == tensor[1:3].view(torch.uint8).numpy().tobytes()


# the pretended device itself


@pytest.mark.parametrize(
    ("work", "what"),
    [
        (lambda there: there + torch.ones(3, device="cpu"), "two devices"),
        (lambda there: there[torch.tensor([0], device="cpu")], "two devices"),
        (lambda there: torch.zeros(3), "torch.zeros without a device"),
        (lambda there: there.numpy(), "numpy"),
    ],
)
def test_what_fails_on_a_gpu_fails_there(
    work: Callable[[Tensor], Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = sent(torch.ones(3))
    with elsewhere(monkeypatch), pytest.raises((AssertionError, RuntimeError), match=what):
        work(there)


def test_what_has_other_bits_on_a_gpu_has_them_there(monkeypatch: pytest.MonkeyPatch) -> None:
    values, expected = torch.tensor([5.0, 7.0, 10.0]), torch.tensor([5.0, 7.0, 10.0]) * (1 / torch.tensor(3.0))
    assert not torch.equal(values / 3, expected)  # 5/3 and 5 · 0.33333334
    with elsewhere(monkeypatch) as inexact:
        divided = (sent(values) / 3).cpu()
        assert inexact == set()
        sent(values).sum()
    assert torch.equal(divided, expected)
    assert inexact == {"sum"}


# which devices there are, and the ways of CUDA, which cannot be gone here


@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "", "gpu"])
def test_a_device_that_is_not_there_is_refused_before_any_work(
    name: str, tmp_path: Path, save_tensors: Callable[[str, Mapping[str, Tensor]], Path]
) -> None:
    model = merge.open(save_tensors("model", {"w": torch.ones(2)}))
    with pytest.raises(OutputError, match=f"there is no '{name}' to compute on: torch .* offers cpu here"):
        merge.build(model, tmp_path / "new" / "out", device=name)
    assert not (tmp_path / "new").exists()


def test_the_command_line_says_what_there_is_to_compute_on(models: Path, tmp_path: Path) -> None:
    (models / "swap.yaml").write_text("merge: {linear: {models: [./math, ./swahili]}}", encoding="utf-8")
    done = run("build", models / "swap.yaml", tmp_path / "out", "--device", "cuda")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        f"--device: there is no 'cuda' to compute on: torch {torch.__version__} offers cpu here",
        "  hint: a GPU needs its driver and a build of torch for CUDA or ROCm",
    ]
    assert run("build", models / "swap.yaml", tmp_path / "out", "--device", "cpu").returncode == 0


def test_a_gpu_whose_memory_is_full_is_no_traceback() -> None:
    with pytest.raises(OutputError) as caught, Device("cuda:1").enough_room():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
    assert str(caught.value).splitlines() == [
        "--device: the memory of cuda:1 is full",
        "  hint: work on less at once: --threads 1, or a smaller --memory",
    ]


def test_the_first_gpu_needs_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert offered() == ("cpu", "cuda:0", "cuda:1")
    assert [chosen(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:0", "cuda:1"]


class _Calls(TorchFunctionMode):
    """Notes what is asked of CUDA, and does it on the processor."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, ...]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.pop("pin_memory", False):
            self.made.append(("pinned", str(args[0])))
        if function is Tensor.to and str(args[1]).startswith("cuda"):
            self.made.append(("sent", args[1], "without waiting" if kwargs.get("non_blocking") else "waiting"))
            return args[0].clone()
        if function is Tensor.copy_:
            self.made.append(("fetched", "without waiting" if kwargs.get("non_blocking") else "waiting"))
        return function(*args, **kwargs)


def test_cuda_is_sent_parts_from_pinned_memory_and_waited_for_when_they_come_back() -> None:
    source = merge.InMemory("model", {"w": torch.arange(6.0).reshape(2, 3)}).node("w")
    assert isinstance(source, Source)
    with _Calls() as calls:
        there = Device("cuda:0").read(source, slice(1, 5))
        here = Device("cuda:0").fetched(there)
        whole = Device("cuda:0").read(source)
    assert calls.made == [
        *(("pinned", "(16,)"), ("sent", "cuda:0", "without waiting")),
        *(("pinned", "(4,)"), ("fetched", "waiting")),
        *(("pinned", "(24,)"), ("sent", "cuda:0", "without waiting")),
    ]
    assert here.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert torch.equal(whole, torch.arange(6.0).reshape(2, 3))


def test_every_thread_has_one_stream_of_its_own_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(device, "_own", threading.local())
    monkeypatch.setattr(torch.cuda, "Stream", lambda name: made.append(name) or f"stream {len(made)} of {name}")
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    used = [Device(name).own_stream().__enter__() for name in ("cuda:0", "cuda:1", "cuda:0")]
    assert used == ["stream 1 of cuda:0", "stream 2 of cuda:1", "stream 1 of cuda:0"]
    with Device("cpu").own_stream() as nothing:
        assert nothing is None


@pytest.mark.parametrize("asked", ["highest", "medium"])
def test_products_of_matrices_are_not_rounded_to_fewer_bits(asked: str) -> None:
    torch.set_float32_matmul_precision(asked)
    try:
        with whole_products():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision("highest")
