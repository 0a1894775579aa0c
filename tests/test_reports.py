"""Where layers come from, and the reports of builds and comparisons: strips, pages, and the commands that show them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.compositions.reports import built, maps, page
from portmanteau.compositions.terminal import pictures
from portmanteau.merge.origins import Cell, Origin, Strip, strips
from tests.conftest import SaveLlama

COMMAND = str(Path(sys.executable).with_name("portmanteau"))
Save = Callable[[str, Mapping[str, Tensor]], Path]
EVIL = "<script>alert(1)</script>\"'&"
VOID = {"meta", "br", "rect"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


class Reader(HTMLParser):
    """Reads a page strictly: every element closed in order; gathers attributes and the text of elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value) for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.append((self.open[-1], data))

    @property
    def said(self) -> list[str]:
        """What the cells of pictures say; the first title is the page's."""
        return [data for tag, data in self.texts if tag == "title"][1:]

    def values(self, tag: str, key: str) -> list[str | None]:
        return [value for own, name, value in self.attributes if (own, name) == (tag, key)]


def layered(value: float, stacks: tuple[str, ...] = ("model.layers",), count: int = 4) -> dict[str, Tensor]:
    made = {"model.embed_tokens.weight": torch.full((4, 2), value)}
    for stack in stacks:
        for i in range(count):
            made[f"{stack}.{i}.mlp.up_proj.weight"] = torch.full((2, 2), value)
            made[f"{stack}.{i}.self_attn.q_proj.weight"] = torch.full((2, 2), value)
    made["model.norm.weight"] = torch.full((2,), value)
    made["lm_head.weight"] = torch.full((4, 2), value)
    return made


@pytest.fixture
def swap(save_tensors: Save, tmp_path: Path) -> Path:
    """Write a layer swap of two models of four layers: bottom one, one transition, the rest the task's."""
    save_tensors("task", layered(1.0))
    save_tensors("language", layered(2.0))
    recipe = tmp_path / "swap.yaml"
    recipe.write_text("merge: {layer_swap: {task: task, language: language, bottom: 1, top: 0, transition: 1}}\n")
    return recipe


def shown(found: tuple[Strip, ...]) -> list[tuple[str, list[str]]]:
    return [(strip.stack, [f"{cell.name}={cell}" for cell in strip.cells]) for strip in found]


# --------------------------------------------------------------------------------------------------------------- strips


def test_a_swap_shows_each_layers_model_between_its_ends(swap: Path) -> None:
    made = merge.make_plan(compositions.compose(compositions.load(swap)))
    assert shown(strips(made.steps)) == [
        (
            "model.layers",
            [
                "embeddings=language",
                "0=language",
                "1=language × task",
                "2=task",
                "3=task",
                "norm=language",
                "head=language",
            ],
        )
    ]


def test_modules_of_one_layer_may_lie_side_by_side(swap: Path) -> None:
    swap.write_text(
        "merge: {layer_swap: {task: task, language: language, bottom: 1, top: 0, transition: 0, "
        "modules: {attention: {bottom: 2}}}}\n"
    )
    (strip,) = strips(merge.make_plan(compositions.compose(compositions.load(swap))).steps)
    assert str(strip.cells[2]) == "task | language"
    assert not strip.cells[2].is_blend


def test_every_stack_has_its_ends(save_tensors: Save) -> None:
    names = ["shared.weight", "encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight", "lm_head.weight"]
    names += [f"{side}.block.{i}.layer.0.wi.weight" for side in ("encoder", "decoder") for i in range(2)]
    stored = merge.open(save_tensors("t5", {name: torch.ones(2, 2) for name in names}), label="t5")
    found = {strip.stack: [cell.name for cell in strip.cells] for strip in strips(merge.make_plan(stored).steps)}
    assert found == {"encoder.block": ["embeddings", "0", "1", "norm"], "decoder.block": ["0", "1", "norm", "head"]}


