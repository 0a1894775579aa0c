"""Adapters combined into an adapter: peft's own combinations and forward passes as oracles, and arithmetic in fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from portmanteau import compositions, merge
from tests.conftest import SaveLlama
from tests.test_lora import OF_Q, edit, rewrite, save_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",  # peft: it saves the base's embedding along
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft calls transformers by an old name
)
ATTENTION = ["q_proj", "v_proj"]
Deltas = dict[str, Tensor]


@pytest.fixture
def base(save_llama: SaveLlama) -> Path:
    return save_llama("base", num_hidden_layers=2, tie_word_embeddings=False)


def composed(tmp_path: Path, text: str) -> merge.Composed:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge: {{lora: {{{text}}}}}\n")
    return compositions.compose(compositions.load(path))


def combined(tmp_path: Path, text: str) -> Path:
    """Build what a recipe gives, and give the adapter's folder."""
    merge.build(composed(tmp_path, text), tmp_path / "out", force=True)
    return tmp_path / "out"


def opened(base: Path, adapter: Path, *others: Path) -> Any:
    """Load adapters with peft, under the names n0, n1, n2 …; every tensor of each must find its place."""
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, "n0")
    for i, other in enumerate(others, 1):
        model.load_adapter(other, f"n{i}")
    for i, folder in enumerate((adapter, *others)):
        state = peft.get_peft_model_state_dict(model, adapter_name=f"n{i}")
        stored = load_file(folder / "adapter_model.safetensors")
        factors = {key for key in stored if "lora_" in key}
        assert factors == {key for key in state if "lora_" in key}
        assert all(torch.equal(state[key], stored[key]) for key in factors)
    return model


def deltas(model: Any, name: str) -> Deltas:
    """Give what an adapter adds to every module, by peft's own arithmetic."""
    return {
        path: module.get_delta_weight(name).detach()
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and (name in module.lora_A or name in module.lora_embedding_A)
    }


def weighted(model: Any, weights: list[float]) -> Deltas:
    """Give Σ w Δ over the loaded adapters in fp64."""
    total: Deltas = {}
    for i, weight in enumerate(weights):
        for path, delta in deltas(model, f"n{i}").items():
            total[path] = total.get(path, torch.zeros(delta.shape, dtype=torch.float64)) + weight * delta.double()
    return total


def assert_near(ours: Deltas, theirs: Deltas, tolerance: float = 1e-5) -> None:
    """Compare matrix by matrix, relative to the size of each."""
    assert ours.keys() == theirs.keys()
    for path, delta in ours.items():
        assert (delta.double() - theirs[path].double()).norm() <= tolerance * theirs[path].double().norm(), path


