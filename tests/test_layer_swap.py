"""Layer swapping: which layer comes from whom, what is refused, and arithmetic that can be checked by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.compositions import Ends, Zone
from tests.conftest import SaveLlama

Save = Callable[[str, Mapping[str, Tensor]], Path]


def layers_of(count: int, value: float, **more: Tensor) -> dict[str, Tensor]:
    """Make a toy decoder whose every entry is `value`."""
    tensors = {"model.embed_tokens.weight": torch.full((4, 2), value), "model.norm.weight": torch.full((2,), value)}
    for i in range(count):
        tensors[f"model.layers.{i}.self_attn.q_proj.weight"] = torch.full((2, 2), value)
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = torch.full((3, 2), value)
        tensors[f"model.layers.{i}.input_layernorm.weight"] = torch.full((2,), value)
    return {**tensors, **more}


@pytest.fixture
def pair(save_tensors: Save) -> tuple[merge.Checkpoint, merge.Checkpoint]:
    """Give a task expert of zeros and a language expert of ones, eight layers each."""
    task, language = save_tensors("task", layers_of(8, 0.0)), save_tensors("language", layers_of(8, 1.0))
    return merge.open(task), merge.open(language)


def share_of_language(
    merged: merge.Checkpoint, inner: str = "mlp.up_proj.weight", stack: str = "model.layers"
) -> list[float]:
    """Read, layer by layer, how much of the language expert (ones) is mixed into the task expert (zeros)."""
    count = sum(name.startswith(f"{stack}.") and name.endswith(inner) for name in merged)
    return [float(merged[f"{stack}.{i}.{inner}"].flatten()[0]) for i in range(count)]


Pair = tuple[merge.Checkpoint, merge.Checkpoint]


def test_the_layers_lie_language_blend_task_blend_language(pair: Pair) -> None:
    merged = compositions.layer_swap(task=pair[0], language=pair[1], bottom=2, top=1, transition=1)
    assert share_of_language(merged) == [1, 1, 0.5, 0, 0, 0, 0.5, 1]


def test_transitions_and_blend_can_be_set_for_each_end(pair: Pair) -> None:
    merged = compositions.layer_swap(
        task=pair[0], language=pair[1], bottom=1, top=1, transition=Ends(bottom=2, top=0), blend=0.25
    )
    assert share_of_language(merged) == [1, 0.25, 0.25, 0, 0, 0, 0, 1]


def test_an_end_without_language_layers_has_no_transition(pair: Pair) -> None:
    merged = compositions.layer_swap(task=pair[0], language=pair[1], bottom=0, top=0, transition=1)
    assert share_of_language(merged) == [0] * 8


def test_all_layers_of_the_language_expert_give_the_language_expert(pair: Pair) -> None:
    merged = compositions.layer_swap(task=pair[0], language=pair[1], bottom=8, top=0, transition=0)
    assert share_of_language(merged) == [1] * 8


@pytest.mark.parametrize(("outside", "expected"), [("language", 1), ("task", 0), ("average", 0.5), ("base", 3)])
def test_what_is_outside_the_layers_follows_its_own_choice(
    pair: Pair, save_tensors: Save, outside: Any, expected: float
) -> None:
    base = merge.open(save_tensors("base", layers_of(8, 3.0)))
    merged = compositions.layer_swap(task=pair[0], language=pair[1], base=base, bottom=1, top=1, outside=outside)
    assert merged["model.embed_tokens.weight"].unique().tolist() == [expected]
    assert merged["model.norm.weight"].unique().tolist() == [expected]
    assert share_of_language(merged) == [1, 0.5, 0, 0, 0, 0, 0.5, 1]


def test_attention_and_mlp_can_be_shared_out_apart(pair: Pair) -> None:
    merged = compositions.layer_swap(
        task=pair[0], language=pair[1], bottom=1, top=1, transition=0, modules={"attention": Zone(bottom=3, top=2)}
    )
    assert share_of_language(merged, "self_attn.q_proj.weight") == [1, 1, 1, 0, 0, 0, 1, 1]
    assert share_of_language(merged, "mlp.up_proj.weight") == [1, 0, 0, 0, 0, 0, 0, 1]
    assert share_of_language(merged, "input_layernorm.weight") == [1, 0, 0, 0, 0, 0, 0, 1]


def test_a_balanced_transition_brings_both_changes_to_one_size(save_tensors: Save) -> None:
    generator = torch.Generator().manual_seed(7)
    make = lambda scale: {k: scale * torch.randn(v.shape, generator=generator) for k, v in layers_of(4, 0.0).items()}  # noqa: E731
    base, task, language = make(1.0), make(0.1), make(0.9)
    task, language = ({k: base[k] + v for k, v in change.items()} for change in (task, language))
    opened = {n: merge.open(save_tensors(n, t)) for n, t in (("base", base), ("task", task), ("language", language))}
    merged = compositions.layer_swap(**opened, bottom=1, top=0, transition=1, blend=0.3, rescale="mav")

    names = [name for name in base if name.startswith("model.layers.1.")]
    d_task = {n: task[n].double().numpy() - base[n].double().numpy() for n in names}
    d_language = {n: language[n].double().numpy() - base[n].double().numpy() for n in names}
    sizes = [np.mean(np.abs(np.concatenate([d[n].ravel() for n in names]))) for d in (d_task, d_language)]
    middle = sum(sizes) / 2
    for name in names:
        by_hand = (
            base[name].double().numpy()
            + 0.3 * middle / sizes[1] * d_language[name]
            + 0.7 * middle / sizes[0] * d_task[name]
        )
        np.testing.assert_allclose(merged[name].double().numpy(), by_hand, rtol=1e-5, atol=1e-6)
    assert merge.make_plan(merged).surveys[0].title == "mean absolute change of model.layers.1"


def test_swap_is_both_reverts_less_the_base(save_llama: SaveLlama) -> None:
    task, language, base = (merge.open(save_llama(name, seed=i)) for i, name in enumerate(("task", "language", "base")))
    swapped = compositions.layer_swap(task=task, language=language, bottom=2, top=1, transition=0)
    outer = compositions.layer_swap(task=task, language=base, bottom=2, top=1, transition=0)
    middle = compositions.layer_swap(task=base, language=language, bottom=2, top=1, transition=0)
    for name in swapped:
        torch.testing.assert_close(swapped[name], outer[name] + middle[name] - base[name], rtol=1e-5, atol=1e-6)


def test_copied_layers_are_byte_identical_in_the_written_file(save_llama: SaveLlama, tmp_path: Path) -> None:
    task, language = (
        save_llama(n, seed=i, dtype=torch.bfloat16, shard="20KB") for i, n in enumerate(("task", "language"))
    )
    merged = compositions.layer_swap(task=merge.open(task), language=merge.open(language), bottom=2, top=1)
    merge.build(merged, tmp_path / "out", shard_size=20_000)
    load = lambda folder: {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}  # noqa: E731
    found, parents = load(tmp_path / "out"), {"task": load(task), "language": load(language)}
    owner = ["language", "language", None, "task", "task", "task", None, "language"]
    assert found.keys() == parents["task"].keys()
    for name, tensor in found.items():
        whose = owner[int(name.split(".")[2])] if ".layers." in name else "language"
        if whose is not None:
            assert torch.equal(tensor.view(torch.uint8), parents[whose][name].view(torch.uint8)), name
        else:
            mean = (parents["task"][name].float() + parents["language"][name].float()) / 2
            assert torch.equal(tensor, mean.to(torch.bfloat16)), name


def test_tensors_that_are_no_floats_are_the_task_experts(save_tensors: Save) -> None:
    ids = torch.arange(4)
    task = save_tensors("task", layers_of(4, 0.0, position_ids=ids))
    language = save_tensors("language", layers_of(4, 1.0, position_ids=ids + 1))
    merged = compositions.layer_swap(task=merge.open(task), language=merge.open(language), bottom=1, top=1)
    assert merged["position_ids"].tolist() == [0, 1, 2, 3]


def test_experts_of_two_dtypes_meet_in_the_wider_one(save_tensors: Save) -> None:
    task = save_tensors("task", {k: v.to(torch.bfloat16) for k, v in layers_of(4, 0.0).items()})
    language = save_tensors("language", layers_of(4, 1.0))
    merged = compositions.layer_swap(task=merge.open(task), language=merge.open(language), bottom=1, top=1)
    assert {spec.dtype for spec in merged.specs.values()} == {"F32"}
    assert merged["model.layers.1.mlp.up_proj.weight"].dtype == torch.float32


def two_stacks(value: float) -> dict[str, Tensor]:
    """Make a toy encoder-decoder with three and two layers."""
    return {
        "shared.weight": torch.full((4, 2), value),
        **{f"encoder.block.{i}.layer.0.SelfAttention.q.weight": torch.full((2, 2), value) for i in range(3)},
        **{f"decoder.block.{i}.layer.0.SelfAttention.q.weight": torch.full((2, 2), value) for i in range(2)},
    }


def test_two_stacks_need_numbers_for_each(save_tensors: Save) -> None:
    task, language = (merge.open(save_tensors(n, two_stacks(v))) for n, v in (("task", 0.0), ("language", 1.0)))
    with pytest.raises(merge.MergeError, match=r"2 stacks of layers, and nothing is said of decoder\.block"):
        compositions.layer_swap(task=task, language=language, bottom=1, top=1)
    stacks: dict[str, Any] = {
        "encoder": Zone(bottom=1, top=1, transition=0),
        "decoder": Zone(bottom=0, top=1, transition=1),
    }
    merged = compositions.layer_swap(task=task, language=language, stacks=stacks)
    inner = "layer.0.SelfAttention.q.weight"
    assert share_of_language(merged, inner, "encoder.block") == [1, 0, 1]
    assert share_of_language(merged, inner, "decoder.block") == [0.5, 1]


def test_a_stack_can_be_left_to_the_outside(save_tensors: Save) -> None:
    task, language = (merge.open(save_tensors(n, two_stacks(v))) for n, v in (("task", 0.0), ("language", 1.0)))
    stacks: dict[str, Any] = {"encoder": Zone(bottom=1, top=0, transition=0), "decoder": "outside"}
    merged = compositions.layer_swap(task=task, language=language, outside="task", stacks=stacks)
    inner = "layer.0.SelfAttention.q.weight"
    assert share_of_language(merged, inner, "encoder.block") == [1, 0, 0]
    assert share_of_language(merged, inner, "decoder.block") == [0, 0]


def test_an_unknown_stack_is_refused_with_the_known_ones(save_tensors: Save) -> None:
    task, language = (merge.open(save_tensors(n, two_stacks(v))) for n, v in (("task", 0.0), ("language", 1.0)))
    with pytest.raises(merge.MergeError, match=r"'tower'.*\n.*decoder\.block \(2\), encoder\.block \(3\)"):
        compositions.layer_swap(task=task, language=language, stacks={"tower": Zone(bottom=1, top=1)})


def test_more_layers_than_there_are_is_refused_with_the_sum(pair: Pair) -> None:
    with pytest.raises(
        merge.MergeError, match=r"model\.layers has 8 layers, and bottom 5 \+ top 2 \+ transitions 2 = 9"
    ):
        compositions.layer_swap(task=pair[0], language=pair[1], bottom=5, top=2, transition=1)


def test_a_missing_number_of_layers_is_asked_for(pair: Pair) -> None:
    with pytest.raises(merge.MergeError, match="needs 'top'"):
        compositions.layer_swap(task=pair[0], language=pair[1], bottom=5)


def test_models_of_other_depth_are_refused_with_their_layer_counts(pair: Pair, save_tensors: Save) -> None:
    deep = merge.open(save_tensors("deep", layers_of(10, 1.0)))
    with pytest.raises(merge.MergeError, match=r"layer counts differ: task has 8 in model\.layers; language has 10"):
        compositions.layer_swap(task=pair[0], language=deep, bottom=1, top=1)


def test_layers_that_share_their_weights_are_refused(save_tensors: Save, tmp_path: Path) -> None:
    inner = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight"
    for name in ("task", "language"):
        folder = save_tensors(
            name, {inner: torch.zeros(2, 2), "albert.embeddings.word_embeddings.weight": torch.zeros(4, 2)}
        )
        (folder / "config.json").write_text(json.dumps({"model_type": "albert", "num_hidden_layers": 12}))
    with pytest.raises(merge.MergeError, match=r"config\.json says 12 layers, and the tensor names show 1.*\n.*share"):
        compositions.layer_swap(
            task=merge.open(tmp_path / "task"), language=merge.open(tmp_path / "language"), bottom=0, top=1
        )


def test_a_head_tied_in_one_expert_and_free_in_the_other_is_refused(save_tensors: Save) -> None:
    task = merge.open(save_tensors("task", layers_of(4, 0.0)))
    language = merge.open(save_tensors("language", layers_of(4, 1.0, **{"lm_head.weight": torch.ones(4, 2)})))
    with pytest.raises(merge.MergeError, match=r"task lacks 1 tensors that others have: lm_head\.weight\n.*tied"):
        compositions.layer_swap(task=task, language=language, bottom=1, top=1)


def test_tensors_of_other_shape_are_named(save_tensors: Save) -> None:
    other = layers_of(4, 1.0) | {"model.embed_tokens.weight": torch.ones(5, 2)}
    task, language = merge.open(save_tensors("task", layers_of(4, 0.0))), merge.open(save_tensors("language", other))
    with pytest.raises(
        merge.MergeError, match=r"model\.embed_tokens\.weight: shapes differ: task \[4, 2\], language \[5, 2\]"
    ):
        compositions.layer_swap(task=task, language=language, bottom=1, top=1)


def test_vocabularies_with_other_ids_are_refused(save_tensors: Save) -> None:
    folders = [save_tensors(name, layers_of(4, value)) for name, value in (("task", 0.0), ("language", 1.0))]
    for folder, words in zip(folders, ("a\nb\nc\nd", "a\nc\nb\nd"), strict=True):
        (folder / "vocab.txt").write_text(words)
    with pytest.raises(merge.MergeError, match=r"give other ids to 2 tokens: ('b', 'c'|'c', 'b')"):
        compositions.layer_swap(task=merge.open(folders[0]), language=merge.open(folders[1]), bottom=1, top=1)


def test_another_prefix_of_names_is_seen_and_noted(save_tensors: Save) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in layers_of(4, 0.0).items()}
    task, language = merge.open(save_tensors("task", bare)), merge.open(save_tensors("language", layers_of(4, 1.0)))
    merged = compositions.layer_swap(task=task, language=language, bottom=1, top=1, transition=0)
    assert share_of_language(merged) == [1, 0, 0, 1]
    assert merged.notes == ("task: 14 tensors renamed to those of language: prefix 'model.' added",)


def test_a_model_without_layers_is_refused(save_tensors: Save) -> None:
    one, other = (merge.open(save_tensors(n, {"weight": torch.zeros(2)})) for n in ("a", "b"))
    with pytest.raises(merge.MergeError, match="show no layers"):
        compositions.layer_swap(task=one, language=other, bottom=1, top=1)


def test_what_needs_a_base_says_so(pair: Pair) -> None:
    with pytest.raises(merge.MergeError, match="rescale: mav needs the base"):
        compositions.layer_swap(task=pair[0], language=pair[1], bottom=1, top=1, rescale="mav")
    with pytest.raises(merge.MergeError, match="outside: base needs the base"):
        compositions.layer_swap(task=pair[0], language=pair[1], bottom=1, top=1, outside="base")


def test_a_base_that_nothing_uses_is_noted_and_does_not_have_to_fit(pair: Pair, save_tensors: Save) -> None:
    other = merge.open(save_tensors("other", layers_of(3, 0.0)))
    merged = compositions.layer_swap(task=pair[0], language=pair[1], base=other, bottom=1, top=1)
    assert merged.notes == ("the base is not used: only layers: auto and outside: base and rescale: mav do",)


def changed(base: Mapping[str, Tensor], sizes: list[float]) -> dict[str, Tensor]:
    """Move every matrix of layer i by sizes[i] times itself, so that its relative change is that number."""
    moved = [name for name, tensor in base.items() if ".layers." in name and tensor.dim() == 2]
    return {**base, **{name: base[name] * (1 + sizes[int(name.split(".")[2])]) for name in moved}}


def test_auto_gives_each_layer_to_the_expert_that_changed_it_more(save_tensors: Save, tmp_path: Path) -> None:
    base = layers_of(4, 1.0)
    # shares of change: task .1 .4 .4 .1, language .4 .1 .4 .1; two matrices a layer
    experts = {"task": changed(base, [0.01, 0.04, 0.04, 0.01]), "language": changed(base, [0.08, 0.02, 0.08, 0.02])}
    for name, tensors in {"base": base, **experts}.items():
        save_tensors(name, tensors)
    opened = {name: merge.open(tmp_path / name) for name in ("task", "language", "base")}
    merged = compositions.layer_swap(**opened, layers="auto", threshold=0.01, blend=0.25)
    inner = "mlp.up_proj.weight"
    expected = [1.08, 1.04, 0.25 * 1.08 + 0.75 * 1.04, 0.25 * 1.02 + 0.75 * 1.01]
    torch.testing.assert_close(torch.tensor(share_of_language(merged, inner)), torch.tensor(expected))
    assert torch.equal(merged[f"model.layers.0.{inner}"], experts["language"][f"model.layers.0.{inner}"])
    assert torch.equal(merged[f"model.layers.1.{inner}"], experts["task"][f"model.layers.1.{inner}"])

    receipt = merge.build(merged, tmp_path / "out")
    assert receipt.surveys == {
        "shares of change of the layers in model.layers": {
            "0": (1.0, 0.0), "1": (0.0, 1.0), "2": (0.25, 0.75), "3": (0.25, 0.75)
        }
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "portmanteau.json").read_text())["surveys"]


def test_auto_takes_no_numbers_of_layers_and_needs_a_base(pair: Pair) -> None:
    with pytest.raises(merge.MergeError) as caught:
        compositions.layer_swap(task=pair[0], language=pair[1], layers="auto", bottom=1)
    assert [mistake.what for mistake in caught.value.mistakes] == [
        "layers: auto needs the base",
        "auto chooses the layers itself, and bottom is given",
    ]


EXAMPLES = Path(__file__).parents[1] / "examples" / "models"


def shares_in_numpy(name: str, base: Mapping[str, Tensor]) -> dict[tuple[int, str], float]:
    """Give each (layer, self_attn | mlp)'s share of an expert's change: norms of the projections, in float64."""
    expert = load_file(EXAMPLES / name / "model.safetensors")
    squares: dict[tuple[int, str], float] = {}
    for key, tensor in base.items():
        if ".layers." in key and tensor.dim() == 2:
            _, _, layer, which, *_ = key.split(".")
            before, after = tensor.double().numpy(), expert[key].double().numpy()
            relative = np.linalg.norm(after - before) / np.linalg.norm(before)
            squares[int(layer), which] = squares.get((int(layer), which), 0.0) + float(relative) ** 2
    total = sum(np.sqrt(square) for square in squares.values())
    return {key: float(np.sqrt(square) / total) for key, square in squares.items()}


@pytest.mark.parametrize("threshold", [0.001, 0.03])
def test_auto_by_module_is_the_rule_in_numpy_on_trained_models(threshold: float, tmp_path: Path) -> None:
    state = {name: load_file(EXAMPLES / f"{name}-expert" / "model.safetensors") for name in ("task", "language")}
    base = load_file(EXAMPLES / "base" / "model.safetensors")
    task, language = (shares_in_numpy(f"{name}-expert", base) for name in ("task", "language"))
    opened = {name: merge.open(EXAMPLES / f"{name}-expert") for name in ("task", "language")}
    merged = compositions.layer_swap(
        **opened, base=merge.open(EXAMPLES / "base"), layers="auto", by="module", threshold=threshold, blend=0.25
    )
    merge.build(merged, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    decided = set()
    for name, tensor in found.items():
        _, _, layer, which, *_ = [*name.split("."), "", "", ""]
        if which in ("self_attn", "mlp"):
            lead = language[int(layer), which] - task[int(layer), which]
            share = 1.0 if lead > threshold else 0.0 if lead < -threshold else 0.25
        else:
            share = 1.0  # norms beside the modules, and what is outside the layers
        decided.add(share)
        by_hand = share * state["language"][name].float() + (1 - share) * state["task"][name].float()
        assert torch.equal(tensor, by_hand.to(torch.bfloat16)), name
    assert decided >= ({0.0, 1.0} if threshold == 0.001 else {0.0, 0.25, 1.0})


def test_auto_by_module_takes_what_lies_inside_a_module_with_it(save_tensors: Save) -> None:
    inside = "model.layers.{}.self_attn.{}".format
    more = {inside(i, name): torch.ones(2) for i in range(2) for name in ("q_proj.bias", "q_norm.weight")}
    base = layers_of(2, 1.0, **more)
    experts = {"task": {**base}, "language": {**base}}
    for expert, value in (("task", 3.0), ("language", 5.0)):
        for name in base:
            experts[expert][name] = torch.full_like(base[name], value) if base[name].dim() == 1 else base[name]
    experts["task"][inside(0, "q_proj.weight")] = torch.full((2, 2), 2.0)
    experts["language"][inside(1, "q_proj.weight")] = torch.full((2, 2), 2.0)
    opened = {name: merge.open(save_tensors(name, tensors)) for name, tensors in {"base": base, **experts}.items()}
    merged = compositions.layer_swap(**opened, layers="auto", by="module")
    for name in ("self_attn.q_proj.bias", "self_attn.q_norm.weight"):
        assert share_of_language(merged, name) == [3, 5]  # the task expert's attention in layer 0
    assert share_of_language(merged, "input_layernorm.weight") == [5, 5]


def test_by_without_auto_is_refused(pair: Pair) -> None:
    with pytest.raises(merge.MergeError, match=r"by: says how auto chooses"):
        compositions.layer_swap(task=pair[0], language=pair[1], bottom=1, top=1, by="module")
