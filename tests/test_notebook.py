"""The API as a notebook shows it: tables, completion, a bar; and the README's Python, run."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.merge.notebook import NotebookProgress, default_progress
from tests.conftest import SaveLlama

ROOT = Path(__file__).parents[1]


def model(label: str, value: float) -> merge.InMemory:
    layers: dict[str, Tensor] = {f"model.layers.{i}.mlp.up.weight": torch.full((2, 2), value) for i in range(4)}
    return merge.InMemory(label, {**layers, "model.norm.weight": torch.full((2,), value)})


def cells(html: str) -> list[list[str]]:
    return [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", html)]


def test_a_checkpoint_is_a_table_of_its_stacks() -> None:
    html = model("math", 1.0)._repr_html_()
    assert "<caption>InMemory math: 5 tensors, 0.0 MB</caption>" in html
    assert cells(html) == [["model.layers", "4", "4", "64 B", "F32"], ["outside the layers", "", "1", "8 B", "F32"]]


def test_a_plan_and_a_receipt_are_short_and_tables(tmp_path: Path) -> None:
    experts = {"task": model("math", 1.0), "language": model("swahili", 2.0)}
    swapped = compositions.layer_swap(**experts, bottom=1, top=1, transition=0)
    plan = merge.make_plan(swapped)
    assert repr(plan) == "<Plan: 5 tensors, reads 72 B, writes 72 B>"
    rows = [["copy", "language", "3", "40 B"], ["copy", "task", "2", "32 B"]]
    assert cells(plan._repr_html_()) == rows
    receipt = merge.build(swapped, tmp_path / "out")
    assert repr(receipt).startswith("<Receipt: 5 tensors of ")
    assert cells(receipt._repr_html_()) == rows


def test_showing_what_a_survey_must_settle_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = compositions.extract_sparse(base=model("base", 1.0), tuned=model("math", 2.0), density=0.5)
    monkeypatch.setattr("portmanteau.merge.surveyed.conduct", lambda *_: pytest.fail("a survey was made"))
    assert cells(sparse._repr_html_()) == [["the 9 largest of 18 changes", "144 B"]]
    assert sparse._ipython_key_completions_() == []
    assert repr(merge.make_plan(sparse)).startswith(
        "<Plan: tensors that a survey will tell, reads 144 B, writes at most"
    )


def test_what_is_shown_is_escaped() -> None:
    html = model("<script>alert(1)</script>", 1.0)._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)" in html


def test_tensor_names_complete_in_brackets() -> None:
    assert model("math", 1.0)._ipython_key_completions_()[-1] == "model.norm.weight"


@dataclass
class Display:
    """What IPython's `display(…, display_id=True)` gives; keeps what was drawn."""

    drawn: list[str] = field(default_factory=list)

    def update(self, html: str) -> None:
        self.drawn.append(html)


@pytest.fixture
def displays(monkeypatch: pytest.MonkeyPatch) -> list[Display]:
    """Pretend to run in a notebook: the two functions of IPython that are used."""
    found: list[Display] = []

    def display(html: str, display_id: bool) -> Display:
        assert display_id
        found.append(Display([html]))
        return found[-1]

    kernel: Any = ModuleType("IPython")
    kernel.get_ipython = lambda: SimpleNamespace(kernel=object())
    shown: Any = ModuleType("IPython.display")
    shown.HTML, shown.display = str, display
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    return found


def test_a_build_in_a_notebook_draws_a_bar_of_its_own(displays: list[Display], tmp_path: Path) -> None:
    merge.build(model("math", 1.0), tmp_path / "out")
    (bar,) = displays
    assert bar.drawn[0] == 'merge <progress value="0" max="72"></progress> 0/5 tensors'
    assert bar.drawn[-1] == 'merge <progress value="72" max="72"></progress> 5/5 tensors'
    assert isinstance(default_progress(), NotebookProgress)


def test_outside_a_notebook_nothing_is_drawn() -> None:
    assert type(default_progress()) is merge.Progress


def test_the_python_of_the_readme_runs(save_llama: SaveLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("math", "swahili", "base")):
        (tmp_path / "models").mkdir(exist_ok=True)
        folder = save_llama(f"models/{name}", seed=seed, num_hidden_layers=10)
        words = Tokenizer(WordLevel({f"word {i}": i for i in range(40)}, unk_token="word 0"))
        words.save(str(folder / "tokenizer.json"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## From Python\n\n```python\n(.*?)```", readme, re.DOTALL)
    assert block
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"deltas": torch.tensor([[4.0, -1.0], [2.0, 5.0]])}
    exec(block[1], names)
    assert names["model"].config.num_hidden_layers == 10
    assert len(merge.open("out")) == len(names["merged"]) == 93  # 9 tensors a layer, and 3 outside