def test_nested_steps_show_the_stored_models(save_tensors: Save, tmp_path: Path) -> None:
    for name in "abc":
        save_tensors(name, layered(1.0))
    recipe = tmp_path / "nested.yaml"
    recipe.write_text(
        "steps: {soup: {linear: {models: [./a, ./b]}}}\n"
        "merge: {layer_swap: {task: soup, language: ./c, bottom: 1, top: 0, transition: 0}}\n"
    )
    (strip,) = strips(merge.make_plan(compositions.compose(compositions.load(recipe))).steps)
    assert [cell.models for cell in strip.cells[1:3]] == [("./c",), ("./a", "./b")]


def test_what_a_survey_chose_is_in_the_receipt(save_llama: SaveLlama, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "task", "language")):
        save_llama(name, seed=seed)
    recipe = tmp_path / "auto.yaml"
    recipe.write_text(
        "merge: {layer_swap: {task: ./task, language: ./language, base: ./base, layers: auto, threshold: 0}}\n"
    )
    composed = compositions.compose(compositions.load(recipe))
    assert str(strips(merge.make_plan(composed).steps)[0].cells[1]) != "./task"  # not known yet: both
    receipt = merge.build(composed, tmp_path / "out")
    (chosen,) = receipt.surveys.values()
    cells = {cell.name: {origin.models for origin in cell.origins} for cell in receipt.layers[0].cells}
    for layer, weights in chosen.items():
        assert (("./language",) if tuple(weights) == (1.0, 0.0) else ("./task",)) in cells[layer]


# -------------------------------------------------------------------------------------------------------------- plan


def test_plan_draws_the_layers_where_asked_and_never_unasked_into_a_pipe(swap: Path) -> None:
    lines = run("plan", swap, "--picture").stdout.splitlines()
    at = lines.index("model.layers")
    assert lines[at + 1].split() == ["emb", "0", "1", "2", "3", "norm", "head"]
    assert lines[at + 2].split() == ["A", "A", "A×B", "B", "B", "A", "A"]
    assert lines[at + 3].startswith("A language   B task")
    assert "A×B" not in run("plan", swap).stdout
    assert "\x1b" not in "".join(lines)


def test_more_layers_than_fit_go_into_lines_below() -> None:
    strip = Strip("h", tuple(Cell(str(i), (Origin(("a",), "copy", 1, 4),)) for i in range(50)))
    lines = [line.plain for line in pictures.strip_lines([strip], 40)]
    assert all(len(line) <= 40 for line in lines)
    assert " ".join(lines).split().count("A") == 51  # fifty cells and the legend


def test_json_of_a_plan_holds_the_layers(swap: Path) -> None:
    (strip,) = json.loads(run("plan", swap, "--json").stdout)["layers"]
    assert strip["cells"][2] == {
        "name": "1",
        "origins": [{"models": ["language", "task"], "operator": "linear", "tensors": 2, "nbytes": 32}],
    }


# --------------------------------------------------------------------------------------------------------------- pages


def policy_holds(text: str) -> None:
    """Hold a page to its promise: nothing from elsewhere, and only the style and script that the policy names."""
    assert not re.search(r"""(src|href|action|style)\s*=|url\(|@import|https?:""", text.replace("style-src", ""))
    read = Reader(text)
    assert read.values("meta", "http-equiv") == ["Content-Security-Policy"]
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    assert [tag for tag, _ in read.texts].count("script") == 1


@pytest.fixture
def experts(save_tensors: Save) -> compositions.Comparison:
    """Compare two experts whose tensors, layers and labels have hostile names."""
    base = {f"h.{i}.{EVIL}.weight": torch.full((3, 2), 1.0) for i in range(3)}
    folders = [
        save_tensors(name, {key: t + (0.5 if ".1." in key else sign) for key, t in base.items()})
        for name, sign in (("one", 0.25), ("two", -0.125))
    ]
    opened = [merge.open(folder, label=f"{EVIL}{i}") for i, folder in enumerate(folders)]
    return compositions.compare(opened, merge.open(save_tensors("base", base), label="base"), ranks="exact")


def test_a_page_holds_nothing_of_strangers_but_text(experts: compositions.Comparison) -> None:
    text = page.of_comparison(experts)
    policy_holds(text)
    assert "<script>alert" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert any("<script>alert(1)</script>\"'&" in data for tag, data in Reader(text).texts if tag == "h2")


