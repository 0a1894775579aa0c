"""Real transformers architectures with a few thousand parameters each, by short names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 32,
}
TEXT: dict[str, Any] = {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 1}
VISION: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "vocab_size": 32, "feed_forward_proj": "gated-gelu"}
_SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
_QWEN_VISION = {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4}


_EXPERT = re.compile(r"(?P<layer>.+)\.(?:mlp|block_sparse_moe)\.experts\.(?P<number>\d+)\.(?P<matrix>\w+)\.weight")


def make(name: str, **more: Any) -> Any:
    """Make a model by its short name, with fresh random weights; `more` goes into the config of a text model."""
    import transformers

    model_class, config = {**_text(transformers), **_sequences(transformers), **_seeing(transformers)}[name](more)
    return getattr(transformers, model_class)(config)


def save(name: str, seed: int, folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    """Save a model: random numbers common to all seeds and, with any seed but 0, a change of its own."""
    torch.manual_seed(seed)
    model = make(name, **more)
    common, own = torch.Generator().manual_seed(9), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        change = torch.randn(parameter.shape, generator=own) * (0.1 if seed else 0.0)
        parameter.data = torch.randn(parameter.shape, generator=common) + change
    model.to(dtype).save_pretrained(folder)
    return folder


def save_fused(name: str, seed: int, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a mixture of experts in the layout that transformers 5 computes in: all experts of a layer in one tensor."""
    save(name, seed, folder, dtype)
    path = folder / "model.safetensors"
    save_file(fused(load_file(path)), path, {"format": "pt"})
    return folder


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the experts of a mixture, stored one by one, into the layout that mergekit and transformers 5 compute in.

    `experts.gate_up_proj` [experts, 2 × inner, hidden] and `experts.down_proj` [experts, hidden, inner]; the router of
    a Mixtral is called `mlp.gate`.
    """
    spelled = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    result: dict[str, Tensor] = {}
    experts: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, values in tensors.items():
        found = _EXPERT.fullmatch(name)
        if found is None:
            result[name.replace(".block_sparse_moe.", ".mlp.")] = values
            continue
        matrix = spelled.get(found["matrix"], found["matrix"])
        experts.setdefault(found["layer"], {}).setdefault(matrix, {})[int(found["number"])] = values
    for layer, matrices in experts.items():
        gate, up, down = (
            torch.stack([matrices[name][i] for i in range(len(matrices[name]))])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        result[f"{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        result[f"{layer}.mlp.experts.down_proj"] = down
    return result


Families = Mapping[str, Callable[[Mapping[str, Any]], tuple[str, Any]]]


def _text(t: Any) -> Families:
    kv = {**SIZES, "num_key_value_heads": 1}
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    return {
        "llama": lambda more: ("LlamaForCausalLM", t.LlamaConfig(**kv | more)),
        "qwen2": lambda more: ("Qwen2ForCausalLM", t.Qwen2Config(**kv | {"tie_word_embeddings": True} | more)),
        # at 2 labels, ⌊0.4 · 2⌋ = 0: there mergekit's breadcrumbs keep nothing of a bias, and ours one entry
        "bert": lambda more: ("BertForSequenceClassification", t.BertConfig(**SIZES | {"num_labels": 4} | more)),
        "gpt2": lambda more: (
            "GPT2LMHeadModel",
            t.GPT2Config(**{"n_embd": 16, "n_head": 2, "n_layer": 4, "n_positions": 32, "vocab_size": 32} | more),
        ),
        "qwen3_moe": lambda more: ("Qwen3MoeForCausalLM", t.Qwen3MoeConfig(**kv | experts | {"head_dim": 8} | more)),
        "qwen2_moe": lambda more: (
            "Qwen2MoeForCausalLM",
            t.Qwen2MoeConfig(**kv | experts | {"shared_expert_intermediate_size": 8} | more),
        ),
        "mixtral": lambda more: ("MixtralForCausalLM", t.MixtralConfig(**kv | {"num_local_experts": 4} | more)),
    }


def _sequences(t: Any) -> Families:
    audio = {"max_source_positions": 16, "max_target_positions": 16, "num_mel_bins": 8}
    tokens = {"pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    return {
        "t5": lambda more: (
            "T5ForConditionalGeneration",
            t.T5Config(**_T5 | {"num_layers": 4, "num_decoder_layers": 3} | more),
        ),
        "bart": lambda more: (
            "BartForConditionalGeneration",
            t.BartConfig(**_SEQ2SEQ | {"vocab_size": 32, "max_position_embeddings": 32} | more),
        ),
        "whisper": lambda more: (
            "WhisperForConditionalGeneration",
            t.WhisperConfig(**_SEQ2SEQ | audio | tokens | {"vocab_size": 64} | more),
        ),
    }


def _seeing(t: Any) -> Families:
    """Give the vision-language models: a text decoder, a vision tower, and what joins them."""
    siglip = t.SiglipVisionConfig(**VISION).to_dict()
    clip, llama = t.CLIPVisionConfig(**VISION), t.LlamaConfig(**TEXT)
    gemma3, gemma = t.Gemma3TextConfig(**TEXT, head_dim=8).to_dict(), t.GemmaConfig(**TEXT, head_dim=8).to_dict()
    pixels = {**VISION, "image_size": [8, 8], "patch_size": [4, 4]}
    return {
        "llava": _joined(t, "Llava", clip, llama),
        "llava_next": _joined(t, "LlavaNext", clip, llama),
        "gemma3": _joined(t, "Gemma3", siglip, gemma3, mm_tokens_per_image=4),
        "paligemma": _joined(t, "PaliGemma", {**siglip, "projection_dim": 16}, gemma, projection_dim=16),
        "mistral3": _joined(t, "Mistral3", t.PixtralVisionConfig(**VISION), t.MistralConfig(**TEXT, head_dim=8)),
        "idefics3": _joined(t, "Idefics3", VISION, llama, scale_factor=1),
        "internvl": _joined(t, "InternVL", pixels, t.Qwen2Config(**TEXT)),
        **_qwens(t),
    }


def _qwens(t: Any) -> Families:
    """Give those whose vision tower is called `visual`, and holds what joins it to the text."""
    merged = {**_QWEN_VISION, "intermediate_size": 24, "out_hidden_size": 16}
    mrope = {**TEXT, "rope_scaling": _MROPE}
    deep = {**merged, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return {
        "qwen2_vl": _joined(t, "Qwen2VL", {**_QWEN_VISION, "embed_dim": 16, "mlp_ratio": 2}, mrope),
        "qwen2_5_vl": _joined(t, "Qwen2_5_VL", merged, mrope),
        "qwen3_vl": _joined(t, "Qwen3VL", deep, {**mrope, "head_dim": 8}),
    }


def _joined(t: Any, kind: str, vision: Any, text: Any, **own: Any) -> Callable[..., tuple[str, Any]]:
    config = getattr(t, f"{kind}Config")
    return lambda more: (
        f"{kind}ForConditionalGeneration",
        config(vision_config=vision, text_config=text, **own, **more),
    )
