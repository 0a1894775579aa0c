"""Small checkpoints made on the spot: real transformers architectures with a few thousand parameters."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from portmanteau.merge.compiled import library
from tests.tiny_models import save

LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "max_position_embeddings": 64,
}

SaveLlama = Callable[..., Path]
Write = Callable[[str], Path]
WithoutLibrary = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def save_llama(tmp_path: Path) -> SaveLlama:
    """Give a function that saves a small random Llama as a Hugging Face folder and gives its path."""

    def save(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "1GB", **config: Any) -> Path:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **config})).to(dtype)
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
        return tmp_path / name

    return save


@pytest.fixture
def save_tensors(tmp_path: Path) -> Callable[[str, Mapping[str, Tensor]], Path]:
    """Give a function that saves tensors as NAME/model.safetensors and gives the folder."""

    def save(name: str, tensors: Mapping[str, Tensor]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(dict(tensors), folder / "model.safetensors")
        return folder

    return save


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Give a function that writes a recipe beside the models that a test saves."""

    def written(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(dedent(text))
        return path

    return written


@pytest.fixture
def without_library(tmp_path: Path) -> WithoutLibrary:
    """Give a function that begins a context in which the compiled library is not there."""

    @contextmanager
    def switched_off() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "_FILE", tmp_path / "no such file")
            library.library.cache_clear()
            yield
        library.library.cache_clear()

    return switched_off


@pytest.fixture(scope="session")
def llama_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save base, a and b, Llamas of four layers that differ a little, to be read and not to be changed."""
    folder = tmp_path_factory.mktemp("llama")
    for seed, name in enumerate(("base", "a", "b")):
        save("llama", seed, folder / name)
    return folder


@pytest.fixture
def llamas(llama_family: Path, tmp_path: Path) -> Path:
    """Give a folder with copies of base, a and b."""
    for name in ("base", "a", "b"):
        shutil.copytree(llama_family / name, tmp_path / name)
    return tmp_path
