"""What bottleneck adapters compute: adapters 1.3.0's outputs, and the library itself, which loads our folders.

Tests marked `adapters` run it: by the Python that PORTMANTEAU_ADAPTERS_PYTHON names, or one installed for the session.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertModel

from portmanteau import compositions, merge

SCRIPT = Path(__file__).parent / "oracles" / "adapters_1_3_0.py"
FOLDER = SCRIPT.with_suffix("")
INPUT = torch.tensor([[1, 5, 9, 23, 2, 7], [3, 3, 20, 11, 8, 4]])
NEEDED = ("adapters==1.3.0", "transformers==4.57.6", "huggingface_hub<1", "datasets<4", "accelerate<2", "requests")
Tensors = Mapping[str, Tensor]


def mean(out: Path, weights: Mapping[str, float], name: str) -> Path:
    """Build the mean of some of the library's adapters."""
    adapters = {merge.open_bottleneck(FOLDER / one): weight for one, weight in weights.items()}
    merge.build(compositions.average_adapters(adapters=adapters, name=name), out)
    return out


def stack(out: Path) -> Path:
    """Build the stack of a language and a task adapter."""
    language, task = (merge.open_bottleneck(FOLDER / name) for name in ("swahili", "task"))
    merge.build(compositions.stack_adapters(language=language, task=task), out)
    return out


# ------------------------------------------------------------------------------------------- the forward pass, by torch


def bottleneck(tensors: Tensors, module: str, name: str, activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute up(activation(down(x)))."""
    at = f"bert.{module}.adapters.{name}"
    down = x @ tensors[f"{at}.adapter_down.0.weight"].T + tensors[f"{at}.adapter_down.0.bias"]
    return activation(down) @ tensors[f"{at}.adapter_up.weight"].T + tensors[f"{at}.adapter_up.bias"]


def coupling(tensors: Tensors, name: str, net: str, x: Tensor) -> Tensor:
    """Compute F or G of an invertible adapter."""
    at = f"bert.invertible_adapters.{name}.{net}"
    inner = torch.relu(x @ tensors[f"{at}.0.weight"].T + tensors[f"{at}.0.bias"])
    return inner @ tensors[f"{at}.2.weight"].T + tensors[f"{at}.2.bias"]


def forward(language: Tensors, language_name: str, task: Tensors | None = None) -> Tensor:
    """Run the base model with a seq_bn adapter (relu), and above it, where there is one, a double_seq_bn (swish)."""
    model = BertModel.from_pretrained(FOLDER / "base").eval()

    def after_embeddings(module: torch.nn.Module, _: object, output: Tensor) -> Tensor:
        one, two = output.chunk(2, dim=-1)
        one = one + coupling(language, language_name, "F", two)
        return torch.cat([one, two + coupling(language, language_name, "G", one)], dim=-1)

    def patch(module: torch.nn.Module, path: str, *, has_language: bool) -> None:
        def patched(hidden: Tensor, residual: Tensor) -> Tensor:
            out: Tensor = module.dense(hidden)  # type: ignore[operator]
            if has_language:
                out = out + bottleneck(language, path, language_name, torch.relu, module.LayerNorm(out + residual))  # type: ignore[operator]
            if task is not None:
                out = out + bottleneck(task, path, "task", torch.nn.functional.silu, out)
            return module.LayerNorm(out + residual)  # type: ignore[operator,no-any-return]

        module.forward = patched

    if any("invertible" in key for key in language):
        model.embeddings.register_forward_hook(after_embeddings)
    for i, layer in enumerate(model.encoder.layer):
        patch(layer.output, f"encoder.layer.{i}.output", has_language=True)
        patch(layer.attention.output, f"encoder.layer.{i}.attention.output", has_language=False)
    with torch.no_grad():
        found: Tensor = model(INPUT).last_hidden_state
    return found


def test_the_mean_computes_what_adapters_computes_with_its_own(tmp_path: Path) -> None:
    oracle = load_file(FOLDER / "outputs.safetensors")
    two = load_file(mean(tmp_path / "two", {"first": 0.25, "second": 0.75}, "new") / "adapter.safetensors")
    torch.testing.assert_close(forward(two, "new"), oracle["mean"])
    both = load_file(mean(tmp_path / "both", {"swahili": 3, "quechua": 1}, "new") / "adapter.safetensors")
    torch.testing.assert_close(forward(both, "new"), oracle["languages"])


def test_the_stack_computes_what_adapters_computes(tmp_path: Path) -> None:
    out = stack(tmp_path / "stack")
    language, task = (load_file(out / name / "adapter.safetensors") for name in ("swahili", "task"))
    oracle = load_file(FOLDER / "outputs.safetensors")
    torch.testing.assert_close(forward(language, "swahili", task), oracle["stack"])
    assert (oracle["stack"] - oracle["plain"]).abs().max() > 1  # the adapters matter


# -------------------------------------------------------------------------------------------------- the library, itself


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a Python that has adapters 1.3.0; one made here uses the torch of the running environment."""
    if given := os.environ.get("PORTMANTEAU_ADAPTERS_PYTHON"):
        return Path(given)
    home = tmp_path_factory.mktemp("library") / "environment"
    venv.create(home, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    for part in ("torch", "torchgen", "functorch", "torch-*.dist-info"):
        for found in Path(sysconfig.get_path("purelib")).glob(part):
            (site / found.name).symlink_to(found)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *NEEDED)
    return python


def run(*command: str | Path) -> None:
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def asked(library: Path, folder: Path, questions: Mapping[str, Mapping[str, object]]) -> dict[str, Tensor]:
    """Let the library load folders, and give what the base model computes with them."""
    based = {name: {"base": str(FOLDER / "base"), **asks} for name, asks in questions.items()}
    (folder / "questions.json").write_text(json.dumps(based))
    run(library, SCRIPT, "outputs", folder / "questions.json", folder / "answers.safetensors")
    return load_file(folder / "answers.safetensors")


@pytest.mark.adapters
def test_adapters_loads_our_mean_and_computes_what_it_computes_with_its_own(library: Path, tmp_path: Path) -> None:
    two = mean(tmp_path / "two", {"first": 0.25, "second": 0.75}, "renamed")
    both = mean(tmp_path / "both", {"swahili": 3, "quechua": 1}, "languages")
    questions = {"two": {"adapter": str(two)}, "both": {"adapter": str(both)}}
    answers = asked(library, tmp_path, questions | {"theirs": {"adapter": str(FOLDER / "mean")}})
    assert bytes(answers["two.name"].tolist()) == b"renamed"
    assert torch.equal(answers["two"], answers["theirs"])
    oracle = load_file(FOLDER / "outputs.safetensors")
    torch.testing.assert_close(answers["two"], oracle["mean"])
    torch.testing.assert_close(answers["both"], oracle["languages"])


@pytest.mark.adapters
def test_adapters_loads_our_stack_ready_and_computes_what_its_own_stack_does(library: Path, tmp_path: Path) -> None:
    parts = [str(FOLDER / name) for name in ("swahili", "task")]
    questions = {"ours": {"setup": str(stack(tmp_path / "stack"))}, "theirs": {"stack": parts}}
    answers = asked(library, tmp_path, questions)
    assert torch.equal(answers["ours"], answers["theirs"])
    assert torch.equal(answers["ours.head"], answers["theirs.head"])  # the logits: the task's head is active
    torch.testing.assert_close(answers["ours"], load_file(FOLDER / "outputs.safetensors")["stack"])