def test_every_cell_can_be_reached_and_says_its_value_which_the_table_repeats(experts: compositions.Comparison) -> None:
    read = Reader(page.of_comparison(experts))
    cells = [says for says in read.said if says.startswith("layer 1,")]
    # relative change and rank of both; then cosine, sign conflicts, top 1 % of the pair
    assert [says.rpartition(": ")[2] for says in cells] == ["50 %", "50 %", "50 %", "50 %", "1.000", "0 %", "100 %"]
    assert len(read.values("g", "tabindex")) == 3 * 7
    assert read.values("g", "tabindex").count("0") == 7  # one stop of Tab for each picture
    said = [data for tag, data in read.texts if tag == "td"]
    assert {"25 %", "12.5 %", "-1.000", "100 %"} <= set(said)


def test_a_page_is_the_same_every_time(experts: compositions.Comparison) -> None:
    assert page.of_comparison(experts) == page.of_comparison(experts)


def test_many_experts_of_a_mixture_are_one_row(save_tensors: Save) -> None:
    base = {f"h.{i}.mlp.experts.{e}.w1.weight": torch.ones(2, 2) for i in range(2) for e in range(41)}
    expert = {name: tensor + (1.0 if ".40." in name else 0.0) for name, tensor in base.items()}
    found = compositions.changes(merge.open(save_tensors("e", expert)), merge.open(save_tensors("b", base)))
    (one,) = maps.of_changes(found)
    assert one.modules == ("mlp.experts.*.w1",)
    assert one.values == ((1 / 41, 1 / 41),)


# -------------------------------------------------------------------------------------------------------------- builds


def test_report_shows_a_finished_build_and_its_parents(swap: Path, tmp_path: Path) -> None:
    assert run("build", swap, tmp_path / "out").returncode == 0
    done = run("report", tmp_path / "out", "--html", tmp_path / "r.html", "--changes", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert [one["base"] for one in found["changes"]] == ["language", "task"]
    # of the task: layer 0 and the ends are 2, layer 1 is 1.5, all of a base of ones; of the language: 1.5 and 1 of 2
    assert [row["relative"] for row in found["changes"][1]["layers"]] == [1.0, 0.5, 0.0, 0.0, 1.0]
    assert [row["relative"] for row in found["changes"][0]["layers"]] == [0.0, 0.25, 0.5, 0.5, 0.0]
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    policy_holds(text)
    receipt = json.loads((tmp_path / "out" / "portmanteau.json").read_text())
    said = [data for _, data in Reader(text).texts]
    assert {*receipt["outputs"].values(), receipt["recipe"]["digest"]} <= set(said)
    assert receipt["recipe"]["text"] in said
    assert "layer 1: language × task (linear, 2 tensors, 32 B)" in Reader(text).said


def test_report_draws_and_lists_what_was_done(swap: Path, tmp_path: Path) -> None:
    run("build", swap, tmp_path / "out")
    done = run("report", tmp_path / "out", "--picture")
    assert done.returncode == 0
    assert "A×B" in done.stdout
    assert re.search(r"linear +language, task +weight=\[0\.5, 0\.5\]", done.stdout)
    assert not (tmp_path / "report.html").exists()


def test_parents_are_found_after_all_are_moved_together_and_missing_ones_said(swap: Path, tmp_path: Path) -> None:
    merge.build(compositions.compose(compositions.load(swap)), tmp_path / "out")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("out", "task"):
        (tmp_path / name).rename(elsewhere / name)
    found, notes = built.changes_from_parents(built.read(elsewhere / "out"))
    assert [one.base for one in found] == ["task"]
    assert [note.split(" at ")[0] for note in notes if "not compared" in note] == [
        "not compared with language: is no longer"
    ]


def test_a_parent_that_was_saved_again_is_noted(swap: Path, save_tensors: Save, tmp_path: Path) -> None:
    merge.build(compositions.compose(compositions.load(swap)), tmp_path / "out")
    (tmp_path / "task").rename(tmp_path / "old")
    save_tensors("task", {name: tensor.bfloat16() for name, tensor in layered(1.0).items()})
    _, notes = built.changes_from_parents(built.read(tmp_path / "out"))
    assert "task: model.safetensors changed since the build" in notes


def test_a_receipt_names_no_place_outside_the_way_from_the_result(swap: Path, tmp_path: Path) -> None:
    receipt = merge.build(compositions.compose(compositions.load(swap)), tmp_path / "deep" / "out")
    assert [one["folder"] for one in receipt.inputs] == ["../../language", "../../task"]


def test_a_folder_without_receipt_and_a_damaged_receipt_are_refused(swap: Path, tmp_path: Path) -> None:
    done = run("report", tmp_path / "task")
    assert (done.returncode, "holds no receipt" in done.stderr, "inspect" in done.stderr) == (1, True, True)
    run("build", swap, tmp_path / "out")
    for text in ("[]", '{"outputs": 3}', "{", '{"recipe": {"text": 5}}'):
        (tmp_path / "out" / "portmanteau.json").write_text(text)
        done = run("report", tmp_path / "out")
        assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False)


