"""Results against their receipts, and recipes against their locks."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import blake3
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.compositions import lock_file
from portmanteau.merge import OutputError, RecipeError

SaveTensors = Callable[[str, Mapping[str, Tensor]], Path]


@pytest.fixture
def recipe(save_tensors: SaveTensors, tmp_path: Path) -> Path:
    """Two small models with companions, and the mean of them in two shards."""
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        folder = save_tensors(name, {f"w{i}": torch.randn(30, generator=generator) for i in range(4)})
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": []}')
    path = tmp_path / "mean.yaml"
    path.write_text("models: {one: a, other: b}\nmerge: {linear: {models: [one, other]}}\noutput: {shard_size: 300}\n")
    return path


def built(recipe: Path, out: Path) -> merge.Receipt:
    loaded = compositions.load(recipe)
    options = {"recipe": loaded.text, "recipe_folder": loaded.folder}
    return merge.build(compositions.compose(loaded), out, shard_size=loaded.output.shard_size, **options)


def damaged(out: Path) -> list[str]:
    return [f"{mistake.where}: {mistake.what}" for mistake in merge.verify(out).damaged]


def test_the_receipt_names_every_file_by_its_digest(recipe: Path, tmp_path: Path) -> None:
    receipt = built(recipe, tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there == {*receipt.files, "portmanteau.json"}
    for name, record in receipt.files.items():
        raw = (tmp_path / "out" / name).read_bytes()
        assert record["bytes"] == len(raw)
        if name.endswith(".safetensors"):
            header = raw[: 8 + int.from_bytes(raw[:8], "little")]
            assert (record["header_bytes"], record["header"]) == (len(header), blake3.blake3(header).hexdigest())
        else:
            assert record["digest"] == blake3.blake3(raw).hexdigest()


def test_a_whole_result_is_whole_and_counted(recipe: Path, tmp_path: Path) -> None:
    built(recipe, tmp_path / "out")
    found = merge.verify(tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name != "portmanteau.json")
    assert (found.tensors, found.files, found.nbytes, found.damaged) == (4, 6, size, ())


def test_missing_cut_and_additional_files_are_named_together(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    built(recipe, out)
    (out / "tokenizer.json").unlink()
    (out / "adapter_config.json").write_text("{}")
    shard = out / "model-00001-of-00002.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    assert damaged(out) == [
        f"{out / 'adapter_config.json'}: is not of this build: its receipt does not name it",
        f"{shard}: has {size - 1} bytes, and {size} were written",
        f"{out / 'tokenizer.json'}: is missing",
    ]


def test_two_tensors_that_changed_places_are_both_named(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    built(recipe, out)
    shard = out / "model-00001-of-00002.safetensors"
    raw = shard.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    shard.write_bytes(raw[:start] + raw[start + 120 :] + raw[start : start + 120])
    assert [mistake.partition(": is damaged")[0] for mistake in damaged(out)] == [
        f"{shard}: tensor w0",
        f"{shard}: tensor w1",
    ]


def test_a_folder_without_a_receipt_cannot_be_verified(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"holds no portmanteau\.json"):
        merge.verify(tmp_path)


def test_a_receipt_that_was_edited_says_so(recipe: Path, tmp_path: Path) -> None:
    built(recipe, tmp_path / "out")
    path = tmp_path / "out" / "portmanteau.json"
    path.write_text(path.read_text().replace('"seconds"', '"Seconds"', 1))
    with pytest.raises(OutputError, match="is damaged, was edited"):
        merge.verify(tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"a": 3}},
        {"files": {"a": {"bytes": 1}}},
        {"files": {"a": {"bytes": 1, "header": 0}}},
        {"files": [1]},
        {"outputs": {"x": 3}},
        {"outputs": None},
        {"notes": 3},
        {"made_from": 3},
    ],
)
def test_a_sealed_receipt_of_a_stranger_that_is_none_is_refused(
    change: dict[str, Any], recipe: Path, tmp_path: Path
) -> None:
    built(recipe, tmp_path / "out")
    path = tmp_path / "out" / "portmanteau.json"
    raw = json.dumps({**json.loads(path.read_text()), **change, "seal": "0" * 64})
    path.write_text(raw.replace("0" * 64, blake3.blake3(raw.encode()).hexdigest()))
    with pytest.raises(OutputError, match="is damaged, was edited"):
        merge.verify(tmp_path / "out")


# -------------------------------------------------------------------------------------------------------- built again


def test_the_recipe_in_the_receipt_gives_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    built(recipe, tmp_path / "out")
    recipe.unlink()
    assert compositions.rebuilt(tmp_path / "out") == ()


def test_a_result_and_its_models_may_be_moved_together(recipe: Path, tmp_path: Path) -> None:
    built(recipe, tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    for name in ("a", "b", "out"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    assert compositions.rebuilt(tmp_path / "elsewhere" / "out") == ()
    shutil.move(tmp_path / "elsewhere" / "out", tmp_path / "other")
    (tmp_path / "deep").mkdir()
    shutil.move(tmp_path / "other", tmp_path / "deep" / "out")
    assert compositions.rebuilt(tmp_path / "deep" / "out", folder=tmp_path / "elsewhere") == ()


def test_another_input_gives_other_bits_in_the_tensors_that_it_changes(recipe: Path, tmp_path: Path) -> None:
    built(recipe, tmp_path / "out")
    path = tmp_path / "b" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1  # the exponent of the last entry of w3
    path.write_bytes(raw)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    where = {mistake.where: mistake.what for mistake in compositions.rebuilt(tmp_path / "out")}
    assert where == {
        "tensor w3": "comes out with other bytes now",
        "file tokenizer.json": "comes out with other bytes now",
    }


def test_a_build_from_python_holds_no_recipe(recipe: Path, tmp_path: Path) -> None:
    merge.build(merge.open(tmp_path / "a"), tmp_path / "out")
    with pytest.raises(OutputError, match="holds no recipe: it was built from Python"):
        compositions.rebuilt(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------- the lock


def lock(recipe: Path) -> dict[str, dict[str, object]]:
    path, _ = lock_file.write(compositions.load(recipe))
    assert path == recipe.with_name("mean.yaml.lock")
    found: dict[str, dict[str, object]] = json.loads(path.read_text())["models"]
    return found


def test_a_lock_holds_every_file_of_every_input_by_its_digest(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "optimizer.pt").write_bytes(b"not read")
    models = lock(recipe)
    assert models.keys() == {"one", "other"}
    for name, folder in (("one", "a"), ("other", "b")):
        names = ("config.json", "model.safetensors", "tokenizer.json")
        raw = {file: (tmp_path / folder / file).read_bytes() for file in names}
        marks = {file: {"bytes": len(one), "blake3": blake3.blake3(one).hexdigest()} for file, one in raw.items()}
        assert models[name] == {"files": marks}


def refusal(recipe: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        lock_file.held_to_lock(compositions.load(recipe))
    return str(caught.value)


def test_everything_that_is_not_as_it_was_locked_is_named_at_once(recipe: Path, tmp_path: Path) -> None:
    lock(recipe)
    (tmp_path / "a" / "generation_config.json").write_text("{}")
    (tmp_path / "a" / "tokenizer.json").unlink()
    save_file({f"w{i}": torch.zeros(30) for i in range(4)}, tmp_path / "b" / "model.safetensors")
    said = refusal(recipe)
    assert f"{tmp_path / 'a' / 'generation_config.json'}: is not in the lock" in said
    assert f"{tmp_path / 'a' / 'tokenizer.json'}: is in the lock, and is missing" in said
    assert f"{tmp_path / 'b' / 'model.safetensors'}: is not the file that was locked" in said


def test_a_recipe_that_changed_is_refused(recipe: Path) -> None:
    lock(recipe)
    recipe.write_text(recipe.read_text().replace("300", "400"))
    assert "the recipe is not the one that was locked" in refusal(recipe)


@pytest.mark.parametrize("text", ["", "[]", '{"recipe": 1}', '{"recipe": "x", "models": {"one": 3}}'])
def test_a_lock_that_is_none_is_refused(text: str, recipe: Path) -> None:
    recipe.with_name("mean.yaml.lock").write_text(text)
    assert "is no lock, or a damaged one" in refusal(recipe)


def test_the_hub_is_locked_to_a_revision_and_read_at_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A double of the cache: `main` moves on, the locked revision is asked for by its hash."""
    sha, asked = "5" * 40, list[str | None]()
    cache = tmp_path / "models--org--model"
    snapshot, blob = cache / "snapshots" / sha, cache / "blobs" / ("e" * 64)
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    shutil.copyfile(tmp_path / "a" / "model.safetensors", blob)
    (snapshot / "model.safetensors").symlink_to(blob)

    def download(repository: str, revision: str | None = None, *_: object) -> Path:
        asked.append(revision)
        return snapshot

    monkeypatch.setattr("portmanteau.merge.files.hub.download", download)
    recipe.write_text("models: {one: org/model, other: b}\nmerge: {linear: {models: [one, other]}}\n")
    mark = lock(recipe)["one"]
    assert (mark["repository"], mark["revision"]) == ("org/model", sha)
    assert mark["files"]["model.safetensors"]["sha256"] == "e" * 64  # type: ignore[index]
    assert set(asked) == {None}
    asked.clear()
    held = lock_file.held_to_lock(compositions.load(recipe))
    assert held.models["one"].revision == sha
    compositions.compose(held)
    assert set(asked) == {sha}
