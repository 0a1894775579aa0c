"""mergekit YAMLs as they are: the same file given to mergekit 0.1.5 and to us, over generated configurations.

Every method in every form of its parameters (one value, a gradient, filters, both), written at any of the levels that
mergekit knows, over whole models and over slices, on three families. What differs on purpose stands in DIFFERENT.
"""

from __future__ import annotations

import itertools
import json
import random
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from portmanteau import merge
from portmanteau.compositions import compose, load, recipe_text

with warnings.catch_warnings():
    # mergekit.io.lazy_unpickle names numpy.core, which NumPy 2 calls numpy._core
    warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

pytestmark = pytest.mark.mergekit

Tensors = Mapping[str, Tensor]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 32,
}
FAMILIES = ("llama", "qwen2", "bert")
NAMES = ("base", "a", "b")
OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)


# ---- the models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save base, a and b of each family: FAMILY/NAME."""
    from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("models")
    kinds: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)),
        "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES)),
    }
    for family, make in kinds.items():
        for seed, name in enumerate(NAMES):
            torch.manual_seed(seed)
            model = make()
            common, own = torch.Generator().manual_seed(9), torch.Generator().manual_seed(seed)
            for parameter in model.parameters():
                change = torch.randn(parameter.shape, generator=own) * (0.0 if name == "base" else 0.1)
                parameter.data = torch.randn(parameter.shape, generator=common) + change
            model.save_pretrained(folder / family / name)
    return folder


# ---- generated configurations -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One method's parameters to try: name → least and greatest value, of each model or of all."""

    own: Mapping[str, tuple[float, float]]
    common: Mapping[str, tuple[float, float]]
    base: str  # "needed", "none", or "either"
    models: int = 2  # beside the base
    fixed: Mapping[str, Any] | None = None


WEIGHT = {"weight": (0.2, 0.9)}
DENSITY = {"density": (0.4, 0.9)}
LAMBDA = {"lambda": (0.5, 1.5)}
KINDS: dict[str, Kind] = {
    "linear": Kind(WEIGHT, {}, "either"),
    "slerp": Kind({}, {"t": (0.0, 1.0)}, "needed", models=1),
    "nuslerp": Kind(WEIGHT, {}, "either"),
    "multislerp": Kind(WEIGHT, {}, "either"),
    "karcher": Kind({}, {"tol": (1e-9, 1e-8)}, "none"),
    "task_arithmetic": Kind(WEIGHT, LAMBDA, "needed"),
    "ties": Kind({**WEIGHT, **DENSITY}, LAMBDA, "needed"),
    "dare_linear": Kind(WEIGHT, LAMBDA, "needed"),
    "dare_ties": Kind(WEIGHT, LAMBDA, "needed"),
    "breadcrumbs": Kind({**WEIGHT, **DENSITY, "gamma": (0.0, 0.1)}, LAMBDA, "needed"),
    "breadcrumbs_ties": Kind({**WEIGHT, **DENSITY, "gamma": (0.0, 0.1)}, LAMBDA, "needed"),
    "sce": Kind({}, {"select_topk": (0.3, 0.9)}, "needed"),
    "ram": Kind({}, {"epsilon": (0.01, 0.1)}, "needed"),
    "ramplus_tl": Kind({}, {"epsilon": (0.01, 0.1), "r": (0.1, 0.5)}, "needed"),
    "model_stock": Kind({}, {}, "needed", fixed={"filter_wise": True}),
    "nearswap": Kind({}, {"t": (0.001, 0.1)}, "needed", models=1),
    "arcee_fusion": Kind({}, {}, "needed", models=1),
    "passthrough": Kind({"scale": (0.3, 2.0)}, {}, "none", models=1),
}
FORMS = ("scalar", "gradient", "filter", "both")
LAYOUTS = ("models", "slices")

DIFFERENT = {
    "the config of sliced Qwen2": "mergekit leaves layer_types as long as it was, and its save_pretrained refuses that",
    "della, della_linear, dare_* below density 1": "their random numbers are torch's; held to their laws elsewhere",
    "slices with other numbers of sources": "mergekit makes what is behind the layers from too few of them",
    "inputs in bfloat16 with dtype: bfloat16": "mergekit computes in it; we compute in float32 and cast once",
    "no base_model": "mergekit takes the config of any one of the models; we take the first one's",
}


