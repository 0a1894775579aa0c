"""NaN and infinity: found in inputs and results, named with their count, by every way in which a tensor is made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.merge import Checkpoint, Composed, MergeError
from portmanteau.merge.compiled import library
from portmanteau.merge.dtypes import DTYPES, torch_dtype
from portmanteau.merge.non_finite import count
from portmanteau.merge.registry import operators

SaveTensors = Callable[[str, Mapping[str, Tensor]], Path]
FLOATS = [name for name, dtype in DTYPES.items() if dtype.kind == "float"]
NAN, INF = float("nan"), float("inf")
NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(params=["compiled", "numpy"])
def way(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With the compiled library, and without."""
    if request.param == "numpy":
        monkeypatch.setattr(library, "_FILE", tmp_path / "nothing")
    library.library.cache_clear()
    yield request.param
    monkeypatch.undo()
    library.library.cache_clear()


def raw(values: Tensor) -> memoryview:
    return memoryview(bytearray(values.contiguous().view(torch.uint8).numpy().tobytes()))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", FLOATS)
def test_all_bit_patterns_are_judged_as_torch_judges_them(dtype: str) -> None:
    """All of 8 and 16 bits; of 32 and 64 bits those on either side of every exponent."""
    kind, bits = torch_dtype(dtype), DTYPES[dtype].bits
    if bits <= 16:
        whole = torch.arange(1 << bits, dtype=torch.int64).to(torch.uint8 if bits == 8 else torch.int16).view(kind)
    elif bits == 32:
        edges = torch.arange(0, 512, dtype=torch.int64) << 23
        whole = torch.cat([edges - 1, edges, edges + 1]).to(torch.int32).view(kind)
    else:
        edges = torch.arange(-2048, 2048, dtype=torch.int64) << 52
        whole = torch.cat([edges - 1, edges, edges + 1]).view(kind)
    expected = int((~torch.isfinite(whole.double())).sum())
    assert expected
    assert count(raw(whole), dtype) == expected


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("entries", [0, 1, 127, 128, 129, 255, 256, 32767, 32768, 32769, 100_003])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_entry_is_counted_however_many_there_are(dtype: str, entries: int) -> None:
    whole = torch.full((entries,), NAN, dtype=torch.float32).to(torch_dtype(dtype))
    assert count(raw(whole), dtype) == entries
    assert count(raw(torch.zeros(entries).to(torch_dtype(dtype))), dtype) == 0


def test_what_is_no_float_is_never_counted() -> None:
    assert count(memoryview(bytearray(b"\xff" * 64)), "I64") == 0
    assert count(memoryview(bytearray(b"\xff" * 64)), "F4") == 0


def models(
    save_tensors: SaveTensors, places: Mapping[str, Mapping[int, float]], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Checkpoint]:
    """Save a base and two models of one large tensor and a small one, with values put into the large one at places."""
    found: dict[str, Checkpoint] = {}
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        large = torch.randn(300, 701, generator=generator).to(dtype)
        for at, value in places.get(name, {}).items():
            large.view(-1)[at] = value
        folder = save_tensors(name, {NAME: large, "model.norm.weight": torch.ones(7, dtype=dtype)})
        found[name] = merge.open(folder, label=name)
    return found


def made(operator: str, found: Mapping[str, Checkpoint], **settings: Any) -> Composed:
    known = operators()[operator]
    base = found["base"] if known.needs_base else None
    names = ["a", "b"] if known.takes in (None, 2) else ["a"]
    chosen = {name: found[name] for name in names}
    weighed = {"importances": dict(chosen)} if "importances" in known.roles else {}
    return compositions.tensorwise(operator, models=chosen, base=base, settings=settings, **weighed)


BY_TENSOR = [name for name, one in operators().items() if "importances" not in one.roles and name != "equal"]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("operator", BY_TENSOR)
def test_a_model_with_nan_is_named_whatever_the_operator_does_with_it(
    operator: str, dtype: torch.dtype, save_tensors: SaveTensors, tmp_path: Path
) -> None:
    found = models(save_tensors, {"a": {3: NAN, 70_000: INF, 200_000: -INF}}, dtype)
    with pytest.raises(MergeError) as caught:
        merge.build(made(operator, found), tmp_path / "out")
    wheres = {mistake.where: mistake.what for mistake in caught.value.mistakes}
    assert wheres == {f"tensor {NAME} of a": "3 of 210,300 entries are NaN or infinite"}
    assert "--non-finite keep" in caught.value.mistakes[0].hint
    assert not (tmp_path / "out").exists()


def test_all_models_with_nan_are_named_together(save_tensors: SaveTensors, tmp_path: Path) -> None:
    found = models(save_tensors, {"a": {0: NAN}, "b": {1: INF, 2: INF}, "base": {210_299: NAN}})
    with pytest.raises(MergeError) as caught:
        merge.build(made("ties", found), tmp_path / "out")
    assert [str(mistake.where) for mistake in caught.value.mistakes] == [
        f"tensor {NAME} of {n}" for n in ["a", "b", "base"]
    ]
    assert [mistake.what.split()[0] for mistake in caught.value.mistakes] == ["1", "2", "1"]


def test_a_model_of_weight_zero_is_looked_at_too(save_tensors: SaveTensors, tmp_path: Path) -> None:
    found = models(save_tensors, {"b": {5: NAN}})
    chosen = {"weight": {"a": 1.0, "b": 0.0}}
    merged = compositions.tensorwise("linear", models={name: found[name] for name in "ab"}, settings=chosen)
    with pytest.raises(MergeError, match=f"tensor {NAME} of b: 1 of"):
        merge.build(merged, tmp_path / "out")