def truncated(total: Deltas, rank: int) -> Deltas:
    """Cut matrices to a rank by numpy's decomposition, in fp64."""
    import numpy as np

    result = {}
    for path, delta in total.items():
        u, s, vt = np.linalg.svd(delta.double().numpy(), full_matrices=False)
        result[path] = torch.from_numpy((u[:, :rank] * s[:rank]) @ vt[:rank])
    return result


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"target_modules": ATTENTION, "lora_alpha": 16}, {"target_modules": ATTENTION, "lora_alpha": 3}),
    "ranks": (
        {"target_modules": ATTENTION, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5}},
        {"target_modules": [*ATTENTION, "up_proj"], "r": 3},
    ),
    "rslora": (
        {"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 3},
        {"target_modules": ATTENTION, "use_rslora": True, "r": 6},
    ),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["embed_tokens", "lm_head"]}),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def pair(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Save two adapters, swahili and math."""
    one, two = request.param
    return save_adapter(base, tmp_path / "swahili", **one), save_adapter(base, tmp_path / "math", seed=2, **two)


def save_two(base: Path, tmp_path: Path, **same: Any) -> tuple[Path, Path]:
    """Save two adapters, swahili and math, of one config."""
    names = ("swahili", "math")
    one, two = (save_adapter(base, tmp_path / name, seed=seed, **same) for seed, name in enumerate(names, 1))
    return one, two


TWO = "adapters: {./swahili: 1.0, ./math: -0.7}"


# --------------------------------------------------------------------------------------------------- against arithmetic


def test_cat_is_the_exact_sum_of_the_changes(base: Path, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = combined(tmp_path, TWO)
    assert_near(deltas(opened(base, out), "n0"), weighted(opened(base, *pair), [1.0, -0.7]), 1e-6)


def test_svd_of_the_full_rank_is_the_exact_sum(base: Path, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = combined(tmp_path, f"{TWO}, combine: svd, rank: 16")
    assert_near(deltas(opened(base, out), "n0"), weighted(opened(base, *pair), [1.0, -0.7]), 1e-6)


def test_svd_of_a_lower_rank_is_the_best_approximation(base: Path, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    out = combined(tmp_path, f"{TWO}, combine: svd, rank: 3")
    assert_near(deltas(opened(base, out), "n0"), truncated(weighted(opened(base, *pair), [1.0, -0.7]), 3), 1e-6)
    assert config(out)["r"] == 3


def test_the_merged_model_computes_what_the_sum_of_both_does(base: Path, tmp_path: Path) -> None:
    adapters = save_two(base, tmp_path, target_modules=ATTENTION, use_rslora=True)
    model = AutoModelForCausalLM.from_pretrained(base)
    state = model.state_dict()
    for path, delta in weighted(opened(base, *adapters), [1.0, -0.7]).items():
        state[f"{path.removeprefix('base_model.model.')}.weight"] += delta.float()
    words = torch.tensor([[3, 1, 4, 1, 5]])
    expected = model(words).logits
    for text in ("combine: cat", "combine: svd, rank: 8"):
        out = opened(base, combined(tmp_path, f"{TWO}, {text}"))
        torch.testing.assert_close(out(words).logits, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- against peft


TIES = "ties: {density: 0.3, elect: unweighted, divide: count}"
PEFT: list[tuple[str, dict[str, Any]]] = [
    ("combine: cat", {"combination_type": "cat"}),
    ("combine: svd, rank: 3", {"combination_type": "svd", "svd_rank": 3}),
    (f"combine: {{{TIES}, rank: 4}}", {"combination_type": "ties_svd", "svd_rank": 4, "density": 0.3}),
    (f"combine: {{{TIES}}}", {"combination_type": "ties_svd", "density": 0.3}),
    ("combine: {task_arithmetic: {}, rank: 2}", {"combination_type": "svd", "svd_rank": 2}),
    ("combine: linear", {"combination_type": "linear"}),
]


@pytest.mark.parametrize(("text", "arguments"), PEFT, ids=[text for text, _ in PEFT])
@pytest.mark.parametrize("kind", ["plain", "ranks"])
def test_combinations_are_those_of_peft(
    base: Path, tmp_path: Path, kind: str, text: str, arguments: dict[str, Any]
) -> None:
    one, two = KINDS[kind]
    if arguments["combination_type"] == "linear":
        one, two = {**one, "rank_pattern": {}}, {**two, "r": 4}
    pair = save_adapter(base, tmp_path / "swahili", **one), save_adapter(base, tmp_path / "math", seed=2, **two)
    model = opened(base, *pair)
    model.add_weighted_adapter(["n0", "n1"], [1.0, -0.7], "both", **arguments)
    assert_near(deltas(opened(base, combined(tmp_path, f"{TWO}, {text}")), "n0"), deltas(model, "both"))


def test_one_adapter_gives_its_change_by_every_way(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "swahili", target_modules=ATTENTION, lora_alpha=16)
    expected = weighted(opened(base, adapter), [-0.5])
    for way in ("cat", "svd", "linear", "{linear: {normalize: false}}"):
        out = combined(tmp_path, f"adapters: {{./swahili: -0.5}}, combine: {way}")
        assert_near(deltas(opened(base, out), "n0"), expected, 1e-6)


def test_linear_adds_cross_terms_to_the_sum(base: Path, tmp_path: Path) -> None:
    tensors = [
        load_file(one / "adapter_model.safetensors") for one in save_two(base, tmp_path, target_modules=ATTENTION)
    ]
    a, b = ([one[f"{OF_Q}.lora_{side}.weight"].double() for one in tensors] for side in "AB")
    scaling, root = 8 / 4, 0.7**0.5
    exact = scaling * (b[0] @ a[0] - 0.7 * b[1] @ a[1])
    cross = scaling * root * (b[1] @ a[0] - b[0] @ a[1])
    out = deltas(opened(base, combined(tmp_path, f"{TWO}, combine: linear")), "n0")[OF_Q]
    torch.testing.assert_close(out.double(), exact + cross, rtol=1e-5, atol=1e-7)


def test_dare_then_svd_has_the_sum_as_its_mean(base: Path, tmp_path: Path) -> None:
    pair = save_two(base, tmp_path, target_modules=["q_proj"])
    expected = weighted(opened(base, *pair), [1.0, -0.7])[OF_Q]
    found = []
    for seed in range(60):
        merged = composed(tmp_path, f"{TWO}, combine: {{dare: {{density: 0.5, seed: {seed}}}, rank: 16}}")
        found.append((merged[f"{OF_Q}.lora_B.weight"] @ merged[f"{OF_Q}.lora_A.weight"]).double())
    kept = torch.stack(found)
    off = (kept.mean(dim=0) - expected) / (kept.std(dim=0) / 60**0.5).clamp(min=1e-9)
    assert off.abs().max() < 5  # standard errors, over 256 entries
    assert abs(off.square().mean() - 1) < 0.4


# ---------------------------------------------------------------------------------------------------------- the folder


def test_the_config_says_what_the_weights_are(base: Path, tmp_path: Path) -> None:
    same = {"task_type": "CAUSAL_LM", "lora_alpha": 16}
    save_adapter(base, tmp_path / "swahili", target_modules=["q_proj"], **same)
    save_adapter(base, tmp_path / "math", r=2, target_modules=["q_proj", "up_proj"], layers_to_transform=[1], **same)
    merged = composed(tmp_path, TWO)
    out = combined(tmp_path, TWO)
    found = config(out)
    q, up = (f"model.layers.1.{name}" for name in ("self_attn.q_proj", "mlp.up_proj"))
    assert found["target_modules"] == [q.replace("1", "0"), q, up]
    assert (found["r"], found["lora_alpha"], found["task_type"]) == (6, 6, "CAUSAL_LM")
    assert found["rank_pattern"] == {r"model\.layers\.0\.self_attn\.q_proj": 4, r"model\.layers\.1\.mlp\.up_proj": 2}
    # what swahili alone changes keeps its A and B, and alpha its weight: 1.0 · 16; a weight below 0 goes into A
    assert found["alpha_pattern"] == {r"model\.layers\.0\.self_attn\.q_proj": 16, r"model\.layers\.1\.mlp\.up_proj": 2}
    assert found["base_model_name_or_path"] == str(base)
    assert not found["use_rslora"]
    assert merged.notes == (
        "./swahili: lacks 1 modules of the others; its change of them is zero",
        "./math: lacks 1 modules of the others; its change of them is zero",
    )
    card = (out / "README.md").read_text()
    assert "library_name: peft" in card
    assert "A merged LoRA adapter" in card
    assert "lacks 1 modules" in card
    assert not (out / "config.json").exists()


def test_adapters_that_name_other_bases_are_combined_with_a_note(base: Path, tmp_path: Path) -> None:
    one, _ = save_two(base, tmp_path, target_modules=["q_proj"])
    rewrite(one, base_model_name_or_path="/elsewhere/base")
    merged = composed(tmp_path, TWO)
    what = "the adapters' configs differ in base_model_name_or_path, which is left empty"
    assert merged.notes == (f"{what}: ./swahili '/elsewhere/base', ./math '{base}'",)
    assert config(combined(tmp_path, TWO))["base_model_name_or_path"] is None


@pytest.mark.parametrize("saved", ["modules_to_save", "bias"])
def test_what_one_adapter_stores_whole_is_carried(save_llama: SaveLlama, tmp_path: Path, saved: str) -> None:
    base = save_llama("base", num_hidden_layers=2, tie_word_embeddings=False, attention_bias=True)
    own = {"modules_to_save": ["lm_head", "norm"]} if saved == "modules_to_save" else {"bias": "lora_only"}
    one = save_adapter(base, tmp_path / "swahili", target_modules=["q_proj"], **own)
    save_adapter(base, tmp_path / "math", seed=2, target_modules=ATTENTION)
    out = combined(tmp_path, TWO)
    name = "lm_head" if saved == "modules_to_save" else "model.layers.0.self_attn.q_proj"
    leaf = "weight" if saved == "modules_to_save" else "bias"
    ours, theirs = (opened(base, folder).merge_and_unload().state_dict()[f"{name}.{leaf}"] for folder in (out, one))
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, merge.open(base)[f"{name}.{leaf}"])


def test_the_result_is_an_input_again(base: Path, tmp_path: Path) -> None:
    pair = save_two(base, tmp_path, target_modules=["q_proj", "embed_tokens"])
    combined(tmp_path, TWO)
    again = compositions.lora(base=merge.open(base), adapters=[merge.open_adapter(tmp_path / "out")])
    total = weighted(opened(base, *pair), [1.0, -0.7])
    for path, delta in total.items():
        name = f"{path.removeprefix('base_model.model.')}.weight"
        torch.testing.assert_close(again[name], (merge.open(base)[name] + delta).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["svd, rank: 3", "{ties: {density: 0.5}, rank: 3}", "linear"])
def test_with_a_base_the_combined_adapter_is_folded_in(base: Path, tmp_path: Path, way: str) -> None:
    save_two(base, tmp_path, target_modules=["q_proj", "embed_tokens"])
    model = opened(base, combined(tmp_path, f"{TWO}, combine: {way}")).merge_and_unload().state_dict()
    merged = composed(tmp_path, f"base: ./base, {TWO}, combine: {way}")
    for name in merged:
        torch.testing.assert_close(merged[name], model[name], rtol=1e-5, atol=1e-6)


def test_threads_and_memory_leave_no_trace(save_llama: SaveLlama, tmp_path: Path) -> None:
    base = save_llama("base", num_hidden_layers=2, hidden_size=160, intermediate_size=500)
    save_two(base, tmp_path, target_modules=["up_proj", "q_proj"])
    for way in ("svd, rank: 5", "{dare: {density: 0.5}, rank: 5}", "cat"):
        merged = composed(tmp_path, f"{TWO}, combine: {way}")
        made = [
            merge.build(merged, tmp_path / "out", threads=threads, memory=memory, force=True).outputs
            for threads, memory in ((1, None), (2, None), (2, 16 << 20))
        ]
        assert made[0] == made[1] == made[2]


def test_signs_are_fixed(base: Path, tmp_path: Path) -> None:
    save_two(base, tmp_path, target_modules=["q_proj"])
    b = composed(tmp_path, f"{TWO}, combine: svd, rank: 8")[f"{OF_Q}.lora_B.weight"]
    assert all(column[column.abs().argmax()] > 0 for column in b.T)


# ------------------------------------------------------------------------------------------------------------ refusals


def mistakes(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(merge.RecipeError) as caught:
        composed(tmp_path, text)
    return [mistake.what for mistake in caught.value.mistakes]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("combine: cat, rank: 3", "lora: combine: cat chooses the rank itself"),
        ("combine: {tise: {}}", "lora: unknown operator 'tise'"),
        ("combine: {ties: {densty: 1}}", "lora: ties has no setting 'densty'"),
        ("combine: {ties: {density: 2}}", "lora: density is 2: input should be less than or equal to 1"),
        ("combine: {ties: {weight: 2}}", "lora: the weights stand beside the adapters"),
        ("combine: {ties: {}, linear: {}}", "lora: must name one operator, with its settings"),
        ("combine: {ties: {}, rank: 2}, rank: 3", "lora: rank is given twice"),
        ("combine: {ties: {}, rank: 0}", "lora: rank is 0, not a whole number above 0"),
        ("combine: {slerp: {t: 0.5}}", "lora: slerp takes no weights"),
    ],
)
def test_ways_that_cannot_be_meant_are_refused(base: Path, tmp_path: Path, text: str, what: str) -> None:
    save_two(base, tmp_path, target_modules=["q_proj"])
    assert mistakes(tmp_path, f"{TWO}, {text}") == [what]


def test_dora_is_refused_with_a_cure(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "swahili", target_modules=["q_proj"], use_dora=True)
    save_adapter(base, tmp_path / "math", target_modules=["q_proj"])
    what = "lora: ./swahili: is DoRA: what it does depends on its base and cannot be combined"
    assert mistakes(tmp_path, TWO) == [what]


def test_tensors_stored_whole_by_several_or_by_weight_are_refused(base: Path, tmp_path: Path) -> None:
    save_two(base, tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert mistakes(tmp_path, TWO) == [
        "lora: ./swahili, ./math store tensors whole, which only one of the adapters may: lm_head.weight",
        "lora: ./math: stores tensors whole, which cannot be done at weight -0.7: lm_head.weight",
    ]


def test_adapters_of_other_shapes_are_refused(base: Path, save_llama: SaveLlama, tmp_path: Path) -> None:
    wide = save_llama("wide", num_hidden_layers=1, hidden_size=32)
    save_adapter(base, tmp_path / "swahili", target_modules=["q_proj"])
    save_adapter(wide, tmp_path / "math", target_modules=["q_proj"])
    shapes = "./swahili [16, 16], ./math [32, 32]"
    assert mistakes(tmp_path, TWO) == [f"lora: model.layers.0.self_attn.q_proj: shapes differ: {shapes}"]


def test_linear_needs_equal_ranks(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "swahili", target_modules=["q_proj"], layers_to_transform=[0])
    save_adapter(base, tmp_path / "math", r=2, target_modules=["q_proj"], layers_to_transform=[0])
    what = "lora: linear adds A and B by themselves, and the ranks of model.layers.0.self_attn.q_proj differ"
    assert mistakes(tmp_path, f"{TWO}, combine: linear") == [f"{what}: ./swahili 4, ./math 2"]


def test_damaged_factors_are_named(base: Path, tmp_path: Path) -> None:
    one, _ = save_two(base, tmp_path, target_modules=["q_proj"])
    edit(one, lambda tensors: tensors[f"{OF_Q}.lora_A.weight"].fill_(float("nan")))
    with pytest.raises(merge.MergeError, match=r"q_proj\.lora_[AB]\.weight.*\n?.*holds NaN"):
        merge.build(composed(tmp_path, f"{TWO}, combine: svd"), tmp_path / "out")
