"""What tensor names say, held against transformers: real models without data, and what their configs declare."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch

from portmanteau.merge.names import Layers, align, matches, module

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
LLAMA = {**SMALL, "num_key_value_heads": 1, "num_hidden_layers": 3}
BERT = {**SMALL, "num_hidden_layers": 3, "max_position_embeddings": 16}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "vocab_size": 20, "num_layers": 3, "num_decoder_layers": 2}
BART = {
    "d_model": 16,
    "vocab_size": 20,
    "max_position_embeddings": 16,
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")},
    "encoder_layers": 3,
    "decoder_layers": 2,
}
CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


@cache
def names(kind: str, config: str, fields: str) -> tuple[str, ...]:
    """The names in a model's state dict. It is built without data."""
    import transformers

    made = getattr(transformers, config)(**json.loads(fields))
    with torch.device("meta"):
        return tuple(getattr(transformers, kind)(made).state_dict())


def names_of(kind: str, **fields: Any) -> tuple[str, ...]:
    prefixes = ("ForCausalLM", "ForSequenceClassification", "ForConditionalGeneration", "ForMaskedLM", "Model")
    family = next(kind.removesuffix(suffix) for suffix in prefixes if kind.endswith(suffix))
    return names(kind, f"{family.removesuffix('LMHead')}Config", json.dumps(fields))


def stacks(found: tuple[str, ...]) -> dict[str, int]:
    return {stack.prefix: stack.count for stack in Layers(found).stacks}


MOE = {**LLAMA, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}

