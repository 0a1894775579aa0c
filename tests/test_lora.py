"""LoRA adapters folded into their base: peft and arithmetic in fp64 as oracles, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from portmanteau import compositions, merge
from portmanteau.compositions import tensorwise
from portmanteau.merge.compiled import library
from portmanteau.merge.limits import Limits
from tests.conftest import SaveLlama

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",  # peft: it saves the base's embedding along
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",  # peft: and corrects it
    "ignore:The following alpha_pattern keys did not match any targeted module:RuntimeWarning",  # one is to match none
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft calls transformers by an old name
)
ATTENTION = ["q_proj", "v_proj"]


def save_adapter(base: Path, folder: Path, *, seed: int = 1, **config: Any) -> Path:
    """Save an adapter with random weights, whole tensors changed too, as peft does."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "init_lora_weights": False, **config}))
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            parameter.data += torch.rand_like(parameter) / 2
        if config.get("bias", "none") != "none" and name.endswith("bias"):
            parameter.data += torch.rand_like(parameter)
    wrapped.save_pretrained(folder)
    return folder


def folded_by_peft(base: Path, adapter: Path) -> dict[str, Tensor]:
    wrapped = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return dict(wrapped.merge_and_unload().state_dict())


def folded(base: Path, *adapters: Path) -> merge.Composed:
    return compositions.lora(base=merge.open(base), adapters=[merge.open_adapter(adapter) for adapter in adapters])


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def recipe(tmp_path: Path, adapters: str) -> merge.Composed:
    path = tmp_path / "lora.yaml"
    path.write_text(dedent(f"merge: {{lora: {{base: ./base, adapters: {adapters}}}}}\n"))
    return compositions.compose(compositions.load(path))


