"""mergekit 0.1.5 and portmanteau given the same YAML, in this process, and how their results are compared."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from portmanteau import merge
from portmanteau.compositions import compose, load
from portmanteau.compositions.recipe import text as recipe_text

with warnings.catch_warnings():
    # mergekit.io.lazy_unpickle names numpy.core, which NumPy 2 calls numpy._core
    warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

Tensors = Mapping[str, Tensor]
_OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)


def theirs(config: Mapping[str, Any], out: Path, *, fails: str = "") -> Tensors:
    """Let mergekit merge; `fails`: the words it ends with, after it has written the weights."""
    parsed = MergeConfiguration.model_validate(config)
    if fails:
        with pytest.raises(Exception, match=fails):
            run_merge(parsed, str(out), _OPTIONS)
    else:
        run_merge(parsed, str(out), _OPTIONS)
    return load_file(out / "model.safetensors")


def ours(config: Mapping[str, Any] | str, out: Path, folder: Path | None = None) -> Tensors:
    """Build a mergekit YAML, or a recipe of ours, given as its text."""
    path = (folder or out.parent) / f"{out.name}.yml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False))
    loaded = load(path)
    merge.build(compose(loaded), out, dtype=loaded.output.dtype, recipe=loaded.text)
    return load_file(out / "model.safetensors")


def converted(path: Path) -> str:
    """Give the recipe of ours that a mergekit YAML stands for."""
    return recipe_text.written(load(path).document.value)


def config_of(folder: Path) -> dict[str, Any]:
    """Read a result's config.json, apart from the version that wrote it."""
    found = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in found.items() if key != "transformers_version"}


def assert_close(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


def assert_cast_once(narrow: Tensors, exact: Tensors) -> None:
    """Compare bfloat16 with float32 results: each entry is what some number within 1e-6 of the exact one rounds to."""
    assert narrow.keys() == exact.keys()
    for name, values in exact.items():
        room = 1e-6 + 1e-6 * values.abs()
        assert narrow[name].dtype == torch.bfloat16
        assert bool(((values - room).bfloat16() <= narrow[name]).all()), name
        assert bool(((values + room).bfloat16() >= narrow[name]).all()), name


def assert_same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
