"""What is another result than mergekit's on purpose, or none: each with its reason, and a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Test = TypeVar("Test", bound=Callable[..., Any])
DIFFERENT = {
    "per-layer lists": "mergekit leaves layer_types and the like as long as they were, and may then fail to write them",
    "dropped tensors": "mergekit drops what its tables do not name, such as a Llama's biases; we refuse or merge it",
    "sources of the last slice": "mergekit makes what is behind the layers from as many models as the first slice has",
    "bf16": "mergekit computes in dtype; we compute in float32 and cast once to out_dtype, else dtype",
    "no base_model": "mergekit takes config and tokenizer of any one of the models; we take the first one's",
    "vocabularies": "mergekit cuts padded rows off when it is told a tokenizer source; we keep them",
    "generation_config": "mergekit loses it when tokenizer or chat_template is given; we keep it",
    "stages": "mergekit keeps the files of stages, stale ones too; ours are never files and never rounded",
    "experts": "mergekit fuses the experts of a mixture; we merge and write them one by one, by their own names",
    "unknown keys": "mergekit ignores unknown keys and parameters; we refuse them",
    "paths": "mergekit's relative paths are relative to the working directory; ours to the file",
    "twice": "mergekit merges one of two sources that are the same model; we refuse them",
    "modules": "mergekit drops modules that the file does not name; we refuse",
    "tables of positions": "mergekit moves T5's table of relative positions along with its block, or loses it; "
    "we keep it in the first block, made as the first slice is",
    "layers that are none": "mergekit takes the two maps in a Qwen-VL's merger for layers, so gradients run over them; "
    "we take them for tensors outside the layers",
    "names": "mergekit writes a LLaVA as transformers 5 saves it under other names, without its text decoder; "
    "we keep the checkpoint's names, and all tensors",
    "architectures": "mergekit fails on T5 v1.0, Whisper, Qwen2-VL and Gemma 3 as transformers 5 saves them; we do not",
}


def differs(key: str) -> Callable[[Test], Test]:
    """Say of a test that it shows a deliberate difference."""
    assert key in DIFFERENT
    return lambda test: test