FAMILIES: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "Llama": (names_of("LlamaForCausalLM", **LLAMA), {"model.layers": 3}),
    "Llama without a head": (names_of("LlamaModel", **LLAMA), {"layers": 3}),
    "Gemma 2": (names_of("Gemma2ForCausalLM", **LLAMA, head_dim=8), {"model.layers": 3}),
    "Phi 3": (names_of("Phi3ForCausalLM", **LLAMA, pad_token_id=0), {"model.layers": 3}),
    "Mixtral": (names_of("MixtralForCausalLM", **MOE), {"model.layers": 3}),
    "Qwen 2 MoE": (names_of("Qwen2MoeForCausalLM", **MOE), {"model.layers": 3}),
    "GPT-2": (
        names("GPT2LMHeadModel", "GPT2Config", json.dumps({"n_embd": 16, "n_head": 2, "n_layer": 3, "vocab_size": 20})),
        {"transformer.h": 3},
    ),
    "GPT-2 without a head": (
        names("GPT2Model", "GPT2Config", json.dumps({"n_embd": 16, "n_head": 2, "n_layer": 3, "vocab_size": 20})),
        {"h": 3},
    ),
    "BLOOM": (names_of("BloomForCausalLM", hidden_size=16, n_head=2, n_layer=3, vocab_size=20), {"transformer.h": 3}),
    "Falcon": (names_of("FalconForCausalLM", **SMALL, num_hidden_layers=3), {"transformer.h": 3}),
    "GPT-NeoX": (names_of("GPTNeoXForCausalLM", **SMALL, num_hidden_layers=3), {"gpt_neox.layers": 3}),
    "BERT": (names_of("BertModel", **BERT), {"encoder.layer": 3}),
    "BERT with a head": (names_of("BertForSequenceClassification", **BERT), {"bert.encoder.layer": 3}),
    "BERT for masked words": (names_of("BertForMaskedLM", **BERT), {"bert.encoder.layer": 3}),
    "RoBERTa": (names_of("RobertaForSequenceClassification", **BERT), {"roberta.encoder.layer": 3}),
    "XLM-R": (names_of("XLMRobertaForMaskedLM", **BERT), {"roberta.encoder.layer": 3}),
    "ELECTRA": (names_of("ElectraForSequenceClassification", **BERT), {"electra.encoder.layer": 3}),
    "DeBERTa": (
        names("DebertaV2ForSequenceClassification", "DebertaV2Config", json.dumps(BERT)),
        {"deberta.encoder.layer": 3},
    ),
    "DistilBERT": (
        names_of("DistilBertForSequenceClassification", dim=16, n_heads=2, n_layers=3, hidden_dim=16, vocab_size=20),
        {"distilbert.transformer.layer": 3},
    ),
    "ALBERT, whose layers share their weights": (
        names_of("AlbertForSequenceClassification", **{**BERT, "num_hidden_layers": 12}, embedding_size=8),
        {"albert.encoder.albert_layer_groups": 1},
    ),
    "T5": (names_of("T5ForConditionalGeneration", **T5), {"encoder.block": 3, "decoder.block": 2}),
    "mT5": (names_of("MT5ForConditionalGeneration", **T5), {"encoder.block": 3, "decoder.block": 2}),
    "BART": (names_of("BartForConditionalGeneration", **BART), {"model.encoder.layers": 3, "model.decoder.layers": 2}),
    "M2M-100": (
        names_of("M2M100ForConditionalGeneration", **BART),
        {"model.encoder.layers": 3, "model.decoder.layers": 2},
    ),
    "Whisper": (
        names_of("WhisperForConditionalGeneration", **BART, num_mel_bins=4, pad_token_id=0),
        {"model.encoder.layers": 3, "model.decoder.layers": 2},
    ),
    "Mamba": (
        names_of("MambaForCausalLM", hidden_size=16, state_size=4, num_hidden_layers=3, vocab_size=20),
        {"backbone.layers": 3},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_are_those_that_the_config_declares(family: str) -> None:
    found, expected = FAMILIES[family]
    assert stacks(found) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_inside_the_layers_has_its_place_and_no_other(family: str) -> None:
    found, expected = FAMILIES[family]
    layers = Layers(found)
    for name in found:
        place = layers.place(name)
        inside = [prefix for prefix in expected if name.startswith(f"{prefix}.")]
        assert (place is not None) == bool(inside), name
        if place is not None:
            assert f"{place.stack.prefix}.{place.layer}.{place.inner}" == name
            assert 0 <= place.layer < place.stack.count


def test_a_vision_tower_is_a_stack_of_its_own() -> None:
    vision = {"model_type": "clip_vision_model", **CLIP, "num_hidden_layers": 2}
    text = {"model_type": "llama", **LLAMA}
    found = names_of("LlavaForConditionalGeneration", vision_config=vision, text_config=text)
    counts = Layers(found).stacks
    assert sorted(stack.count for stack in counts) == [2, 3]
    tower, language = sorted(counts, key=lambda stack: stack.count)
    assert "vision" in tower.prefix
    assert "language_model" in language.prefix
    assert Layers(found).find("vision_tower") == tower
    assert Layers(found).find("language_model") == language
    assert all(Layers(found).place(name) is None for name in found if "projector" in name)


def test_the_experts_of_a_layer_are_no_layers() -> None:
    found = [f"model.layers.{i}.mlp.experts.{e}.{w}.weight" for i in range(2) for e in range(8) for w in ("w1", "w2")]
    assert stacks(tuple(found)) == {"model.layers": 2}
    place = Layers(found).place("model.layers.1.mlp.experts.7.w2.weight")
    assert place is not None
    assert (place.layer, place.inner, place.depth) == (1, "mlp.experts.7.w2.weight", 1.0)


def test_the_modules_of_a_sequential_head_are_no_layers() -> None:
    head = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    names = [f"classifier.{name}" for name in head.state_dict()]
    assert Layers(names).stacks == ()
    layers = Layers([*names, *FAMILIES["BERT"][0]])
    assert [stack.prefix for stack in layers.stacks] == ["encoder.layer"]
    assert layers.place("classifier.0.weight") is None


def test_numbers_that_do_not_count_from_zero_are_no_layers() -> None:
    assert Layers(["head.1.attn.weight", "head.2.attn.weight", "head.4.attn.weight"]).stacks == ()


def test_depth_goes_from_zero_to_one() -> None:
    layers = Layers(FAMILIES["Llama"][0])
    places = [layers.place(f"model.layers.{i}.mlp.up_proj.weight") for i in range(3)]
    assert [place.depth for place in places if place] == [0.0, 0.5, 1.0]


def test_a_stack_is_found_by_a_part_of_its_name_that_no_other_has() -> None:
    layers = Layers(FAMILIES["T5"][0])
    assert [str(layers.find(word)) for word in ("encoder", "decoder.block", "encoder.block")] == [
        "encoder.block",
        "decoder.block",
        "encoder.block",
    ]
    assert layers.find("block") is None
    assert layers.find("enc") is None


@pytest.mark.parametrize(
    "family", ["Llama", "GPT-2", "BERT", "DistilBERT", "T5", "BART", "GPT-NeoX", "BLOOM", "Falcon"]
)
def test_every_layer_has_attention_mlp_and_norm(family: str) -> None:
    found, _ = FAMILIES[family]
    layers = Layers(found)
    kinds = {(p.stack, p.layer): set[str]() for name in found if (p := layers.place(name))}
    for name in found:
        if place := layers.place(name):
            kinds[place.stack, place.layer].add(module(place.inner))
    assert all(kind == {"attention", "mlp", "norm"} for kind in kinds.values())


@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ("ln_1.weight", "norm"),  # GPT-2
        ("ln_f.weight", "norm"),
        ("mlp.c_fc.weight", "mlp"),
        ("self_attention.query_key_value.weight", "attention"),  # BLOOM
        ("layer.0.SelfAttention.q.weight", "attention"),  # T5
        ("layer.1.EncDecAttention.q.weight", "attention"),
        ("layer.1.layer_norm.weight", "norm"),
        ("layer.1.DenseReluDense.wi.weight", "mlp"),
        ("self_attn_layer_norm.weight", "norm"),  # BART
        ("fc1.weight", "mlp"),
        ("self_attn.q_norm.weight", "norm"),  # Qwen 3
        ("sa_layer_norm.weight", "norm"),  # DistilBERT
        ("block_sparse_moe.gate.weight", "mlp"),
        ("linear_attn.in_proj.weight", "attention"),
    ],
)
def test_the_module_of_a_tensor_is_read_from_its_name(inner: str, expected: str) -> None:
    assert module(inner) == expected


