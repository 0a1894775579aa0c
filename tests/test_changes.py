"""Where two checkpoints differ: measures against numpy in fp64, groups, refusals, and the command `diff`."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.compositions.reports import png, tables
from portmanteau.merge.differences.changes import Change
from portmanteau.merge.differences.task_vectors import measure
from portmanteau.merge.evaluate import GRID, Session
from portmanteau.merge.operator import Parts
from tests.conftest import SaveLlama

COMMAND = str(Path(sys.executable).with_name("portmanteau"))
Save = Callable[[str, Mapping[str, Tensor]], Path]
PNG = b"\x89PNG\r\n\x1a\n"


def measured(expert: Tensor, base: Tensor) -> Change:
    (found,) = measure(Parts.whole((expert - base)[None], base)).changes
    return found


def by_numpy(expert: Tensor, base: Tensor) -> dict[str, float]:
    """Measure in fp64 all along; the concentration by sorting."""
    after, before = expert.double().numpy().ravel(), base.double().numpy().ravel()
    delta = np.abs(after - before)
    top = np.sort(delta)[::-1][: int(np.ceil(len(delta) / 100))]
    return {
        "mean_absolute": delta.mean(),
        "relative": delta.mean() / np.abs(before).mean(),
        "relative_norm": np.linalg.norm(delta) / np.linalg.norm(before),
        "share_changed": (after != before).mean(),
        "top_share": top.sum() / delta.sum(),
    }


def measures(change: Change) -> dict[str, float]:
    return {name: getattr(change, name) for name in tables.MEASURES}


# ---------------------------------------------------------------------------------------------------------- one tensor


def test_a_tiny_tensor_has_the_measures_that_paper_gives() -> None:
    change = measured(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([1.0, -1.0, 2.0, 4.0]))
    # δ = 0, 3, 1, −4: Σ|δ| = 8, Σδ² = 26; Σ|base| = 8, Σbase² = 22; the largest one of four is 4
    assert change == Change(entries=4, changed=3, delta=8, delta_squared=26, base=8, base_squared=22, top=4)
    expected = {
        "mean_absolute": 2.0,
        "relative": 1.0,
        "relative_norm": (26**0.5) / (22**0.5),
        "share_changed": 0.75,
        "top_share": 0.5,
    }
    assert measures(change) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (7, 13), (300, 1000)])
def test_stored_tensors_have_numpys_measures(dtype: torch.dtype, shape: tuple[int, ...], save_tensors: Save) -> None:
    torch.manual_seed(5)
    base = torch.randn(shape).to(dtype)
    expert = torch.where(torch.rand(shape) < 0.7, base.double() + 0.1 * torch.randn(shape), base.double()).to(dtype)
    expert[..., 0] = base[..., 0] + 0.5
    one = compositions.changes(
        merge.open(save_tensors("expert", {"w.weight": expert})), merge.open(save_tensors("base", {"w.weight": base}))
    )
    # δ is rounded to fp32 once: 2⁻²⁴ of each entry, of which fewer than 2⁻²⁰ of the sum remain
    np.testing.assert_allclose(
        list(measures(one.tensors[0].change).values()), list(by_numpy(expert, base).values()), rtol=1e-6
    )


def test_no_number_depends_on_the_size_of_the_parts(save_tensors: Save) -> None:
    torch.manual_seed(6)
    base = {"a.weight": torch.randn(300_000), "b.weight": torch.randn(700, 500).bfloat16()}
    expert = {name: tensor + 0.1 * torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in base.items()}
    opened = merge.open(save_tensors("expert", expert)), merge.open(save_tensors("base", base))
    small, large = (compositions.changes(*opened, session=Session(part)) for part in (GRID, 8 * GRID))
    assert small == large


def test_among_equal_magnitudes_exactly_one_in_a_hundred_is_counted() -> None:
    base = torch.ones(1000)
    signs = torch.where(torch.arange(1000) % 2 == 0, 0.5, -0.5)
    assert measured(base + signs, base).top_share == 0.01


def test_a_single_change_is_all_concentration() -> None:
    expert = torch.ones(300_000)
    expert[299_999] = 3.0
    change = measured(expert, torch.ones(300_000))
    assert (change.changed, change.delta, change.top_share) == (1, 2.0, 1.0)


def test_the_smallest_difference_counts_and_the_sign_of_zero_does_not() -> None:
    tiny = torch.tensor([1e-45, 0.0, 1.0])
    assert measured(tiny, torch.tensor([0.0, -0.0, 1.0])).changed == 1


def test_what_would_divide_by_zero_is_none() -> None:
    zeros = torch.zeros(3)
    assert measures(measured(zeros, zeros)) == {
        "mean_absolute": 0.0,
        "relative": None,
        "relative_norm": None,
        "share_changed": 0.0,
        "top_share": None,
    }
    assert measured(torch.ones(3), zeros).relative is None
    assert measures(Change()) == dict.fromkeys(tables.MEASURES)


def test_a_tensor_without_entries_changes_nothing(save_tensors: Save) -> None:
    both = [merge.open(save_tensors(name, {"w.weight": torch.empty(0, 4), "v.weight": torch.ones(1)})) for name in "ab"]
    assert [row.change.entries for row in compositions.changes(*both).tensors] == [1, 0]


# --------------------------------------------------------------------------------------------------------------- groups


def layered(value: float) -> dict[str, Tensor]:
    """Give twelve layers with two modules, of which one has a bias, and an embedding; layer i is i · value above 1."""
    made = {"model.embed_tokens.weight": torch.full((4, 2), 1.0 + value)}
    for i in range(12):
        made[f"model.layers.{i}.mlp.up_proj.weight"] = torch.full((2, 2), 1.0 + i * value)
        made[f"model.layers.{i}.self_attn.q_proj.weight"] = torch.full((2, 2), 2.0)
        made[f"model.layers.{i}.self_attn.q_proj.bias"] = torch.full((2,), 2.0)
    return made


@pytest.fixture
def pair(save_tensors: Save) -> tuple[Path, Path]:
    """Give an expert and its base; layer i differs by i/128."""
    return save_tensors("expert", layered(1 / 128)), save_tensors("base", layered(0))


def test_groups_add_sums_in_the_order_of_the_layers(pair: tuple[Path, Path]) -> None:
    found = compositions.changes(*map(merge.open, pair))
    assert [row.where for row in found.layers] == [*(f"model.layers.{i}" for i in range(12)), "outside the layers"]
    assert [(row.where, row.module) for row in found.modules[6:8]] == [
        ("model.layers.3", "mlp.up_proj"),
        ("model.layers.3", "self_attn.q_proj"),
    ]
    assert found.modules[-1].module == "model.embed_tokens"
    # layer 3: four entries of ten changed by 3/128; the base sums to 4 · 1 + 6 · 2
    third = found.layers[3].change
    assert (third.entries, third.changed, third.delta, third.base) == (10, 4, 12 / 128, 16)
    assert (third.mean_absolute, third.relative, third.top_share) == (1.2 / 128, 0.75 / 128, 0.25)
    assert found.modules[7].change.entries == 6
    assert found.whole.delta == 4 * 66 / 128 + 8 / 128


def test_the_concentration_of_a_group_is_weighted_by_change(save_tensors: Save) -> None:
    base = {"a.weight": torch.ones(100), "b.weight": torch.ones(100)}
    alone = torch.ones(100)
    alone[0] = 4.0  # δ sums to 3, all in one entry
    expert = {"a.weight": alone, "b.weight": torch.full((100,), 1.25)}  # δ sums to 25, 1 % of it in each entry
    found = compositions.changes(merge.open(save_tensors("e", expert)), merge.open(save_tensors("b", base)))
    assert [row.change.top_share for row in found.tensors] == [1.0, 0.01]
    assert found.whole.top_share == (1.0 * 3 + 0.01 * 25) / 28


def test_a_checkpoint_that_is_made_is_measured_as_if_it_were_stored(save_llama: SaveLlama) -> None:
    base, task, language = (merge.open(save_llama(name, seed=i)) for i, name in enumerate(("base", "task", "lang")))
    swapped = compositions.layer_swap(task=task, language=language, base=base, bottom=3, top=2, rescale="mav")
    found = compositions.changes(swapped, base)
    for which, expert in ((0, language), (4, task), (7, language)):
        assert found.layers[which].change == compositions.changes(expert, base).layers[which].change


def test_names_with_another_prefix_are_the_bases(save_tensors: Save) -> None:
    expert = {f"wrapped.{name}": tensor for name, tensor in layered(1 / 128).items()}
    found = compositions.changes(merge.open(save_tensors("e", expert)), merge.open(save_tensors("b", layered(0))))
    assert found.whole.changed == 11 * 4 + 8
    assert {row.stack for row in found.tensors} == {"", "model.layers"}
    assert "prefix 'wrapped.' removed" in found.notes[0]


def test_notes_say_what_makes_the_measures_mean_less(save_tensors: Save) -> None:
    base = {"w.weight": torch.ones(4), "v.weight": torch.ones(4), "steps": torch.tensor([3])}
    expert = {"w.weight": torch.full((4,), 3.0), "v.weight": torch.ones(4).bfloat16(), "steps": torch.tensor([4])}
    found = compositions.changes(merge.open(save_tensors("e", expert)), merge.open(save_tensors("b", base)))
    assert found.notes == (
        "1 tensors that are no floats are not measured: steps",
        "1 tensors have another dtype than the base's; rounding counts as change: v.weight",
        "the relative change of the whole is 1.4: this may not be a fine-tune of that base",  # √16 / √8
    )


# ------------------------------------------------------------------------------------------------------------- refusals


def test_tensors_that_only_one_has_are_refused_or_left_out(save_tensors: Save) -> None:
    expert = {**layered(1 / 128), "adapter.weight": torch.ones(1)}
    base = {**layered(0), "pooler.weight": torch.ones(1)}
    opened = merge.open(save_tensors("e", expert), label="./e"), merge.open(save_tensors("b", base), label="./b")
    with pytest.raises(merge.MergeError) as caught:
        compositions.changes(*opened)
    assert [mistake.what for mistake in caught.value.mistakes] == [
        "./e lacks 1 tensors that the other has: pooler.weight",
        "./b lacks 1 tensors that the other has: adapter.weight",
    ]
    found = compositions.changes(*opened, unmatched="drop")
    assert "2 tensors that not every model has were left out" in found.notes[0]
    assert len(found.tensors) == 37


def test_other_shapes_and_depths_are_refused(save_tensors: Save) -> None:
    base = merge.open(save_tensors("base", layered(0)), label="base")
    wide = save_tensors("wide", {**layered(0), "model.embed_tokens.weight": torch.ones(5, 2)})
    deep = save_tensors("deep", {**layered(0), "model.layers.12.mlp.up_proj.weight": torch.ones(2, 2)})
    with pytest.raises(merge.MergeError, match=r"shapes differ: expert \[5, 2\], base \[4, 2\]"):
        compositions.changes(merge.open(wide, label="expert"), base)
    with pytest.raises(merge.MergeError, match=r"expert has 13 in model\.layers; base has 12"):
        compositions.changes(merge.open(deep, label="expert"), base, unmatched="drop")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_entry_that_is_no_number_is_refused_with_its_tensor(value: float, save_tensors: Save) -> None:
    broken = {**layered(0), "model.layers.3.self_attn.q_proj.bias": torch.tensor([2.0, value])}
    with pytest.raises(merge.MergeError, match=r"tensor model.layers.3.self_attn.q_proj.bias: holds NaN or infinite"):
        compositions.changes(merge.open(save_tensors("e", broken)), merge.open(save_tensors("b", layered(0))))


# ---------------------------------------------------------------------------------------------------------- the command


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def test_diff_prints_a_row_for_each_layer(pair: tuple[Path, Path]) -> None:
    done = run("diff", pair[0], "--base", pair[1])
    assert (done.returncode, done.stderr) == (0, "")
    rows = {
        line.split("  ")[0].strip(): line.split()[1:] for line in done.stdout.splitlines() if "model.layers" in line
    }
    assert len(rows) == 12
    # ‖δ‖ = √4 · 3/128, ‖base‖ = √(4 · 1 + 6 · 4); the other numbers are those of the test of groups
    assert " ".join(rows["model.layers.3"]) == "0.009375 0.5859 % 0.8859 % 40 % 25 %"
    assert "outside the layers" in done.stdout
    assert run("diff", pair[1], pair[0]).stdout == done.stdout  # from A to B
    assert "model.layers.3.self_attn.q_proj.bias" in run("diff", *reversed(pair), "--tensors").stdout


def test_json_and_csv_hold_the_same_rows(pair: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("diff", pair[0], "--base", pair[1], "--json", "--csv", tmp_path / "changes.csv")
    printed = json.loads(done.stdout)
    found = compositions.changes(*map(merge.open, pair))
    assert (printed["expert"], printed["base"]) == tuple(map(str, pair))
    assert [row["mean_absolute"] for row in printed["layers"]] == [row.change.mean_absolute for row in found.layers]
    assert "tensors" not in printed
    written = list(csv.DictReader((tmp_path / "changes.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["where"], row["module"], float(row["relative"])) for row in written] == [
        (row["where"], row["module"], row["relative"]) for row in printed["modules"]
    ]
    assert written[0]["top_share"] == ""  # layer 0 did not change
    assert float(written[-1]["sum_delta"]) == asdict(found.modules[-1].change)["delta"]


def test_png_is_drawn_and_an_existing_file_left_alone_unless_forced(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for option in ("--png", "--csv"):
        file = tmp_path / f"changes{option}"
        file.write_bytes(b"mine")
        done = run("diff", *reversed(pair), option, file)
        assert (done.returncode, done.stdout, file.read_bytes()) == (1, "", b"mine")
        assert "exists already" in done.stderr
        assert run("diff", *reversed(pair), option, file, "--force").returncode == 0
    assert (tmp_path / "changes--png").read_bytes().startswith(PNG)
    assert run("diff", *reversed(pair), "--png", tmp_path / "no" / "where.png").returncode == 1


@pytest.mark.parametrize("stacks", [("encoder.block", "decoder.block"), ("h",)])
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_several_stacks_and_equal_models_are_drawn_without_a_warning(
    stacks: tuple[str, ...], value: float, save_tensors: Save, tmp_path: Path
) -> None:
    names = [f"{stack}.{i}.{m}.weight" for stack in stacks for i in range(2) for m in ("attn.q", "mlp")]
    both = [
        save_tensors(folder, {name: torch.ones(2) + (changed if name == names[-1] else 0.0) for name in names})
        for folder, changed in (("expert", value), ("base", 0.0))
    ]
    png.draw([compositions.changes(*map(merge.open, both))], tmp_path / "map")
    assert (tmp_path / "map").read_bytes().startswith(PNG)


def test_what_cannot_be_drawn_is_said(
    save_tensors: Save, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = merge.open(save_tensors("flat", {"w.weight": torch.ones(2)}))
    with pytest.raises(merge.MergeError, match="has no layers to draw"):
        png.draw([compositions.changes(flat, flat)], tmp_path / "map.png")
    monkeypatch.setattr(png, "find_spec", lambda name: None)
    with pytest.raises(merge.PortmanteauError, match=r"needs matplotlib.*\n.*install portmanteau\[plots\]"):
        png.draw([compositions.changes(*map(merge.open, pair))], tmp_path / "map.png")
    assert not (tmp_path / "map.png").exists()


def test_a_base_is_named_once(pair: tuple[Path, Path]) -> None:
    for arguments in ([pair[0]], [*pair, pair[1]]):
        done = run("diff", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "base" in done.stderr


def test_importing_needs_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, portmanteau.cli\nfrom portmanteau.compositions.composition import compositions\ncompositions()\n"
        "print({'torch', 'matplotlib'}.intersection(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"
