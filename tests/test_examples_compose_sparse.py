"""The measurement of composed sparse fine-tunes in `examples/`: that it runs, what it trains, that sums are sums."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.example_scripts import EXAMPLES, imported, run_quickly

SPARSE = ("LT-SFT", "random masks", "largest changes of dense")
DENSE = ("dense", "dense, slower")
NAMES = ("task", "language")
COUNT = 26465  # 0.08 of the 330,816 entries outside the norms and the output head
Tensors = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the script once, in its quick form: one seed, two steps a phase, 20 pairs of goods to ask about."""
    return run_quickly("compose_sparse", tmp_path_factory.mktemp("compose_sparse"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the script."""
    return imported("compose_sparse", monkeypatch)


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def base(folder: Path) -> Tensors:
    return load_file(folder / "runs" / "base" / "model.safetensors")


def positions_and_values(folder: Path, kind: str, name: str) -> tuple[Tensors, Tensors]:
    """Read a sparse fine-tune with numpy alone."""
    stored = load_file(folder / "runs" / "seed-0" / kind / name / "sparse_fine_tune.safetensors")
    names = [key.removesuffix(":indices") for key in stored if key.endswith(":indices")]
    return {n: stored[f"{n}:indices"] for n in names}, {n: stored[f"{n}:values"] for n in names}


def changes(folder: Path, kind: str, name: str) -> Tensors:
    """Give what a fine-tune adds to each tensor of the base, in float64."""
    start = base(folder)
    if kind in DENSE:
        tuned = load_file(folder / "runs" / "seed-0" / kind / name / "model.safetensors")
        return {n: tuned[n].astype(np.float64) - start[n] for n in start}
    found = {n: np.zeros(tensor.shape) for n, tensor in start.items()}
    positions, values = positions_and_values(folder, kind, name)
    for n in positions:
        found[n].reshape(-1)[positions[n]] = values[n]
    return found


def opened(script: ModuleType, folder: Path, kind: str) -> dict[str, Any]:
    open_ = script.merge.open if kind in DENSE else script.merge.open_sparse
    return {name: open_(folder / "runs" / "seed-0" / kind / name) for name in NAMES}


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("name", NAMES)
def test_every_sparse_fine_tune_has_the_same_count_outside_norms_and_head(quick: Path, kind: str, name: str) -> None:
    positions, _ = positions_and_values(quick, kind, name)
    assert sum(len(np.unique(found)) for found in positions.values()) == COUNT
    assert not any("norm" in n or "lm_head" in n for n in positions)


@pytest.mark.parametrize("kind", [*SPARSE, *DENSE])
def test_portmanteaus_composition_is_the_sum_that_numpy_takes_in_float64(
    quick: Path, script: ModuleType, kind: str
) -> None:
    checkpoint = script.merge.open(quick / "runs" / "base")
    found = script.composed(checkpoint, opened(script, quick, kind))
    task, language, start = changes(quick, kind, "task"), changes(quick, kind, "language"), base(quick)
    assert set(found.specs) == set(start)
    for n in start:
        assert found[n].dtype == script.torch.float32
        np.testing.assert_allclose(found[n].numpy(), start[n] + task[n] + language[n], rtol=3e-7, atol=1e-8, err_msg=n)


@pytest.mark.parametrize("kind", DENSE)
def test_the_dense_fine_tunes_change_nearly_everything_but_norms_and_head(quick: Path, kind: str) -> None:
    for name in NAMES:
        found = changes(quick, kind, name)
        still = {n for n in found if "norm" in n or "lm_head" in n}
        assert len(still) == 18  # two norms in each of 8 layers, the last norm, the head
        assert all(not found[n].any() for n in still)
        assert sum(np.count_nonzero(found[n]) for n in found) > 0.9 * 330_816


def test_the_largest_changes_are_those_of_the_dense_fine_tune(quick: Path) -> None:
    for name in NAMES:
        dense, taken = changes(quick, "dense", name), changes(quick, "largest changes of dense", name)
        sizes = np.sort(np.concatenate([np.abs(change).ravel() for change in dense.values()]))
        kept = np.sort(np.concatenate([np.abs(change[change != 0]) for change in taken.values()]))
        np.testing.assert_allclose(kept, sizes[-COUNT:], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_the_mask_tells_the_sparse_phases_apart(
    quick: Path, script: ModuleType, tmp_path: Path, name: str
) -> None:
    world = script.World.load(EXAMPLES / "models" / "world.json")
    tokenizer = script.AutoTokenizer.from_pretrained(EXAMPLES / "models" / "base")
    start = script.merge.open(quick / "runs" / "base")
    run = script.Run(start, script.dictated(world, tokenizer), script.QUICK, 0, tmp_path / "seed-0")
    positions, values = positions_and_values(quick, "LT-SFT", name)
    masks = {n: script.torch.zeros(start.specs[n].shape, dtype=script.torch.bool) for n in positions}
    for n, found in positions.items():
        masks[n].view(-1)[script.torch.from_numpy(found)] = True
    again = run.under(masks, "again", name)
    for n in positions:
        np.testing.assert_array_equal(again.values(n).checkpoint.read(f"{n}:values").numpy(), values[n])


def test_random_masks_draw_so_many_of_all_entries_alike_by_their_key(script: ModuleType) -> None:
    shapes = {"small": (10,), "large": (30, 30), "none": (0,)}
    masks = script.random_masks(shapes, 91, "task 0")
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == shapes
    assert sum(int(mask.sum()) for mask in masks.values()) == 91
    assert 80 <= int(masks["large"].sum()) <= 91  # 90 expected
    again, other = (script.random_masks(shapes, 91, key)["large"] for key in ("task 0", "language 0"))
    assert script.torch.equal(masks["large"], again)
    assert 0 < int((masks["large"] & other).sum()) < 40  # 9 expected by chance


def test_task_and_language_are_trained_under_masks_of_their_own(quick: Path) -> None:
    for found in results(quick)["overlaps"]:
        assert found["by chance"] == pytest.approx(COUNT / 330_816)
        assert 0 < found["shared"] < 0.5
    shared = next(found for found in results(quick)["overlaps"] if found["kind"] == "random masks")["shared"]
    assert shared == pytest.approx(0.08, abs=0.01)


def test_the_results_hold_every_model_and_whole_numbers_of_questions(quick: Path) -> None:
    found = results(quick)
    order = ["LT-SFT", "random masks", "dense", "dense, slower", "largest changes of dense"]
    assert [(row["seed"], row["kind"]) for row in found["models"]] == [(0, kind) for kind in order]
    asked = found["setting"]["questions"]
    assert 20 < asked <= 40  # 20 pairs, in both orders where the goods differ
    for row in found["models"]:
        for which in ("task only", "language only", "composed"):
            assert list(row[which]) == ["task A", "task B", "loss A", "loss B"]
            right = [row[which]["task A"] * asked, row[which]["task B"] * asked]
            assert np.round(right) == pytest.approx(right)


def test_the_tables_are_those_of_the_results(quick: Path, script: ModuleType) -> None:
    assert (quick / "tables.md").read_text(encoding="utf-8") == script.tables(results(quick)) + "\n"


def test_a_table_gives_the_spread_of_the_differences_within_each_seed(script: ModuleType) -> None:
    def scores(task: float, loss: float) -> dict[str, float]:
        return {"task A": task, "task B": task, "loss A": loss, "loss B": loss}

    rows = [
        {"seed": seed, "kind": "LT-SFT", "task only": scores(0.5 + seed, 2), "language only": scores(0, 1), **end}
        for seed, end in enumerate([{"composed": scores(0.6, 1.5)}, {"composed": scores(1.8, 1.7)}])
    ]
    written = script.tables({"base": scores(0.25, 3), "models": rows, "overlaps": []})
    assert "| LT-SFT | composed | 1.200 (0.849) | 1.200 (0.849) | 1.600 (0.141) | 1.600 (0.141) |" in written
    assert "| LT-SFT | 0.200 (0.141) | 0.200 (0.141) | 0.600 (0.141) | 0.600, 1.800 |" in written


def test_the_committed_page_shows_the_committed_results(script: ModuleType) -> None:
    committed = json.loads((EXAMPLES / "compose_sparse.json").read_text(encoding="utf-8"))
    for table in script.tables(committed).split("\n\n"):
        assert table in (EXAMPLES / "compose_sparse.md").read_text(encoding="utf-8")
