"""Greedy soups: the paper's algorithm in numpy, a user's program as the metric, and what is refused before any work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from portmanteau import compositions, merge
from tests.conftest import SaveLlama

Save = Callable[[str, Mapping[str, Tensor]], Path]
_FAILED = "ended with status 3\n  hint: its stderr ended with:\n    no data"
COMMAND = str(Path(sys.executable).with_name("portmanteau"))
# the distance of the mean of all entries from 5, by safetensors alone
SCRIPT = """
    import sys
    from safetensors.numpy import load_file
    print("loading", sys.argv[1])
    weight = load_file(sys.argv[1] + "/model.safetensors")["weight"]
    print(abs(float(weight.astype("float64").mean()) - 5))
"""


def cook(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, "soup", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


@pytest.fixture
def metric(tmp_path: Path) -> str:
    """Write the metric program into a folder with a space in its name, and give its command."""
    place = tmp_path / "my scripts"
    place.mkdir()
    (place / "metric.py").write_text(dedent(SCRIPT))
    return f"{sys.executable} '{place / 'metric.py'}' {{model}}"


@pytest.fixture
def models(save_tensors: Save) -> list[Path]:
    """Give five models of random matrices whose means lie about 5."""
    generator = torch.Generator().manual_seed(11)
    means = (3.0, 9.0, 4.5, 6.0, 0.5)
    drawn = [torch.randn(20, 30, generator=generator) + mean for mean in means]
    return [save_tensors(f"model-{i}", {"weight": tensor}) for i, tensor in enumerate(drawn)]


def in_numpy(
    models: list[np.ndarray[Any, Any]], value: Callable[[np.ndarray[Any, Any]], float]
) -> tuple[list[int], list[tuple[int, float]]]:
    """Carry out recipe 1 of the paper: sort by decreasing value, keep what does not lower the value of the average."""
    order = sorted(range(len(models)), key=lambda i: -value(models[i]))
    ingredients: list[int] = []
    values = []
    for i in order:
        with_it = value(np.mean([models[j] for j in [*ingredients, i]], axis=0))
        if not ingredients or with_it >= value(np.mean([models[j] for j in ingredients], axis=0)):
            ingredients.append(i)
        values.append((i, with_it))
    return ingredients, values


def test_the_soup_is_that_of_the_papers_algorithm_in_numpy(tmp_path: Path, models: list[Path], metric: str) -> None:
    done = cook("out", "model-*", "--metric", metric, "--minimize", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    weights = [load_file(folder / "model.safetensors")["weight"].double().numpy() for folder in models]
    taken, values = in_numpy(weights, lambda weight: -abs(float(weight.mean()) - 5))
    assert 1 < len(taken) < len(models)
    assert [one["model"] for one in printed["tries"]] == [f"model-{i}" for i, _ in values]
    assert [one["soup"] for one in printed["tries"]] == pytest.approx([-value for _, value in values], rel=1e-5)
    assert [one["taken"] for one in printed["tries"]] == [i in taken for i, _ in values]
    assert printed["models"] == [f"model-{i}" for i in sorted(taken)]
    found = load_file(tmp_path / "out" / "model.safetensors")["weight"].double().numpy()
    np.testing.assert_allclose(found, np.mean([weights[i] for i in taken], axis=0), rtol=1e-6, atol=1e-6)
    assert abs(found.mean() - 5) == pytest.approx(printed["metric"], rel=1e-9)  # what was measured is what was built


def test_more_is_better_unless_asked_otherwise(tmp_path: Path, save_tensors: Save) -> None:
    folders = [save_tensors(f"m{value}", {"weight": torch.full((2,), float(value))}) for value in (1, 3, 2)]
    size = lambda folder: float(merge.open(folder)["weight"][0])  # noqa: E731
    soup = compositions.greedy_soup(folders, tmp_path / "most", measure=size)
    assert [(Path(one.model).name, one.soup, one.taken) for one in soup.tries] == [
        ("m3", 3.0, True), ("m2", 2.5, False), ("m1", 2.0, False)
    ]  # fmt: skip
    soup = compositions.greedy_soup(folders, tmp_path / "least", measure=size, minimize=True)
    assert [(Path(one.model).name, one.soup, one.taken) for one in soup.tries] == [
        ("m1", 1.0, True), ("m2", 1.5, False), ("m3", 2.0, False)
    ]  # fmt: skip


def test_a_metric_that_stays_the_same_is_no_worse(tmp_path: Path, models: list[Path]) -> None:
    soup = compositions.greedy_soup(models, tmp_path / "out", measure=lambda folder: 1.0)
    assert all(one.taken for one in soup.tries)
    assert [Path(one.model) for one in soup.tries] == models  # ties in the order given


def test_the_recipe_beside_the_result_builds_it_again(tmp_path: Path, models: list[Path], metric: str) -> None:
    (tmp_path / "soups").mkdir()
    done = cook("soups/out", *[path.name for path in models], "--metric", metric, "--minimize", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "soups" / "out.yaml").read_text()
    assert text == "merge:\n  average:\n    models:\n    - ../model-2\n    - ../model-3\n"
    receipt = json.loads((tmp_path / "soups" / "out" / "portmanteau.json").read_text())
    assert receipt["recipe"]["text"] == text
    again = merge.build(compositions.compose(compositions.load(tmp_path / "soups" / "out.yaml")), tmp_path / "again")
    assert again.outputs == receipt["outputs"]
    assert sorted(path.name for path in (tmp_path / "soups").iterdir()) == ["out", "out.yaml"]


def test_the_table_of_tries_is_printed(tmp_path: Path, save_tensors: Save, metric: str) -> None:
    for name, value in (("four", 4.0), ("none", 0.0), ("nine", 9.0)):
        save_tensors(name, {"weight": torch.full((2,), value)})
    done = cook("out", "four", "none", "nine", "--metric", metric, "--minimize", cwd=tmp_path)
    assert [line.split() for line in done.stdout.splitlines() if line.strip()][2:] == [
        ["four", "1", "1", "yes"], ["nine", "4", "1.5", "no"], ["none", "5", "3", "no"]
    ]  # fmt: skip
    assert "with nine: 1.5, left out" in done.stderr
    assert "1 of 3 models, metric 1" in done.stderr


def test_candidates_are_whole_models(tmp_path: Path, save_llama: SaveLlama) -> None:
    folders = [save_llama(f"llama-{i}", seed=i) for i in range(2)]

    def entries(folder: Path) -> float:
        from transformers import AutoModelForCausalLM

        return float(sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()))

    soup = compositions.greedy_soup(folders, tmp_path / "out", measure=entries)
    assert soup.metric == entries(tmp_path / "out")
    assert len(soup.models) == 2


@pytest.mark.parametrize(
    ("script", "what"),
    [
        ("import sys; print('no data', file=sys.stderr); sys.exit(3)", _FAILED),
        ("print('accuracy: 0.5')", "the last line of its stdout is 'accuracy: 0.5', which is no number"),
        ("pass", "the last line of its stdout is '', which is no number"),
        ("print('nan')", "the last line of its stdout is 'nan', which is no number"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("models")
def test_a_metric_that_fails_ends_the_work_and_leaves_nothing(tmp_path: Path, script: str, what: str) -> None:
    (tmp_path / "metric.py").write_text(script)
    done = cook("out", "model-*", "--metric", f"{sys.executable} metric.py {{model}}", cwd=tmp_path)
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (1, "", False)
    assert what in done.stderr
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--metric", "true model"], "does not say where the model's folder goes"),
        (["--metric", "true {model} 'x"], "cannot be split into words"),
        (["--metric", ""], "does not say where the model's folder goes"),
        (["--metric", "no-such-program {model}"], "there is no program 'no-such-program'"),
        (["model-0", "--metric", "false {model}"], "model-0 is named twice"),
        (["other-*", "--metric", "false {model}"], "nothing is called 'other-*'"),
        (["wide", "--metric", "false {model}"], "tensor weight: shapes differ"),
    ],
)
@pytest.mark.usefixtures("models")
def test_a_mistake_is_found_before_anything_is_measured(
    tmp_path: Path, save_tensors: Save, arguments: list[str], what: str
) -> None:
    save_tensors("wide", {"weight": torch.zeros(2, 3)})
    done = cook("out", "model-*", *arguments, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert what in done.stderr
    assert "ended with status" not in done.stderr  # the command, which would fail, was not run


def test_infinity_is_refused_warned_of_or_kept_as_in_build(tmp_path: Path, save_tensors: Save, metric: str) -> None:
    save_tensors("good", {"weight": torch.tensor([4.0, 6.0])})
    save_tensors("burst", {"weight": torch.tensor([5.0, torch.inf])})
    done = cook("out", "good", "burst", "--metric", metric, "--minimize", cwd=tmp_path)
    assert done.returncode == 1
    assert "tensor weight of burst: 1 of 2 entries is NaN or infinite" in done.stderr
    assert not (tmp_path / "out").exists()
    done = cook("out", "good", "burst", "--metric", metric, "--minimize", "--non-finite", "warn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "good: 0"  # the mean of 4 and 6 lies 0 from 5, and that of 5 and inf at inf
    assert done.stderr.splitlines()[1] == "note: tensor weight of burst: 1 of 2 entries is NaN or infinite"
    assert done.stderr.splitlines()[2] == "burst: inf"
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"], torch.tensor([4.0, 6.0]))
    done = cook("kept", "good", "burst", "--metric", metric, "--minimize", "--non-finite", "keep", cwd=tmp_path)
    assert (done.returncode, "note:" in done.stderr) == (0, False)


def test_one_model_is_no_soup(tmp_path: Path, models: list[Path]) -> None:
    with pytest.raises(merge.MergeError, match="made of several models"):
        compositions.greedy_soup(models[:1], tmp_path / "out", measure=lambda folder: 1.0)


def never(folder: Path) -> float:
    raise AssertionError("measured")


def test_an_existing_result_or_recipe_is_left_alone_unless_forced(tmp_path: Path, models: list[Path]) -> None:
    out = tmp_path / "out"
    (tmp_path / "out.yaml").write_text("mine")
    with pytest.raises(merge.OutputError, match=r"out\.yaml: exists already"):
        compositions.greedy_soup(models, out, measure=never)
    compositions.greedy_soup(models, out, measure=lambda folder: 1.0, force=True)
    (tmp_path / "out.yaml").unlink()
    with pytest.raises(merge.OutputError, match="exists already"):
        compositions.greedy_soup(models, out, measure=never)


def test_heads_that_were_trained_apart_are_found_before_anything_is_measured(
    tmp_path: Path, save_tensors: Save
) -> None:
    folders = []
    for i in range(2):
        (tmp_path / f"seed-{i}").mkdir()
        tensors = {"weight": torch.zeros(2), "classifier.weight": torch.full((2,), float(i))}
        folders.append(save_tensors(f"seed-{i}/model", tensors))
    with pytest.raises(merge.MergeError, match="trained apart cannot be averaged"):
        compositions.greedy_soup(folders, tmp_path / "out", measure=never)
    soup = compositions.greedy_soup(folders, tmp_path / "out", measure=lambda folder: 1.0, shared="")
    assert merge.open(tmp_path / "out")["classifier.weight"].tolist() == [0.5, 0.5]
    assert "shared: ''" in soup.recipe.read_text()


@pytest.mark.usefixtures("models")
def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time; open('begun', 'w').close(); time.sleep(60)")
    command = [COMMAND, "soup", "out", "model-*", "--metric", f"{sys.executable} slow.py {{model}}"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )  # as a terminal does, the interrupt goes to all its processes
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (130, False)
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]
