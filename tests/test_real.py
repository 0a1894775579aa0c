"""Whole builds on trained weights, through the command line: the result loads, and does what it was trained for."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import real_weights

pytestmark = pytest.mark.real

CONSOLE_SCRIPT = Path(sys.executable).with_name("portmanteau")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXT = "Vergniaud's 3 naïve brothers → Zürich; \tdef f(x): return 北京 <|im_start|>"
LANGUAGE_LAYERS = (0, 1, 2, 3, 4, 28, 29)
TRANSITION_LAYERS = (5, 27)

LLAMAS = {
    "layer_swap": "layer_swap: {task: instruct, language: german, bottom: 5, top: 2, transition: 1}",
    "linear": "linear: {models: {instruct: 0.25, german: 0.75}}",
    "ties": "ties: {base: instruct, models: {german: 1.0}, density: 0.2}",
}
ENCODERS = {
    "layer_swap": "layer_swap: {task: yields, language: classes, bottom: 3, top: 2, base: pretrained, rescale: mav, "
    "unmatched: HOW}",
    "linear": "linear: {models: [pretrained, classes, yields], unmatched: HOW}",
    "ties": "ties: {base: pretrained, models: {classes: 1.0, yields: 1.0}, density: 0.2, unmatched: HOW}",
}


def run(recipe: str, models: dict[str, Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Write a recipe into a folder and build it there, as out."""
    named = {name: str(path) for name, path in models.items()}
    (folder / "recipe.yaml").write_text(f"models: {json.dumps(named)}\nmerge: {{{recipe}}}\n", encoding="utf-8")
    command = [CONSOLE_SCRIPT, "build", "recipe.yaml", "out"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def build(recipe: str, models: dict[str, Path], folder: Path) -> Path:
    """Build a recipe that is good."""
    done = run(recipe, models, folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def stored(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder with the safetensors library."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in sorted(folder.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            found.update((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    return found


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same bytes, not only equal numbers."""
    same_kind = one.dtype == other.dtype and one.shape == other.shape
    return same_kind and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def layer(name: str) -> int | None:
    """Give the layer number in a Llama's tensor name."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


def answer(folder: Path) -> str:
    """Let a chat model answer the question, greedily; in fp32, as its first two choices lie near one another."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**asked, do_sample=False, max_new_tokens=16)
    return str(tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))


# ---------------------------------------------------------------------------------------------- a chat model, SmolLM2


@pytest.fixture(scope="module")
def chat_models() -> dict[str, Path]:
    return {"instruct": real_weights.smollm2(), "german": real_weights.smollm2_german()}


@pytest.fixture(scope="module", params=sorted(LLAMAS))
def chat_merge(
    request: pytest.FixtureRequest, chat_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return build(LLAMAS[request.param], chat_models, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def chat_swap(chat_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(LLAMAS["layer_swap"], chat_models, tmp_path_factory.mktemp("swap"))


def test_both_chat_models_know_the_capital_before_they_are_merged(chat_models: dict[str, Path]) -> None:
    assert [name for name, folder in chat_models.items() if "Paris" not in answer(folder)] == []


def test_a_merged_chat_model_knows_the_capital(chat_merge: Path) -> None:
    assert "Paris" in answer(chat_merge)


def test_a_merged_chat_model_has_every_tensor_that_its_class_wants_and_no_other(chat_merge: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(chat_merge, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.bfloat16


def test_tied_embeddings_stay_tied(chat_merge: Path, chat_models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    assert stored(chat_merge).keys() == stored(chat_models["instruct"]).keys()
    assert "lm_head.weight" not in stored(chat_merge)
    model = AutoModelForCausalLM.from_pretrained(chat_merge)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_config_says_what_the_parents_config_said(chat_merge: Path, chat_models: dict[str, Path]) -> None:
    made = json.loads((chat_merge / "config.json").read_text(encoding="utf-8"))
    assert made == json.loads((chat_models["instruct"] / "config.json").read_text(encoding="utf-8"))
    assert (made["dtype"], made["tie_word_embeddings"]) == ("bfloat16", True)


def test_tokenizer_and_chat_template_are_kept(chat_merge: Path, chat_models: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    made, parent = AutoTokenizer.from_pretrained(chat_merge), AutoTokenizer.from_pretrained(chat_models["instruct"])
    assert made(TEXT)["input_ids"] == parent(TEXT)["input_ids"]
    assert made.chat_template == parent.chat_template
    assert "<|im_start|>assistant" in made.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)


def test_swapped_layers_are_their_parents_bytes(chat_swap: Path, chat_models: dict[str, Path]) -> None:
    task, language, made = (stored(folder) for folder in (chat_models["instruct"], chat_models["german"], chat_swap))
    outer = {name for name in made if layer(name) in (None, *LANGUAGE_LAYERS)}
    middle = {name for name in made if layer(name) not in (None, *LANGUAGE_LAYERS, *TRANSITION_LAYERS)}
    assert (len(outer), len(middle)) == (2 + 7 * 9, 21 * 9)
    assert all(any(not same_bytes(task[name], language[name]) for name in part) for part in (outer, middle))
    assert [name for name in outer if not same_bytes(made[name], language[name])] == []
    assert [name for name in middle if not same_bytes(made[name], task[name])] == []


def test_transition_layers_are_the_mean_of_both(chat_swap: Path, chat_models: dict[str, Path]) -> None:
    task, language, made = (stored(folder) for folder in (chat_models["instruct"], chat_models["german"], chat_swap))
    between = [name for name in made if layer(name) in TRANSITION_LAYERS]
    assert len(between) == 2 * 9
    for name in between:
        mean = (task[name].float() + language[name].float()) / 2
        torch.testing.assert_close(made[name], mean.bfloat16(), rtol=0, atol=0)


def test_the_linear_merge_is_the_weighted_mean_rounded_once(chat_models: dict[str, Path], tmp_path: Path) -> None:
    one, other = stored(chat_models["instruct"]), stored(chat_models["german"])
    made = stored(build(LLAMAS["linear"], chat_models, tmp_path))
    for name, tensor in made.items():
        mean = one[name].double() * 0.25 + other[name].double() * 0.75
        torch.testing.assert_close(tensor, mean.bfloat16(), rtol=0, atol=0)


def test_a_sparse_fine_tune_holds_the_largest_changes_and_is_taken_out_again(
    chat_models: dict[str, Path], tmp_path: Path
) -> None:
    one, other = stored(chat_models["instruct"]), stored(chat_models["german"])
    folders = [tmp_path / name for name in ("extracted", "added", "restored")]
    for folder in folders:
        folder.mkdir()
    sft = build("extract_sparse: {base: instruct, tuned: german, count: 1000000}", chat_models, folders[0])
    added = build(f"sparse_fine_tune: {{base: instruct, diffs: ['{sft}']}}", chat_models, folders[1])
    sizes = torch.cat([(other[name].float() - one[name].float()).abs().reshape(-1) for name in one])
    boundary = sizes.kthvalue(len(sizes) - 1_000_000 + 1).values
    taken = 0
    for name, tensor in stored(added).items():
        size, changed = (other[name].float() - one[name].float()).abs(), tensor != one[name]
        assert bool(changed[size > boundary].all())
        assert not bool(changed[size < boundary].any())
        assert torch.equal(tensor[changed], other[name][changed])
        taken += int(changed.sum())
    assert taken == 1_000_000
    recipe = f"revert_sparse: {{tuned: added, base: instruct, diffs: ['{sft}']}}"
    restored = stored(build(recipe, {**chat_models, "added": added}, folders[2]))
    assert all(same_bytes(restored[name], tensor) for name, tensor in one.items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft: an old name
def test_an_extracted_adapter_moves_the_chat_model_towards_the_fine_tuned_one(
    chat_models: dict[str, Path], tmp_path: Path
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    (tmp_path / "folded").mkdir()
    recipe = "extract_lora: {base: instruct, tuned: german, rank: 8, modules: '*.q_proj.weight', rest: drop}"
    adapter = build(recipe, chat_models, tmp_path)
    one, other = stored(chat_models["instruct"]), stored(chat_models["german"])
    folded = stored(build(f"lora: {{base: instruct, adapters: ['{adapter}']}}", chat_models, tmp_path / "folded"))
    model = AutoModelForCausalLM.from_pretrained(chat_models["instruct"], dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    for name in (name for name in one if name.endswith("q_proj.weight")):
        delta = other[name].double() - one[name].double()
        u, s, vt = torch.linalg.svd(delta)
        best = one[name].double() + u[:, :8] * s[:8] @ vt[:8]
        torch.testing.assert_close(merged[name].double(), best, rtol=0, atol=1e-6)
        torch.testing.assert_close(folded[name], best.bfloat16(), rtol=2**-7, atol=1e-9)


# ------------------------------------------------------------------------------------- three old encoders, from pickles


@pytest.fixture(scope="module")
def encoders() -> dict[str, Path]:
    names = dict(zip(("pretrained", "classes", "yields"), real_weights.BERTS, strict=True))
    return {label: real_weights.berts() / name for label, name in names.items()}


@pytest.fixture(scope="module")
def states(encoders: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    """The encoders' tensors without the prefix of those that have one, read with torch."""
    return {label: dict(unprefixed(folder / "pytorch_model.bin")) for label, folder in encoders.items()}


def unprefixed(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Go through the tensors of a pickled BERT by the names that BertModel has for them."""
    for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
        yield name.removeprefix("bert."), tensor


@pytest.mark.parametrize("unmatched", ["drop", "keep"])
@pytest.mark.parametrize("method", sorted(ENCODERS))
def test_a_merged_encoder_loads_whole_and_gives_finite_outputs(
    method: str, unmatched: str, encoders: dict[str, Path], states: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    from transformers import BertModel

    out = build(ENCODERS[method].replace("HOW", unmatched), encoders, tmp_path)
    model, report = BertModel.from_pretrained(out, output_loading_info=True)
    heads = {name for state in states.values() for name in state} - states["classes"].keys()
    assert len(heads) == 8 + 2
    assert set(report["unexpected_keys"]) == (heads if unmatched == "keep" else set())
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    tokens = torch.arange(12, 44).reshape(2, 16)
    with torch.no_grad():
        states_out = model(tokens).last_hidden_state
    assert states_out.shape == (2, 16, 256)
    assert torch.isfinite(states_out).all()
    assert states_out.std() > 0.1


def test_the_linear_merge_is_the_mean_of_the_pickles(
    encoders: dict[str, Path], states: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    made = stored(build(ENCODERS["linear"].replace("HOW", "drop"), encoders, tmp_path))
    assert len(made) == 199
    for name, tensor in made.items():
        three = torch.stack([state[name.removeprefix("bert.")] for state in states.values()])
        torch.testing.assert_close(tensor, three.double().mean(0).float(), rtol=1e-6, atol=1e-8)


def test_ties_moves_about_the_kept_share_of_each_tensor(
    encoders: dict[str, Path], states: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    made = stored(build(ENCODERS["ties"].replace("HOW", "drop"), encoders, tmp_path))
    name = "encoder.layer.7.intermediate.dense.weight"
    base, deltas = (
        states["pretrained"][name],
        [states[label][name] - states["pretrained"][name] for label in ("classes", "yields")],
    )
    kept = []
    for delta in deltas:
        limit = delta.abs().flatten().topk(math.floor(0.2 * delta.numel())).values[-1]
        kept.append(torch.where(delta.abs() >= limit, delta, 0.0))
    sign = torch.sign(kept[0] + kept[1])
    agreeing = [torch.where(delta * sign > 0, delta, 0.0) for delta in kept]
    count = sum((delta != 0).int() for delta in agreeing)
    torch.testing.assert_close(made[f"bert.{name}"], base + sum(agreeing) / count.clamp(min=1), rtol=1e-6, atol=1e-7)


def test_swapped_layers_of_encoders_are_those_of_the_pickles(
    encoders: dict[str, Path], states: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    made = stored(build(ENCODERS["layer_swap"].replace("HOW", "drop"), encoders, tmp_path))
    side = dict.fromkeys(range(12), "yields") | dict.fromkeys((0, 1, 2, 10, 11), "classes")
    for name, tensor in made.items():
        number = int(name.split(".")[2]) if name.startswith("encoder.layer.") else None
        if number not in (3, 9):
            parent = "classes" if number is None else side[number]
            assert same_bytes(tensor, states[parent][name]), name


@pytest.mark.parametrize("how", ["error", "keep", "drop"])
@pytest.mark.parametrize("method", sorted(ENCODERS))
def test_an_encoder_of_other_depth_is_refused_with_the_layer_counts(
    method: str, how: str, encoders: dict[str, Path], tmp_path: Path
) -> None:
    shallow = shortened(encoders["classes"], tmp_path / "shallow")
    done = run(ENCODERS[method].replace("HOW", how), {**encoders, "classes": shallow}, tmp_path)
    assert done.returncode == 1
    assert "layer counts differ" in done.stderr
    assert re.search(r"(classes|language) has 11 in (bert\.)?encoder\.layer", done.stderr)
    assert re.search(r"has 12 in (bert\.)?encoder\.layer", done.stderr)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def shortened(folder: Path, made: Path) -> Path:
    """Save a copy of an encoder without its last layer."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    kept = {name: tensor for name, tensor in tensors.items() if ".layer.11." not in name}
    assert len(tensors) - len(kept) == 16
    made.mkdir()
    save_file(kept, made / "model.safetensors", metadata={"format": "pt"})
    (made / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 11}), encoding="utf-8")
    return made