class Draw:
    """Random values of a parameter, in one of the forms, the same for the same case."""

    def __init__(self, case: str, form: str) -> None:
        self.random = random.Random(zlib.crc32(case.encode()))
        self._form = form

    def value(self, bounds: tuple[float, float]) -> float:
        return round(self.random.uniform(*bounds), 4) if bounds[1] > 1e-3 else self.random.uniform(*bounds)

    def gradient(self, bounds: tuple[float, float]) -> list[float]:
        return [self.value(bounds) for _ in range(self.random.choice((2, 3, 5)))]

    def parameter(self, bounds: tuple[float, float]) -> Any:
        """Give one value, a gradient, or filters over either."""
        if self._form == "scalar":
            return self.value(bounds)
        if self._form == "gradient":
            return self.gradient(bounds)
        inner = self.value if self._form == "filter" else self.gradient
        words = self.random.sample(("mlp", "self_attn", "attention.self", "norm", "embed", ".1.", "weight"), 3)
        return [*({"filter": word, "value": inner(bounds)} for word in words), {"value": inner(bounds)}]

    def open_filters(self, bounds: tuple[float, float]) -> Any:
        """Give filters that do not fit every tensor: the next level holds for the others."""
        return [{"filter": word, "value": self.value(bounds)} for word in ("q_proj", "query", "down_proj", "norm")]


def configuration(method: str, form: str, layout: str, base: bool, folder: Path) -> dict[str, Any]:
    """Write one configuration: parameters of models at their sources or above, common ones at the slice or the top."""
    kind, draw = KINDS[method], Draw(f"{method} {form} {layout} {base}", form)
    labels = [*(["base"] if base else []), *NAMES[1 : 1 + kind.models]]
    draw.random.shuffle(labels)
    top = dict(kind.fixed or {}) | {name: draw.parameter(bounds) for name, bounds in {**kind.own, **kind.common}.items()}
    counted_base = base and method in ("linear", "multislerp")

    def own(label: str) -> dict[str, Any]:
        if label == "base" and not (counted_base and method == "linear"):
            return {}
        names = [name for name in kind.own if draw.random.random() < 0.7]
        wide = {name: draw.open_filters if draw.random.random() < 0.3 else draw.parameter for name in names}
        found = {name: write(kind.own[name]) for name, write in wide.items()}
        return {"parameters": found} if found else {}

    config: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
    if layout == "models":
        config["models"] = [{"model": str(folder / label), **own(label)} for label in labels]
    else:
        config["slices"] = []
        for count in (3, 1, 2):
            sources = []
            for label in labels:
                first = draw.random.randint(0, 4 - count)
                sources.append({"model": str(folder / label), "layer_range": [first, first + count], **own(label)})
            level = {name: draw.open_filters(kind.common[name]) for name in kind.common if draw.random.random() < 0.4}
            config["slices"].append({"sources": sources, **({"parameters": level} if level else {})})
    if base:
        config["base_model"] = str(folder / "base")
    return {**config, **({"parameters": top} if top else {})}


def cases() -> Iterator[tuple[str, str, str, str, bool]]:
    """Go through the cases: each method in each form and layout, the families in turn."""
    families = itertools.cycle(FAMILIES)
    for method, kind in KINDS.items():
        forms = FORMS if kind.own or kind.common else FORMS[:1]
        bases = {"needed": (True,), "none": (False,), "either": (True, False)}[kind.base]
        for form, layout, base in itertools.product(forms, LAYOUTS, bases):
            yield next(families), method, form, layout, base
        next(families)


CASES = list(cases())


# ---- the two programs -------------------------------------------------------------------------------------------


def theirs(config: Mapping[str, Any], out: Path, *, fails: str = "") -> Tensors:
    """Let mergekit merge; `fails`: the words it ends with, after it has written the weights."""
    parsed = MergeConfiguration.model_validate(config)
    if fails:
        with pytest.raises(Exception, match=fails):
            run_merge(parsed, str(out), OPTIONS)
    else:
        run_merge(parsed, str(out), OPTIONS)
    return load_file(out / "model.safetensors")


def ours(config: Mapping[str, Any] | str, out: Path, folder: Path | None = None) -> Tensors:
    """Build a mergekit YAML, or a recipe of ours, given as its text."""
    path = (folder or out.parent) / f"{out.name}.yml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False))
    loaded = load(path)
    merge.build(compose(loaded), out, dtype=loaded.output.dtype, recipe=loaded.text)
    return load_file(out / "model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in found.items() if key != "transformers_version"}


def assert_close(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


def assert_same(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(("family", "method", "form", "layout", "base"), CASES, ids=lambda value: str(value))
def test_a_file_merges_as_in_mergekit(
    models: Path, tmp_path: Path, family: str, method: str, form: str, layout: str, base: bool
) -> None:
    config = configuration(method, form, layout, base, models / family)
    fails = "num_hidden_layers" if (family, layout) == ("qwen2", "slices") else ""
    assert_close(ours(config, tmp_path / "ours"), theirs(config, tmp_path / "theirs", fails=fails))
    if not fails and base:
        assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