# alignment


def renamed(own: tuple[str, ...], reference: tuple[str, ...]) -> dict[str, str]:
    found = align(own, reference)
    return dict(found.renamed) if found else {}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "bert.", "module.model.", "_orig_mod.module."])
def test_a_wrappers_prefix_is_taken_away_and_put_back(prefix: str) -> None:
    plain = FAMILIES["Llama"][0]
    wrapped = tuple(prefix + name for name in plain)
    assert renamed(wrapped, plain) == dict(zip(wrapped, plain, strict=True))
    assert renamed(plain, wrapped) == dict(zip(plain, wrapped, strict=True))


def test_a_body_aligns_with_the_same_body_under_a_head() -> None:
    body, headed = FAMILIES["BERT"][0], FAMILIES["BERT with a head"][0]
    assert renamed(body, headed) == {name: f"bert.{name}" for name in body}
    into_body = renamed(headed, body)
    assert into_body == {name: name.removeprefix("bert.") for name in headed if name.startswith("bert.")}
    assert str(align(body, headed)) == "prefix 'bert.' added"
    assert str(align(headed, body)) == "prefix 'bert.' removed"


def test_names_that_fit_already_stay() -> None:
    llama = FAMILIES["Llama"][0]
    assert align(llama, llama) is None
    assert align(llama, llama[:-1]) is None
    assert align(llama[:-1], llama) is None


@pytest.mark.parametrize(
    ("own", "reference"), [("BERT", "RoBERTa"), ("Llama", "GPT-2"), ("Llama", "GPT-NeoX"), ("T5", "BART")]
)
def test_other_architectures_are_not_brought_together(own: str, reference: str) -> None:
    found = renamed(FAMILIES[own][0], FAMILIES[reference][0])
    wanted = set(FAMILIES[reference][0])
    assert all(new in wanted and new.endswith(old) for old, new in found.items())
    if own != "BERT":  # a BERT body has RoBERTa's names, but for the prefix
        assert found == {}


def test_two_prefixes_that_fit_alike_are_not_chosen_between() -> None:
    own = ("layers.0.attn.weight", "layers.1.attn.weight")
    reference = tuple(f"{side}.{name}" for side in ("encoder", "decoder") for name in own)
    assert align(own, reference) is None


def test_no_two_tensors_get_one_name() -> None:
    own = ("model.a.w", "model.b.w", "model.c.w", "model.d.w", "a.w")
    found = renamed(own, ("a.w", "b.w", "c.w", "d.w"))
    assert found == {"model.b.w": "b.w", "model.c.w": "c.w", "model.d.w": "d.w"}


@pytest.mark.parametrize(
    ("pattern", "name", "fits"),
    [
        ("*norm*", "model.norm.weight", True),
        ("*norm*|lm_head.*", "lm_head.weight", True),
        ("*norm* | lm_head.*", "lm_head.weight", True),
        ("model.layers.?.*", "model.layers.10.w", False),
        ("model.layers.1[02].*", "model.layers.12.w", True),
        ("NORM", "norm", False),
    ],
)
def test_patterns_are_shell_patterns_with_alternatives(pattern: str, name: str, fits: bool) -> None:
    assert matches(pattern, name) == fits
