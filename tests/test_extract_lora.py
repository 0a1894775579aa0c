"""The LoRA of a full fine-tune: numpy's decomposition in fp64 and peft as oracles, and what else changed."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from portmanteau import compositions, merge
from portmanteau.merge.adapters.decomposition import EXACT_UP_TO, OfMatrix
from tests.conftest import SaveLlama
from tests.test_combine_lora import assert_near, deltas, opened

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",  # peft: it saves the base's embedding along
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft calls transformers by an old name
)
UP = "model.layers.1.mlp.up_proj"


def tune(base: Path, folder: Path, change: Callable[[str, Tensor], Tensor]) -> Path:
    """Save a base with other tensors: change(name, tensor) → tensor."""
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    tensors = load_file(base / "model.safetensors")
    save_file({name: change(name, one) for name, one in tensors.items()}, folder / "model.safetensors")
    return folder


def moved(name: str, tensor: Tensor) -> Tensor:
    """Move a tensor by 1 % of noise of its own."""
    seed = torch.Generator().manual_seed(len(name))
    return tensor + torch.randn(tensor.shape, generator=seed).to(tensor.dtype) / 100


@pytest.fixture
def base(save_llama: SaveLlama) -> Path:
    return save_llama("base", num_hidden_layers=2, tie_word_embeddings=False)


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    return tune(base, tmp_path / "tuned", moved)


def extracted(tmp_path: Path, text: str) -> merge.Surveyed:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge: {{extract_lora: {{base: ./base, tuned: ./tuned, {text}}}}}\n")
    made = compositions.compose(compositions.load(path))
    assert isinstance(made, merge.Surveyed)
    return made


def folder(tmp_path: Path, text: str, **limits: Any) -> tuple[Path, merge.Receipt]:
    return tmp_path / "out", merge.build(extracted(tmp_path, text), tmp_path / "out", force=True, **limits)


def change(base: Path, tuned: Path, name: str) -> Any:
    before, after = (load_file(one / "model.safetensors")[f"{name}.weight"].double().numpy() for one in (base, tuned))
    return after - before


def cut(matrix: Any, rank: int) -> Tensor:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ vt[:rank])


def test_the_change_is_numpys_truncated_decomposition(base: Path, tuned: Path, tmp_path: Path) -> None:
    out, _ = folder(tmp_path, "rank: 3")
    ours = deltas(opened(base, out), "n0")
    assert len(ours) == 2 * 7
    expected = {path: cut(change(base, tuned, path.removeprefix("base_model.model.")), 3) for path in ours}
    assert_near(ours, expected, 2e-6)


def test_with_the_full_rank_and_all_else_stored_peft_gives_the_tuned_model_back(
    base: Path, tuned: Path, tmp_path: Path
) -> None:
    out, receipt = folder(tmp_path, "rank: 16")
    model = opened(base, out).merge_and_unload().state_dict()
    for name, tensor in load_file(tuned / "model.safetensors").items():
        torch.testing.assert_close(model[name], tensor, rtol=1e-5, atol=1e-6)
    (note,) = receipt.notes
    assert note.startswith("7 other tensors changed (‖Δ‖ / ‖base‖) and are stored whole, 5.4 kB: lm_head.weight (")
    again = compositions.lora(base=merge.open(base), adapters=[merge.open_adapter(out)])
    for name, tensor in load_file(tuned / "model.safetensors").items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_share_kept_of_each_matrix_is_written(base: Path, tuned: Path, tmp_path: Path) -> None:
    out, _ = folder(tmp_path, "rank: 3")
    rows = {row["module"]: row for row in csv.DictReader((out / "energy.csv").read_text().splitlines())}
    assert len(rows) == 2 * 7
    values = np.linalg.svd(change(base, tuned, UP), compute_uv=False) ** 2
    assert rows[UP]["rank"] == "3"
    assert float(rows[UP]["energy"]) == pytest.approx(values[:3].sum() / values.sum(), rel=1e-6)
    assert float(rows[UP]["change"]) == pytest.approx(values.sum() ** 0.5, rel=1e-6)


def test_an_energy_chooses_the_smallest_rank_that_keeps_it(base: Path, tuned: Path, tmp_path: Path) -> None:
    out, receipt = folder(tmp_path, "energy: 0.7")
    config = json.loads((out / "adapter_config.json").read_text())
    stored = load_file(out / "adapter_model.safetensors")
    (found,) = receipt.surveys.values()
    ranks = set()
    for row in csv.DictReader((out / "energy.csv").read_text().splitlines()):
        values = np.linalg.svd(change(base, tuned, row["module"]), compute_uv=False) ** 2
        shares = values.cumsum() / values.sum()
        rank = int(row["rank"])
        assert shares[rank - 1] >= 0.7 > shares[rank - 2]
        assert float(row["energy"]) == pytest.approx(shares[rank - 1], rel=1e-6)
        assert found[f"{row['module']}.weight"]["rank"] == rank
        assert stored[f"base_model.model.{row['module']}.lora_A.weight"].shape[0] == rank
        ranks.add(rank)
    assert config["r"] == max(ranks)
    assert len(ranks) > 1
    opened(base, out)


def test_unchanged_matrices_get_no_factors_by_energy(base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path / "tuned", lambda name, one: moved(name, one) if UP in name else one)
    out, receipt = folder(tmp_path, "energy: 0.5")
    names = [f"base_model.model.{UP}.lora_{side}.weight" for side in "AB"]
    assert list(load_file(out / "adapter_model.safetensors")) == names
    assert receipt.notes == ()


@pytest.mark.usefixtures("tuned")
def test_what_else_changed_is_left_out_with_a_note(base: Path, tmp_path: Path) -> None:
    out, receipt = folder(tmp_path, "rank: 2, rest: drop")
    (note,) = receipt.notes
    assert note.startswith("7 other tensors changed (‖Δ‖ / ‖base‖) and are left out: lm_head.weight (0.")
    assert note in (out / "README.md").read_text()
    assert all("lora_" in name for name in load_file(out / "adapter_model.safetensors"))
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"] is None
    opened(base, out)


def test_embedding_and_head_are_taken_where_they_are_asked_for(base: Path, tuned: Path, tmp_path: Path) -> None:
    out, _ = folder(tmp_path, "rank: 4, modules: '*embed_tokens.weight|lm_head.weight'")
    stored = load_file(out / "adapter_model.safetensors")
    assert stored["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (4, 40)
    ours = deltas(opened(base, out), "n0")
    assert_near(ours, {path: cut(change(base, tuned, path[17:]), 4) for path in ours}, 2e-6)


def test_weights_that_gpt2_stores_transposed_are_recognised(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**small, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "base")
    tune(tmp_path / "base", tmp_path / "tuned", lambda name, one: one if "wte" in name else moved(name, one))
    out, _ = folder(tmp_path, "rank: 16")
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"]
    model = opened(tmp_path / "base", out).merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "tuned" / "model.safetensors").items():
        torch.testing.assert_close(model[name], tensor, rtol=1e-5, atol=1e-6)


def test_threads_leave_no_trace(save_llama: SaveLlama, tmp_path: Path) -> None:
    base = save_llama("base", num_hidden_layers=2, hidden_size=160, intermediate_size=500)
    tune(base, tmp_path / "tuned", lambda name, one: one if "embed" in name else moved(name, one))
    made = [folder(tmp_path, "energy: 0.3", threads=threads)[1] for threads in (1, 2)]
    assert made[0].outputs == made[1].outputs
    assert made[0].surveys == made[1].surveys


def test_large_matrices_are_decomposed_by_iteration_to_the_same_change() -> None:
    seed = torch.Generator().manual_seed(0)
    rows, columns, rank = EXACT_UP_TO + 276, EXACT_UP_TO + 76, 8
    left, _ = torch.linalg.qr(torch.randn(rows, 60, generator=seed, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, 60, generator=seed, dtype=torch.float64))
    values = 0.9 ** torch.arange(60, dtype=torch.float64)  # a slow decay: the 9th value is 0.43 of the first
    matrix = (left * values) @ right.T
    method = OfMatrix("layer", rank)
    assert not method.is_exact(rows, columns)
    found = method(lambda _index, _part: matrix.float())
    best = (left[:, :rank] * values[:rank]) @ right[:, :rank].T
    assert (found.b @ found.a - best).norm() < 1e-3 * best.norm()
    assert found.kept / found.whole == pytest.approx(
        float(values[:rank].square().sum() / values.square().sum()), rel=1e-5
    )
    assert torch.equal(found.b, method(lambda _index, _part: matrix.float()).b)


@pytest.mark.usefixtures("tuned")
@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("rank: 2, energy: 0.5", "extract_lora: needs a rank or an energy, exactly one of them"),
        ("rest: drop", "extract_lora: needs a rank or an energy, exactly one of them"),
        ("rank: 2, modules: '*.q_porj.*'", "extract_lora: no matrix is called '*.q_porj.*'"),
        ("energy: 1.5", "energy is 1.5: input should be less than or equal to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(merge.RecipeError) as caught:
        extracted(tmp_path, text)
    assert [mistake.what for mistake in caught.value.mistakes] == [what]


def test_an_embedding_that_the_head_is_tied_to_is_not_taken(save_llama: SaveLlama, tmp_path: Path) -> None:
    base = save_llama("base", num_hidden_layers=2, tie_word_embeddings=True)
    tune(base, tmp_path / "tuned", moved)
    with pytest.raises(merge.RecipeError, match=r"embed_tokens\.weight: the head is tied to it"):
        extracted(tmp_path, "rank: 2, modules: '*'")
    with pytest.raises(merge.MergeError, match=r"embed_tokens\.weight changed(?s:.*)hint: rest: drop leaves it out"):
        folder(tmp_path, "rank: 2")
    folder(tmp_path, "rank: 2, rest: drop")


def test_equal_models_and_damaged_ones_are_refused(base: Path, tmp_path: Path) -> None:
    tune(base, tmp_path / "tuned", lambda _name, one: one)
    with pytest.raises(merge.MergeError, match="does not differ from the base in any of the matrices"):
        folder(tmp_path, "energy: 0.5")
    tune(base, tmp_path / "tuned", lambda name, one: one * float("nan") if UP in name else one)
    for text in ("rank: 2", "energy: 0.5"):
        with pytest.raises(merge.MergeError, match=r"tensor .*up_proj.*: (copy: )?holds NaN"):
            folder(tmp_path, text)


@pytest.mark.usefixtures("tuned")
def test_a_bf16_result_is_rounded_once(base: Path, tmp_path: Path) -> None:
    out, _ = folder(tmp_path, "rank: 2")
    exact = load_file(out / "adapter_model.safetensors")
    out, _ = folder(tmp_path, "rank: 2", dtype="bfloat16")
    rounded = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)


def test_tensors_that_only_one_model_has_are_refused_or_left_out(base: Path, tuned: Path, tmp_path: Path) -> None:
    tensors = load_file(tuned / "model.safetensors")
    save_file({**tensors, "value_head.weight": torch.ones(1, 16)}, tuned / "model.safetensors")
    with pytest.raises(merge.RecipeError, match=r"base lacks 1 tensors that others have: value_head\.weight"):
        extracted(tmp_path, "rank: 2")
    out, receipt = folder(tmp_path, "rank: 2, unmatched: drop")
    assert receipt.notes[0] == "1 tensors that not every model has were left out: value_head.weight"
    opened(base, out)