def test_a_step_inside_a_step_hides_nothing(save_tensors: SaveTensors, tmp_path: Path) -> None:
    found = models(save_tensors, {"a": {5: NAN}})
    inner = made("ties", found, density=0.1)
    outer = compositions.tensorwise("linear", models={"inner": inner, "b": found["b"]})
    with pytest.raises(MergeError, match=f"tensor {NAME} of a: 1 of"):
        merge.build(outer, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_a_copy_is_looked_at(dtype: torch.dtype, save_tensors: SaveTensors, tmp_path: Path) -> None:
    folder = save_tensors("m", {"x": torch.tensor([1.0, NAN, 2.0]).to(dtype), "y": torch.ones(2)})
    with pytest.raises(MergeError, match=r"tensor x of m: 1 of 3 entries is NaN or infinite"):
        merge.build(merge.open(folder, label="m"), tmp_path / "out")


def test_a_value_too_large_for_the_output_is_a_fault_of_the_dtype(save_tensors: SaveTensors, tmp_path: Path) -> None:
    folder = save_tensors("m", {"x": torch.tensor([1.0, 70_000.0])})
    with pytest.raises(
        MergeError, match=r"tensor x of the result: 1 of 2 entries is NaN .* finite\n  hint: .*bfloat16"
    ):
        merge.build(merge.open(folder), tmp_path / "out", dtype="float16")


def test_a_survey_does_not_decide_by_nan(save_tensors: SaveTensors, tmp_path: Path) -> None:
    base = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(9, 8) for i in range(4)}
    found = {}
    for name, change in (("base", 0.0), ("task", 0.1), ("language", 0.2)):
        own = {key: value + change * torch.randn(9, 8) for key, value in base.items()}
        if name == "task":
            own["model.layers.1.mlp.up_proj.weight"][0, 0] = NAN
        found[name] = merge.open(save_tensors(name, own), label=name)
    swap = compositions.layer_swap(layers="auto", **found)
    with pytest.raises(MergeError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight of task: 1 of 72"):
        merge.build(swap, tmp_path / "out")


def test_integers_may_hold_any_bits(save_tensors: SaveTensors, tmp_path: Path) -> None:
    folder = save_tensors("m", {"ids": torch.full((5,), -1, dtype=torch.int64)})
    merge.build(merge.open(folder), tmp_path / "out")


def test_warn_builds_and_says_so_in_the_receipt(save_tensors: SaveTensors, tmp_path: Path) -> None:
    found = models(save_tensors, {"a": {3: NAN}})
    receipt = merge.build(made("linear", found), tmp_path / "out", non_finite="warn")
    note = f"tensor {NAME} of a: 1 of 210,300 entries is NaN or infinite"
    assert receipt.notes == (note,)
    assert json.loads((tmp_path / "out" / "portmanteau.json").read_text())["notes"] == [note]
    assert int(load_file(tmp_path / "out" / "model.safetensors")[NAME].isnan().sum()) == 1


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("operator", BY_TENSOR)
@pytest.mark.parametrize("values", [(NAN,), (INF, -INF)])
def test_keep_builds_without_a_word_or_says_which_input_an_operator_cannot_take(
    operator: str, values: tuple[float, ...], save_tensors: SaveTensors, tmp_path: Path
) -> None:
    found = models(save_tensors, {"a": {i * 5000: value for i, value in enumerate(values)}})
    try:
        notes = merge.build(made(operator, found), tmp_path / "out", non_finite="keep").notes
    except MergeError as error:
        notes = tuple(map(str, error.mistakes))
    assert all("NaN" in note and "of a" in note for note in notes)
    assert (tmp_path / "out").exists() == (notes == ())


def test_what_was_kept_is_not_up_to_date_for_one_who_asks(save_tensors: SaveTensors, tmp_path: Path) -> None:
    found = models(save_tensors, {"a": {3: NAN}})
    merge.build(made("linear", found), tmp_path / "out", non_finite="keep")
    assert merge.build(made("linear", found), tmp_path / "out", non_finite="keep").outcome == "up to date"
    with pytest.raises(merge.OutputError, match="the choice about NaN and infinity changed"):
        merge.build(made("linear", found), tmp_path / "out")


def test_a_build_that_stopped_at_nan_goes_on_when_it_may_be_kept(save_tensors: SaveTensors, tmp_path: Path) -> None:
    folder = save_tensors("m", {"large": torch.ones(100), "small": torch.tensor([NAN])})
    opened = merge.open(folder)
    with pytest.raises(MergeError) as caught:
        merge.build(opened, tmp_path / "out", threads=1)
    assert "1 finished tensor is kept" in caught.value.__notes__[0]
    assert merge.build(opened, tmp_path / "out", non_finite="keep").outcome == "continued"
    save_file({"large": torch.zeros(100), "small": torch.ones(1)}, folder / "model.safetensors")


def test_an_unknown_choice_is_refused(save_tensors: SaveTensors, tmp_path: Path) -> None:
    opened = merge.open(save_tensors("m", {"x": torch.ones(1)}))
    with pytest.raises(MergeError, match="unknown choice 'ignore'"):
        merge.build(opened, tmp_path / "out", non_finite="ignore")  # type: ignore[arg-type]