def rewrite(adapter: Path, **config: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def edit(adapter: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


Q = "model.layers.0.self_attn.q_proj.weight"
OF_Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(save_llama: SaveLlama) -> Path:
    return save_llama("base", num_hidden_layers=2, tie_word_embeddings=False)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**small, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


# ----------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ATTENTION},
        {"target_modules": "all-linear", "lora_alpha": 3},
        {"target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 3},
        {
            "target_modules": [*ATTENTION, "up_proj"],
            "rank_pattern": {r"layers\.1\..*_proj": 3, "q_proj": 2},  # peft sorts them when it saves
            "alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 5, "proj": 16, "v_proj": 7},
        },
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ATTENTION, "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    ],
    ids=lambda config: "-".join(config),
)
def test_one_adapter_gives_what_peft_merges(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **config)
    ours, theirs = folded(base, adapter), folded_by_peft(base, adapter)
    assert set(ours) == set(theirs)
    assert_same(ours, theirs)
    changed = merge.open(base)
    assert any(not torch.equal(ours[name], changed[name]) for name in ours)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["c_attn", "c_proj", "c_fc"]},
        {"target_modules": ["c_attn", "c_proj"], "bias": "all"},
        {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only"},
    ],
    ids=lambda config: "-".join(config),
)
def test_weights_that_gpt2_stores_transposed_get_the_transpose(
    gpt2: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    adapter = save_adapter(gpt2, tmp_path / "adapter", **config)
    ours = folded(gpt2, adapter)
    assert_same(ours, folded_by_peft(gpt2, adapter))


def test_square_weights_are_refused_where_the_config_contradicts_the_others(gpt2: Path, tmp_path: Path) -> None:
    adapter = save_adapter(gpt2, tmp_path / "adapter", target_modules=["c_attn", "c_proj"])
    rewrite(adapter, fan_in_fan_out=False)  # peft writes down what the last module was
    with pytest.raises(merge.MergeError) as caught:
        folded(gpt2, adapter)
    what = "is square: nothing shows whether it is stored transposed"
    expected = [f"{adapter}: transformer.h.{layer}.attn.c_proj.weight {what}" for layer in (0, 1)]
    assert [mistake.what for mistake in caught.value.mistakes] == expected


def test_dora_of_transposed_weights_is_refused(gpt2: Path, tmp_path: Path) -> None:
    adapter = save_adapter(gpt2, tmp_path / "adapter", target_modules=["c_attn"], use_dora=True)
    with pytest.raises(merge.MergeError, match=r"DoRA of tensors stored transposed \(Conv1D, embeddings\)"):
        folded(gpt2, adapter)


def test_names_without_the_prefix_of_the_head_model_are_found(gpt2: Path, tmp_path: Path) -> None:
    adapter = save_adapter(gpt2, tmp_path / "adapter", target_modules=["c_attn"])
    theirs = folded_by_peft(gpt2, adapter)
    tensors = load_file(gpt2 / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, gpt2 / "model.safetensors")  # as the Hub's gpt2 is
    ours = folded(gpt2, adapter)
    assert_same({f"transformer.{name}": ours[name] for name in ours}, theirs)
    assert ours.notes == (f"{adapter}: 2 tensors renamed to those of the base: prefix 'transformer.' removed",)


def exact(base: Path, parts: Mapping[Path, float], name: str) -> Tensor:
    """W + Σ w · (alpha / r) · B A in fp64, by hand."""
    total = load_file(base / "model.safetensors")[name].double()
    for adapter, weight in parts.items():
        config = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(adapter / "adapter_model.safetensors")
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in tensors:
            a, b = tensors[f"{key}.lora_A.weight"].double(), tensors[f"{key}.lora_B.weight"].double()
            total = total + weight * config["lora_alpha"] / config["r"] * b @ a
    return total


def test_two_adapters_at_weights_are_summed_and_a_missing_module_is_zero(base: Path, tmp_path: Path) -> None:
    swahili = save_adapter(base, tmp_path / "swahili", target_modules=["q_proj", "o_proj"], lora_alpha=16)
    math = save_adapter(base, tmp_path / "math", seed=2, r=2, target_modules=["q_proj", "up_proj"])
    merged = recipe(tmp_path, "{./swahili: 1.0, ./math: -0.7}")
    untouched = merge.open(base)
    for name in merged:
        expected = exact(base, {swahili: 1.0, math: -0.7}, name).float()
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-6)
        if "k_proj" in name or "norm" in name:
            assert torch.equal(merged[name], untouched[name])


def test_a_bf16_base_with_fp32_adapters_is_summed_exactly_and_cast_once(save_llama: SaveLlama, tmp_path: Path) -> None:
    base = save_llama("base", num_hidden_layers=2, hidden_size=64, dtype=torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    assert load_file(adapter / "adapter_model.safetensors")[f"{OF_Q}.lora_A.weight"].dtype == torch.float32
    once = exact(base, {adapter: 1.0}, Q).bfloat16()
    twice = merge.open(base)[Q] + (exact(base, {adapter: 1.0}, Q) - merge.open(base)[Q].double()).bfloat16()
    ours = folded(base, adapter)[Q]
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, once)
    assert not torch.equal(ours, twice)


def test_a_dora_adapter_over_bf16_rescales_every_row(save_llama: SaveLlama, tmp_path: Path) -> None:
    base = save_llama("base", num_hidden_layers=2, dtype=torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=ATTENTION, use_dora=True)
    rows = exact(base, {adapter: 1.0}, Q)
    magnitude = load_file(adapter / "adapter_model.safetensors")[f"{OF_Q}.lora_magnitude_vector"]
    expected = magnitude.double()[:, None] * rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(folded(base, adapter)[Q], expected.bfloat16())