def test_a_report_without_changes_reads_no_weights_and_imports_no_torch(swap: Path, tmp_path: Path) -> None:
    merge.build(compositions.compose(compositions.load(swap)), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    program = (
        "import sys; from portmanteau.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers'}.intersection(sys.modules)"
    )
    command = [sys.executable, "-c", program, "report", tmp_path / "out", "--html", tmp_path / "r.html"]
    subprocess.run(command, capture_output=True, check=True, timeout=60)


def test_an_existing_page_is_left_alone_unless_forced(swap: Path, tmp_path: Path) -> None:
    run("build", swap, tmp_path / "out")
    file = tmp_path / "mine.html"
    file.write_text("mine")
    for command in (["report", tmp_path / "out"], ["diff", tmp_path / "task", tmp_path / "language"]):
        done = run(*command, "--html", file)
        assert (done.returncode, done.stdout, file.read_text()) == (1, "", "mine")
    assert run("report", tmp_path / "out", "--html", file, "--force").returncode == 0
    assert file.read_text().startswith("<!DOCTYPE html>")


# ------------------------------------------------------------------------------------------------------------- inspect


def test_inspect_shows_modules_vocabulary_and_receipt(save_llama: SaveLlama, tmp_path: Path) -> None:
    save_llama("tied", tie_word_embeddings=True)
    (tmp_path / "tied" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 36}}}))
    merge.build(merge.open(tmp_path / "tied"), tmp_path / "out")
    found = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert found["vocabulary"] == {"rows": 40, "tokens": 37, "padding": 3, "head": "tied to the embedding"}
    assert found["receipt"]["inputs"] == [str(tmp_path / "tied")]
    (down,) = [row for row in found["modules"] if row["module"] == "mlp.down_proj.weight"]
    assert down == {
        "where": "model.layers",
        "module": "mlp.down_proj.weight",
        "layers": "0-7",
        "tensors": 8,
        "shape": [16, 32],
        "dtype": "F32",
        "bytes": 8 * 16 * 32 * 4,
    }
    text = run("inspect", tmp_path / "out").stdout
    assert "vocabulary: 40 rows, 37 tokens, 3 rows of padding; head: tied to the embedding" in text
    assert "receipt: no recipe, of" in text
    assert json.loads(run("inspect", tmp_path / "tied", "--json").stdout)["receipt"] is None


# ----------------------------------------------------------------------------------------------------------- notebooks


def test_a_notebook_shows_a_checkpoints_stacks(save_llama: SaveLlama) -> None:
    opened = merge.open(save_llama("model"), label=EVIL)
    shown = opened._repr_html_()
    Reader(shown)
    assert "<script>" not in shown
    assert "<td>model.layers</td><td>8</td><td>72</td>" in shown


def test_a_notebook_shows_a_plan_and_what_each_layer_comes_from(swap: Path) -> None:
    plan = merge.make_plan(compositions.compose(compositions.load(swap)))
    # 8 + 2 + 8 entries outside and 4 · 8 inside, of four bytes; the blended layer reads its 8 twice
    assert repr(plan) == "<Plan: 11 tensors, reads 232 B, writes 200 B>"
    shown = plan._repr_html_()
    Reader(shown)
    assert 'title="1: language × task"' in shown
    assert 'title="2: task"' in shown