@pytest.mark.parametrize("use_dora", [False, True])
def test_parts_threads_and_memory_leave_no_trace(save_llama: SaveLlama, tmp_path: Path, use_dora: bool) -> None:
    base = save_llama("base", num_hidden_layers=1, hidden_size=320, intermediate_size=1100)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["up_proj", "down_proj"], use_dora=use_dora)
    merged = folded(base, adapter)
    receipts = [
        merge.build(merged, tmp_path / f"out-{threads}-{memory}", threads=threads, memory=memory)
        for threads, memory in ((1, None), (2, None), (2, 8 << 20))
    ]
    assert Limits.of(2, 8 << 20).session(merge.make_plan(merged))[1].part < 1 << 18
    assert receipts[0].outputs == receipts[1].outputs == receipts[2].outputs
    name = "model.layers.0.mlp.up_proj.weight"
    whole = merged[name].reshape(-1)
    assert torch.equal(load_file(tmp_path / "out-1-None" / "model.safetensors")[name].reshape(-1), whole)
    assert torch.equal(torch.cat([merged.read(name, slice(0, 70_001)), merged.read(name, slice(70_001, None))]), whole)


# -------------------------------------------------------------------------------------------------------------- recipes


def test_a_recipe_builds_a_model_that_transformers_loads(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "swahili", target_modules=ATTENTION)
    merged = recipe(tmp_path, "[./swahili]")
    receipt = merge.build(merged, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(dict(model.state_dict()), folded_by_peft(base, adapter))
    stored = [(one["checkpoint"], one["files"][0]["file"]) for one in receipt.inputs]
    assert stored == [("./base", "model.safetensors"), ("./swahili", "adapter_model.safetensors")]
    assert all(len(one["files"][0]["header"]) == 64 for one in receipt.inputs)
    untouched = [row for row in receipt.choices if row["operator"] == "copy"]
    assert [(row["models"], row["tensors"]) for row in untouched] == [(("base",), 17)]


def test_the_command_line_checks_it_and_builds_it_without_torch(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "swahili", target_modules=ATTENTION)
    path = tmp_path / "lora.yaml"
    path.write_text("merge: {lora: {base: ./base, adapters: {./swahili: 1}}}\n")
    program = (
        "import sys; from portmanteau.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('torch' in sys.modules)"
    )
    for command in (["plan", path], ["build", path, tmp_path / "out"]):
        words = [sys.executable, "-c", program, *map(str, command)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.splitlines()[-1] == str(command[0] == "build" and library.library() is None)
    built = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(built[Q], folded_by_peft(base, adapter)[Q])


def test_a_plan_counts_the_bytes_of_the_factors(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "swahili", target_modules=["q_proj"])
    plan = merge.make_plan(folded(base, adapter))
    assert plan.bytes_read == plan.bytes_written + 2 * 2 * 4 * 16 * 4  # 2 layers, A and B, rank 4, 16 wide, fp32


def test_named_adapters_nest_in_steps_and_swaps(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "swahili", target_modules=ATTENTION)
    path = tmp_path / "nested.yaml"
    path.write_text(
        "models: {base: ./base, sw: ./swahili}\n"
        "steps: {expert: {lora: {base: base, adapters: {sw: 1.0}}}}\n"
        "merge: {layer_swap: {task: base, language: expert, bottom: 1, top: 0, transition: 0}}\n"
    )
    merged = compositions.compose(compositions.load(path))
    theirs = folded_by_peft(base, adapter)
    torch.testing.assert_close(merged[Q], theirs[Q])
    upper = Q.replace("layers.0", "layers.1")
    assert torch.equal(merged[upper], merge.open(base)[upper])


def test_legacy_adapter_files_are_read(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    expected = folded(base, adapter)[Q]
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert torch.equal(folded(base, adapter)[Q], expected)


def test_a_list_may_hold_a_pattern(base: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        save_adapter(base, tmp_path / f"seed-{seed}", seed=seed, target_modules=["q_proj"])
    merged = recipe(tmp_path, "[./seed-*]")
    expected = exact(base, {tmp_path / "seed-1": 1.0, tmp_path / "seed-2": 1.0}, Q).float()
    torch.testing.assert_close(merged[Q], expected)


def test_a_recipe_names_the_line_of_every_adapter_that_is_missing(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text("merge:\n  lora:\n    base: ./base\n    adapters:\n      ./swahili: 1.0\n      ./maths: 2\n")
    with pytest.raises(merge.RecipeError) as caught:
        compositions.load(path)
    assert [(m.where, m.what) for m in caught.value.mistakes] == [
        (f"{path}:4", "no model, file or folder './swahili'"),
        (f"{path}:4", "no model, file or folder './maths'"),
    ]


def test_a_step_is_no_adapter_and_a_model_is_none_either(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text("steps: {soup: {linear: {models: [./base]}}}\nmerge: {lora: {base: ./base, adapters: {soup: 1}}}\n")
    with pytest.raises(
        merge.RecipeError, match=r"lora\.yaml:2: 'soup' is a step; adapters and sparse fine-tunes are read"
    ):
        compositions.load(path)
    with pytest.raises(merge.RecipeError, match=r"lora\.yaml:1: .*base: holds no adapter_config\.json"):
        recipe(tmp_path, "{./base: 1.0}")


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_changes_the_arithmetic_is_refused_all_at_once(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    rewrite(adapter, lora_bias=True, target_parameters=["experts"], init_lora_weights="pissa", new_kind={"x": 1}, r=0)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(merge.CheckpointError) as caught:
        merge.open_adapter(adapter)
    assert [m.what.partition(" is ")[0] for m in caught.value.mistakes] == [
        "r",
        "init_lora_weights",
        "lora_bias",
        "new_kind",
        "target_parameters",
        "holds no adapter_model.safetensors",
    ]


def test_only_lora_adapters_are_opened(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    rewrite(adapter, peft_type="IA3")
    with pytest.raises(merge.CheckpointError, match="peft_type is 'IA3'"):
        merge.open_adapter(adapter)
    with pytest.raises(merge.CheckpointError, match=r"no such folder\n  hint: did you mean 'adapter'"):
        merge.open_adapter(tmp_path / "adaptor")
    with pytest.raises(merge.CheckpointError, match="holds an adapter, not a model"):
        merge.open(adapter)


def test_modules_that_lack_a_factor_are_named(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    edit(adapter, lambda tensors: tensors.__delitem__(f"{OF_Q}.lora_B.weight"))
    with pytest.raises(merge.CheckpointError, match=r"module model\.layers\.0\.self_attn\.q_proj lacks lora_B"):
        merge.open_adapter(adapter)


def test_adapters_of_another_base_are_refused_with_every_tensor(
    base: Path, save_llama: SaveLlama, tmp_path: Path
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=ATTENTION)
    wide = save_llama("wide", num_hidden_layers=1, hidden_size=32)
    with pytest.raises(merge.MergeError) as caught:
        folded(wide, adapter)
    first, *others = caught.value.mistakes
    assert "the base lacks 2 tensors that it changes: model.layers.1.self_attn.q_proj.weight" in first.what
    assert [m.what.partition(" [")[0].rpartition(" ")[2] for m in others] == [Q, Q.replace("q_proj", "v_proj")]


def test_a_rank_that_the_config_does_not_give_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    rewrite(adapter, r=8)
    with pytest.raises(merge.MergeError, match="its factors have rank 4, its config gives 8"):
        folded(base, adapter)


def test_a_quantised_base_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, Q: tensors[Q].to(torch.int8)}, base / "model.safetensors")
    with pytest.raises(merge.MergeError, match="the base is quantised: " + re.escape(Q)):
        folded(base, adapter)


def test_an_embedding_that_the_head_is_tied_to_is_not_moved(save_llama: SaveLlama, tmp_path: Path) -> None:
    base = save_llama("base", num_hidden_layers=1, tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns about tied embeddings, in several ways
        adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(merge.MergeError, match=r"changes model\.embed_tokens\.weight, and the base's head"):
        folded(base, adapter)


def test_tensors_stored_whole_replace_only_alone_and_in_full(base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_adapter(base, tmp_path / name, target_modules=ATTENTION, modules_to_save=["lm_head"])
    with pytest.raises(merge.RecipeError, match=r"cannot be done at weight 0\.5: lm_head\.weight"):
        recipe(tmp_path, "{./one: 0.5}")
    with pytest.raises(merge.RecipeError, match=r"\./one, \./two replace the same tensors: lm_head\.weight"):
        recipe(tmp_path, "[./one, ./two]")


def test_dora_is_folded_in_alone_and_at_weight_1(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "dora", target_modules=ATTENTION, use_dora=True)
    save_adapter(base, tmp_path / "plain", target_modules=ATTENTION)
    with pytest.raises(merge.RecipeError, match=r"\./dora: is DoRA.* not defined beside other adapters"):
        recipe(tmp_path, "[./dora, ./plain]")
    with pytest.raises(merge.RecipeError, match=r"not defined at weight 0\.5"):
        recipe(tmp_path, "{./dora: 0.5}")


def test_an_embedding_adapter_of_another_embedding_is_refused_when_it_is_read(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    edit(adapter, lambda tensors: tensors["base_model.model.model.embed_tokens.base_layer.weight"].add_(1))
    with pytest.raises(merge.MergeError, match=r"(?s)embed_tokens\.weight.*trained on another base"):
        merge.build(folded(base, adapter), tmp_path / "out")


def test_no_adapter_and_one_named_twice_are_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "one", target_modules=ATTENTION)
    with pytest.raises(merge.RecipeError, match="names no adapter"):
        recipe(tmp_path, "[]")
    with pytest.raises(merge.RecipeError, match=r"named twice\n  hint: give it a weight"):
        recipe(tmp_path, "[./one, ./one]")


# ------------------------------------------------------------------------------------- a LoRA as any model reference's


def composed(tmp_path: Path, text: str) -> merge.Composed:
    path = tmp_path / "recipe.yaml"
    path.write_text(dedent(text))
    return compositions.compose(compositions.load(path))


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("./swahili", 1.0),
        ("[./swahili]", 1.0),
        ("{./swahili: 0.5}", 0.5),
        ("{path: ./swahili}", 1.0),
        ("sw", 1.0),
    ],
)
def test_a_model_with_a_lora_is_the_base_with_it_folded_in(
    base: Path, tmp_path: Path, text: str, weight: float
) -> None:
    adapter = save_adapter(base, tmp_path / "swahili", target_modules=ATTENTION)
    named = ", sw: ./swahili" if text == "sw" else ""
    merged = composed(
        tmp_path,
        f"""
        models: {{base: ./base{named}, expert: {{path: ./base, lora: {text}}}}}
        merge: {{layer_swap: {{task: base, language: expert, bottom: 1, top: 0, transition: 0}}}}
        """,
    )
    torch.testing.assert_close(merged[Q], exact(base, {adapter: weight}, Q).float(), rtol=1e-6, atol=1e-6)
    upper = Q.replace("layers.0", "layers.1")
    assert torch.equal(merged[upper], merge.open(base)[upper])


def test_two_experts_over_one_base_are_averaged_and_merged_by_operators(base: Path, tmp_path: Path) -> None:
    one = save_adapter(base, tmp_path / "one", target_modules=ATTENTION)
    two = save_adapter(base, tmp_path / "two", seed=2, target_modules=ATTENTION)
    expected = exact(base, {one: 0.5, two: 0.5}, Q).float()
    here = "{average: {models: [{path: ./base, lora: ./one}, {path: ./base, lora: ./two}], shared: ''}}"
    torch.testing.assert_close(composed(tmp_path, f"merge: {here}")[Q], expected, rtol=1e-5, atol=1e-6)
    named = """
        models: {base: ./base, a: {path: ./base, lora: ./one}, b: {path: ./base, lora: {./two: 1.0}}}
        merge: {task_arithmetic: {base: base, models: {a: 0.5, b: 0.5}}}
        """
    torch.testing.assert_close(composed(tmp_path, named)[Q], expected, rtol=1e-5, atol=1e-6)


def test_a_lora_goes_onto_a_step_and_onto_a_model_that_has_one(base: Path, tmp_path: Path) -> None:
    one = save_adapter(base, tmp_path / "one", target_modules=ATTENTION)
    two = save_adapter(base, tmp_path / "two", seed=2, target_modules=ATTENTION)
    merged = composed(
        tmp_path,
        """
        models: {first: {path: ./base, lora: ./one}}
        steps: {second: {linear: {models: [{path: first, lora: ./two}]}}}
        merge: {linear: {models: [{path: second, lora: {./one: -1.0}}]}}
        """,
    )
    expected = exact(base, {two: 1.0}, Q).float()
    torch.testing.assert_close(merged[Q], expected, rtol=1e-5, atol=1e-6)
    assert one.is_dir()


def test_mistakes_in_a_lora_are_named_by_line(base: Path, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "swahili", target_modules=ATTENTION)
    text = """\
    models:
      expert:
        path: ./base
        lora: ./swahilli
      other: {path: ./base, lora: {./swahili: heavy}}
      third: {path: ./base, lroa: ./swahili}
    merge: {linear: {models: [expert, other]}}
    """
    with pytest.raises(merge.RecipeError) as caught:
        composed(tmp_path, text)
    file = tmp_path / "recipe.yaml"
    found = [(m.where.removeprefix(f"{file}:"), m.what) for m in caught.value.mistakes]
    assert ("6", "unknown key 'lroa'") in found
    assert any(where == "5" for where, _ in found)
    with pytest.raises(merge.RecipeError) as caught:
        composed(
            tmp_path,
            "\n".join(line for line in dedent(text).splitlines() if "heavy" not in line and "lroa" not in line).replace(
                ", other", ""
            ),
        )
    assert [(m.where, m.what) for m in caught.value.mistakes] == [(f"{file}:4", "no file or folder './swahilli'")]


def test_a_lora_that_does_not_fit_its_model_is_named_by_line(base: Path, save_llama: SaveLlama, tmp_path: Path) -> None:
    save_adapter(base, tmp_path / "swahili", target_modules=["q_proj"])
    save_llama("wide", num_hidden_layers=2, hidden_size=32)
    with pytest.raises(merge.RecipeError) as caught:
        composed(tmp_path, "models:\n  expert: {path: ./wide, lora: ./swahili}\nmerge: {linear: {models: [expert]}}\n")
    assert {m.where for m in caught.value.mistakes} == {f"{tmp_path / 'recipe.yaml'}:2: adapters"}
    assert "its factors do not fit" in caught.value.mistakes[0].what
    with pytest.raises(merge.RecipeError, match="an adapter is named twice"):
        composed(tmp_path, "merge: {linear: {models: [{path: ./base, lora: [./swahili, ./swahili]}]}}\n")
    with pytest.raises(merge.RecipeError, match="an adapter takes no lora"):
        composed(tmp_path, "merge: {lora: {base: ./base, adapters: [{path: ./swahili, lora: ./swahili}]}}\n")


def test_a_module_that_one_adapter_lacks_is_counted_as_zero_and_said(base: Path, tmp_path: Path) -> None:
    both = save_adapter(base, tmp_path / "both", target_modules=["q_proj", "v_proj"])
    one = save_adapter(base, tmp_path / "one", seed=2, target_modules=["q_proj"])
    made = folded(base, both, one)
    alone = folded(base, both)
    name = "model.layers.0.self_attn.v_proj.weight"
    torch.testing.assert_close(made[name], alone[name], rtol=0, atol=0)
    (note,) = made.notes
    assert note.startswith(f"{one}: lacks ")
    assert name in note
    assert alone.notes == ()


def test_what_is_known_of_the_base_is_known_of_the_folded_model() -> None:
    folder = Path(__file__).parents[1] / "examples"
    base = tensorwise("copy", models={"base": merge.open(folder / "models" / "base")}).noted(("of the base",))
    folded = compositions.lora(base=base, adapters=[merge.open_adapter(folder / "adapters" / "task")])
    assert folded.notes == ("of the base",)
