"""mergekit YAMLs as they are: the same file given to mergekit 0.1.5 and to us, over generated configurations.

Every method in every form of its parameters (one value, a gradient, filters, both), written at any of the levels that
mergekit knows, over whole models and over slices, on three families. What differs on purpose stands in DIFFERENT.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from portmanteau import merge
from portmanteau.compositions import compose, load
from portmanteau.compositions.mergekit.methods import METHODS
from portmanteau.compositions.recipe import text as recipe_text

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
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    folder = tmp_path_factory.mktemp("models")
    kinds: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)),
        # at 2 labels, ⌊0.4 · 2⌋ = 0: there mergekit's breadcrumbs keep nothing of a bias, and ours one entry
        "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=4)),
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

DIFFERENT = {  # what is another result on purpose, or none, each with its test below
    "per-layer lists": "mergekit leaves layer_types as long as it was, and its save_pretrained refuses that",
    "dropped tensors": "mergekit drops what its tables do not name, such as a Llama's biases; we refuse or merge it",
    "sources of the last slice": "mergekit makes what is behind the layers from as many models as the first slice has",
    "bf16": "mergekit computes in dtype; we compute in float32 and cast once to out_dtype, else dtype",
    "no base_model": "mergekit takes config and tokenizer of any one of the models; we take the first one's",
    "vocabularies": "mergekit cuts padded rows off when it is told a tokenizer source; we keep them",
    "generation_config": "mergekit loses it when tokenizer or chat_template is given; we keep it",
    "stages": "mergekit keeps the files of stages, stale ones too; ours are never files and never rounded",
    "experts": "mergekit writes the experts of a mixture fused; we write them as they were",
    "unknown keys": "mergekit ignores unknown keys and parameters; we refuse them",
    "paths": "mergekit's relative paths are relative to the working directory; ours to the file",
    "twice": "mergekit merges one of two sources that are the same model; we refuse them",
    "modules": "mergekit drops modules that the file does not name; we refuse",
}
ELSEWHERE = {  # methods whose random numbers are torch's in mergekit: their laws are tested with the operators
    "della",
    "della_linear",
}
_TESTED: set[str] = set()


def differs(key: str) -> Callable[[Any], Any]:
    """Mark the test of a deliberate difference."""
    assert key in DIFFERENT
    _TESTED.add(key)
    return lambda test: test


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
    top = dict(kind.fixed or {}) | {
        name: draw.parameter(bounds) for name, bounds in {**kind.own, **kind.common}.items()
    }
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
        if base and draw.random.random() < 0.5:
            labels.remove("base")  # then it is added
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
    fails = "num_hidden_layers" if (family, layout) == ("qwen2", "slices") else ""  # DIFFERENT: per-layer lists
    merged = ours(config, tmp_path / "ours")
    assert_close(merged, theirs(config, tmp_path / "theirs", fails=fails))
    if not fails and base:
        assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")
    native = recipe_text.written(load(tmp_path / "ours.yml").document.value)
    assert "merge_method" not in native
    assert_same(ours(native, tmp_path / "native"), merged)
    assert config_of(tmp_path / "native") == config_of(tmp_path / "ours")


def test_every_method_is_generated() -> None:
    assert KINDS.keys() | ELSEWHERE == METHODS.keys()


def test_random_methods_convert_to_the_same_bytes(models: Path, tmp_path: Path) -> None:
    for method in ("dare_ties", "della"):
        config = {
            "merge_method": method,
            "base_model": str(models / "llama" / "base"),
            "parameters": {"weight": 0.5, "density": 0.5},
            "slices": [
                {"sources": [{"model": str(models / "llama" / n), "layer_range": [0, 2]} for n in NAMES]}
                for _ in range(2)
            ],
        }
        merged = ours(config, tmp_path / method)
        native = recipe_text.written(load(tmp_path / f"{method}.yml").document.value)
        assert_same(ours(native, tmp_path / f"{method}-native"), merged)
        one, other = (merged[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 2))
        assert not torch.equal(one, other)  # the same layers, and random numbers of their own


# ---- what is said of the text -----------------------------------------------------------------------------------


def said(text: str, folder: Path) -> list[str]:
    """Give the mistakes of a file as `LINE: WHAT (HINT)`."""
    path = folder / "merge.yml"
    path.write_text(dedent(text).lstrip("\n"))
    with pytest.raises(merge.RecipeError) as caught:
        compose(load(path))
    return [
        f"{m.where.rpartition(':')[2]}: {m.what}" + (f" ({m.hint})" if m.hint else "") for m in caught.value.mistakes
    ]


@pytest.fixture
def llamas(models: Path, tmp_path: Path) -> Path:
    """Give a folder with base, a and b, Llamas of four layers."""
    for name in NAMES:
        shutil.copytree(models / "llama" / name, tmp_path / name)
    return tmp_path


@differs("unknown keys")
def test_the_four_typos_that_mergekit_ignores_are_named_with_their_lines(llamas: Path) -> None:
    text = """
        merge_method: ties
        base_model: base
        modles: []
        models:
          - model: a
            parameter: {weight: 1}
          - model: b
            parameters: {weight: 0.3, denisty: 0.5}
        parameters: {weight: 1.0}
        dtypee: float32
    """
    assert said(text, llamas) == [
        "3: unknown key 'modles' (did you mean 'modules'?)",
        "6: unknown key 'parameter' (did you mean 'parameters'?)",
        "8: ties has no parameter 'denisty' (did you mean 'density'?)",
        "10: unknown key 'dtypee' (did you mean 'dtype'?)",
    ]


def test_keys_and_values_that_are_wrong_are_reported_together(llamas: Path) -> None:
    text = """
        merge_method: ties
        base_model: base
        models:
          - model: a
            parameters: {weight: [0.1, x], density: 1.5}
          - model: c
            parameters: {weight: 0.3, gamma: 1}
        parameters: {normalize: "yes", lambda: big}
        dtype: float99
    """
    found = said(text, llamas)
    assert [one.partition(" (")[0] for one in found] == [
        "5: weight is 'x': input should be a valid number, unable to parse string as a number",
        "5: density is 1.5: input should be less than or equal to 1",
        "6: no file or folder 'c'",
        "7: ties has no parameter 'gamma'",
        "8: normalize is 'yes'",
        "8: scale is 'big': input should be a valid number, unable to parse string as a number",
        "9: dtype is 'float99': unknown dtype 'float99'; did you mean 'float64'?",
    ]


LINEAR = "merge_method: linear\nparameters: {weight: 1.0}\n"
AB = "models: [{model: a}, {model: b}]\n"
PART = "{model: a, layer_range: [0, 4]}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("merge_method: linaer\n" + AB, "1: unknown merge_method 'linaer' (did you mean 'linear'?)"),
        ("merge_method: linear\n" + AB, "2: linear needs the parameter 'weight', which is not given"),
        (LINEAR, "1: none of models, slices and modules is given"),
        (LINEAR + AB + f"slices: [{{sources: [{PART}]}}]", "4: models and slices are given"),
        (LINEAR + AB + "name: x", "4: unknown key 'name'"),
        (LINEAR + f"slices: [{{sources: [{PART}], residual_weight: 0.1}}]", "3: residual_weight has no effect"),
        (LINEAR + "slices: [{sources: [{model: a}]}]", "3: a source needs layer_range"),
        (LINEAR + "slices: [{sources: [{model: a, layer_range: [2, 5]}]}]", "3: slices: layers [2, 5] of a, which has"),
        (LINEAR + "models: [{model: a}, {model: c}]", "3: no file or folder 'c'"),
        (LINEAR + AB + "dtype: float99", "4: dtype is 'float99': unknown dtype 'float99'"),
        (LINEAR + AB + "tokenizer_source: union", "4: a has no tokenizer"),
        (LINEAR + AB + "tokenizer_source: base", "4: the tokenizer of the base is asked for, and there is no base_mo"),
        (
            LINEAR + AB + "tokenizer: {source: a, tokens: {x: {sorce: a}}}",
            "4: unknown key 'sorce' (did you mean 'source'?)",
        ),
        (LINEAR + AB + "tokenizer: {}", "4: a has no tokenizer"),
        (LINEAR + AB + "chat_template: chat_ml", "4: chat_template is 'chat_ml': no Jinja template and no known name"),
        (LINEAR + "models: [{model: {model: a, override_architecture: X}}]", "3: override_architecture is not needed"),
        (LINEAR + "models: [{model: a+x+y}]", "3: 'a+x+y' is no reference to a model"),
        ("merge_method: ties\nparameters: {weight: 1}\n" + AB, "1: ties needs its base_model, and there is none"),
        (
            "merge_method: nuslerp\nparameters: {weight: 1}\nbase_model: base\nslices:\n"
            "- sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]",
            "5: nuslerp needs its base_model, and it is not among the sources",
        ),
        ("merge_method: slerp\nbase_model: a\nmodels: [{model: b, parameters: {t: 0.5}}]", "3: t is no matter of one"),
        ("merge_method: slerp\nbase_model: a\nparameters: {t: 1}\nmodels: [{model: a}]", "4: slerp takes exactly 2"),
        ("merge_method: slerp\nbase_model: a\nparameters: {t: 2}\n" + AB, "3: t is 2: input should be less than or"),
        (
            "merge_method: linear\nmodels:\n - model: a\n   parameters: {weight: [{filter: mlp, value: 1}]}",
            "3: linear needs the parameter 'weight', which has no value for tensors that no filter fits",
        ),
        (
            LINEAR + "modules: {x: {models: [{model: a}], slices: [{}]}}",
            "3: the module 'x' has either models or slices",
        ),
        ("name: x\n" + LINEAR + AB + "---\nname: y\n" + LINEAR + AB, "1: no document is without `name:`"),
        (LINEAR + AB + "---\n" + LINEAR + AB, "5: several documents are without `name:`"),
    ],
)
def test_a_mistake_in_a_mergekit_file_is_named(llamas: Path, text: str, found: str) -> None:
    assert [one for one in said(text, llamas) if one.startswith(found)]


@differs("twice")
def test_a_model_that_is_listed_twice_is_refused(llamas: Path) -> None:
    assert said(LINEAR + "models: [{model: a}, {model: a}]", llamas)[0].startswith("3: a is listed twice")


def test_a_parameter_holds_from_the_nearest_level_whose_filters_fit(llamas: Path) -> None:
    text = """
        merge_method: linear
        parameters: {weight: [{filter: up_proj, value: 2.0}, {value: 0.0}], normalize: false}
        slices:
          - parameters: {weight: [{filter: down_proj, value: 3.0}]}
            sources:
              - {model: a, layer_range: [0, 4], parameters: {weight: [{filter: q_proj, value: 4.0}]}}
    """
    merged, a = ours(dedent(text), llamas / "out"), load_file(llamas / "a" / "model.safetensors")
    for inner, factor in (("mlp.up_proj", 2), ("mlp.down_proj", 3), ("self_attn.q_proj", 4), ("mlp.gate_proj", 0)):
        name = f"model.layers.2.{inner}.weight"
        torch.testing.assert_close(merged[name], a[name] * factor)


# ---- references -------------------------------------------------------------------------------------------------


def native(text: str, folder: Path) -> Any:
    """Give the recipe of ours that a mergekit file stands for."""
    path = folder / "merge.yml"
    path.write_text(dedent(text).lstrip("\n"))
    return load(path).document.value


def test_references_name_revisions_adapters_and_mappings(tmp_path: Path) -> None:
    found = native(
        """
        merge_method: linear
        parameters: {weight: 1.0}
        models:
          - model: org/one@3f2a
          - model: org/two+org/adapter@v1
          - model: {model: {path: other/one, revision: v2}, lora: null}
        """,
        tmp_path,
    )
    assert found == {
        "models": {
            "one": {"path": "org/one", "revision": "3f2a"},
            "two": "org/two",
            "one-2": {"path": "other/one", "revision": "v2"},
        },
        "steps": {"two+adapter": {"lora": {"base": "two", "adapters": [{"path": "org/adapter", "revision": "v1"}]}}},
        "merge": {"linear": {"models": ["one", "two+adapter", "one-2"]}},
    }


def test_a_folder_whose_name_has_signs_of_references_is_that_folder(llamas: Path) -> None:
    (llamas / "a").rename(llamas / "a@1+b")
    merged = ours(LINEAR + "models: [{model: a@1+b}]", llamas / "out")
    assert_same(merged, load_file(llamas / "a@1+b" / "model.safetensors"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it so
def test_an_adapter_in_a_reference_is_folded_in(llamas: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llamas / "a"),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(llamas / "adapter")
    merged = ours("merge_method: passthrough\nmodels: [{model: a+adapter}]", llamas / "out")
    expected = tuned.merge_and_unload().state_dict()
    for name, values in merged.items():
        torch.testing.assert_close(values, expected[name])


@differs("paths")
def test_paths_are_relative_to_the_file(llamas: Path) -> None:
    (llamas / "below").mkdir()
    merged = ours(LINEAR + "models: [{model: ../a}]", llamas / "out", llamas / "below")
    assert_same(merged, load_file(llamas / "a" / "model.safetensors"))


# ---- bundles and modules ----------------------------------------------------------------------------------------


@differs("stages")
def test_a_bundle_is_one_merge_whose_stages_are_never_files(llamas: Path) -> None:
    text = """
        name: soup
        merge_method: linear
        parameters: {weight: 1.0}
        models: [{model: a}, {model: b}]
        dtype: bfloat16
        ---
        merge_method: task_arithmetic
        base_model: base
        parameters: {weight: 0.5}
        models: [{model: soup}]
        dtype: float32
    """
    before = {path.name for path in llamas.iterdir()}
    merged = ours(dedent(text), llamas / "out")
    assert {path.name for path in llamas.iterdir()} - before == {"out", "out.yml"}
    base, a, b = (load_file(llamas / name / "model.safetensors") for name in NAMES)
    for name, values in merged.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, base[name] / 2 + (a[name] + b[name]) / 4, rtol=1e-6, atol=1e-6)


@pytest.fixture
def towers(save_tensors: Callable[[str, Tensors], Path], tmp_path: Path) -> Path:
    """Save a (ones) and b (threes), models of text, vision and what joins them."""
    for name, value in (("a", 1.0), ("b", 3.0)):
        tensors = {
            f"{prefix}.layers.{i}.mlp.weight": torch.full((2, 2), value + i / 8)
            for prefix in ("language_model.model", "vision_tower.encoder")
            for i in range(2)
        }
        tensors |= {"multi_modal_projector.linear.weight": torch.full((2, 2), value)}
        save_tensors(name, tensors | {"language_model.lm_head.weight": torch.full((2, 2), value)})
    return tmp_path


MODULES = """
merge_method: linear
modules:
  vision_tower: {models: [{model: a}], parameters: {weight: 1.0}}
  multi_modal_projector: {models: [{model: b}]}
  text_decoder:
    slices:
      - sources: [{model: b, layer_range: [0, 2]}]
      - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
parameters: {weight: 2.0}
"""


def test_each_module_is_merged_in_its_own_way(towers: Path) -> None:
    merged = ours(MODULES, towers / "out")
    values = {name: float(tensor[0, 0]) for name, tensor in merged.items()}
    assert values == {
        "vision_tower.encoder.layers.0.mlp.weight": 1.0,
        "vision_tower.encoder.layers.1.mlp.weight": 1.125,
        "multi_modal_projector.linear.weight": 3.0,
        "language_model.model.layers.0.mlp.weight": 3.0,
        "language_model.model.layers.1.mlp.weight": 3.125,
        "language_model.model.layers.2.mlp.weight": 2.0,
        "language_model.model.layers.3.mlp.weight": 2.125,
        "language_model.lm_head.weight": 2.0,
    }


def test_a_module_may_become_shorter(towers: Path) -> None:
    text = MODULES.replace(
        "layer_range: [0, 2]}]\n      - sources: [{model: a, layer_range: [0, 2]}, ", "layer_range: [0, 1]}]\n      # "
    )
    merged = ours(text, towers / "out")
    layers = [name for name in merged if ".layers." in name]
    assert sorted(layers) == [
        "language_model.model.layers.0.mlp.weight",
        "vision_tower.encoder.layers.0.mlp.weight",
        "vision_tower.encoder.layers.1.mlp.weight",
    ]


@differs("modules")
def test_tensors_of_no_module_are_refused(towers: Path) -> None:
    text = "merge_method: linear\nparameters: {weight: 1}\nmodules:\n  vision_tower: {models: [{model: a}]}\n"
    (found,) = said(text, towers)
    assert found.startswith("1: assemble: no pattern fits language_model.lm_head.weight")


# ---- what goes with the weights ---------------------------------------------------------------------------------


@differs("bf16")
def test_the_result_is_cast_once_to_out_dtype(models: Path, tmp_path: Path) -> None:
    folder = models / "llama"
    config: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in "ab"],
        "parameters": {"weight": 0.7, "density": 0.5},
        "dtype": "float32",
    }
    exact = theirs(config, tmp_path / "fp32")
    merged = ours({**config, "dtype": "bfloat16"}, tmp_path / "ours")
    # where terms cancel, the last bit of an fp32 sum may decide on the rounding
    differing = sum(int((merged[name] != exact[name].bfloat16()).sum()) for name in exact)
    assert {values.dtype for values in merged.values()} == {torch.bfloat16}
    assert differing <= 3
    assert config_of(tmp_path / "ours")["dtype"] == "bfloat16"
    wide = ours({**config, "dtype": "bfloat16", "out_dtype": "float32"}, tmp_path / "wide")
    assert_close(wide, exact)


@differs("per-layer lists")
def test_a_stack_that_was_put_together_anew_loads_with_its_kinds_of_layers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    kinds = ["full_attention", "sliding_attention"] * 2
    more = {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}
    Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1, **more)).save_pretrained(tmp_path / "a")
    ranges = [[0, 3], [1, 4], [3, 4]]
    parts = [{"sources": [{"model": str(tmp_path / "a"), "layer_range": one}]} for one in ranges]
    config = {"merge_method": "passthrough", "slices": parts}
    theirs(config, tmp_path / "theirs", fails="num_hidden_layers")
    merged = ours(config, tmp_path / "ours")
    found = config_of(tmp_path / "ours")
    assert found["num_hidden_layers"] == 7
    assert found["layer_types"] == [*kinds[0:3], *kinds[1:4], *kinds[3:4]]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_same(dict(model.state_dict()), merged)


@differs("dropped tensors")
def test_biases_that_mergekit_drops_are_merged(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).save_pretrained(tmp_path / name)
    config = {"merge_method": "linear", "models": [{"model": str(tmp_path / n)} for n in "ab"]}
    config["parameters"] = {"weight": 1.0}
    merged, other = ours(config, tmp_path / "ours"), theirs(config, tmp_path / "theirs")
    inputs = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert merged.keys() == inputs[0].keys() > other.keys()
    assert_close(merged, {name: (inputs[0][name] + inputs[1][name]) / 2 for name in merged})


@differs("sources of the last slice")
def test_what_is_behind_the_layers_is_made_as_the_last_slice_is(models: Path, tmp_path: Path) -> None:
    folder = models / "llama"
    source = lambda name, first, end: {"model": str(folder / name), "layer_range": [first, end]}  # noqa: E731
    config = {
        "merge_method": "linear",
        "parameters": {"weight": 1.0},
        "slices": [{"sources": [source("a", 0, 2)]}, {"sources": [source("a", 2, 4), source("b", 2, 4)]}],
    }
    merged, other = ours(config, tmp_path / "ours"), theirs(config, tmp_path / "theirs")
    a, b = (load_file(folder / name / "model.safetensors") for name in "ab")
    for name in ("model.norm.weight", "lm_head.weight"):
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)
        assert torch.equal(other[name], a[name])
    assert torch.equal(merged["model.embed_tokens.weight"], a["model.embed_tokens.weight"])


@differs("no base_model")
def test_without_a_base_config_and_files_are_those_of_the_first_model(llamas: Path) -> None:
    for name in NAMES:
        found = json.loads((llamas / name / "config.json").read_text())
        (llamas / name / "config.json").write_text(json.dumps({**found, "of": name}))
    ours(LINEAR + "models: [{model: b}, {model: a}]", llamas / "out")
    assert config_of(llamas / "out")["of"] == "b"
    ours(LINEAR + "base_model: base\nmodels: [{model: b}, {model: a}, {model: base}]", llamas / "with")
    assert config_of(llamas / "with")["of"] == "base"
    parts = "slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: b, layer_range: [2, 4]}]}]"
    ours("merge_method: passthrough\nbase_model: b\n" + parts, llamas / "sliced")
    assert config_of(llamas / "sliced")["of"] == "b"


@pytest.fixture
def tokenized(llamas: Path) -> Path:
    """Give base, a and b a tokenizer of 8 tokens beside embeddings of 32 rows, and two templates."""
    for name, template in (("base", "{{ 'base' }}"), ("a", "{{ 'a' }}"), ("b", "{{ 'a' }}")):
        write_tokenizer(llamas / name, [f"t{i}" for i in range(8)], template)
        (llamas / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return llamas


def write_tokenizer(folder: Path, words: list[str], template: str) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "t0")).save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "of": folder.name, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


@differs("vocabularies")
@differs("generation_config")
@pytest.mark.parametrize("asked", ["tokenizer_source: base", "tokenizer: {source: base}", "tokenizer_source: b"])
def test_a_tokenizer_of_the_same_vocabulary_is_taken_and_no_row_cut(tokenized: Path, asked: str) -> None:
    merged = ours(LINEAR + "base_model: base\nmodels: [{model: a}, {model: b}]\n" + asked, tokenized / "out")
    assert merged["model.embed_tokens.weight"].shape == (32, 16)
    assert config_of(tokenized / "out")["vocab_size"] == 32
    wanted = "b" if asked.endswith(" b") else "base"
    assert json.loads((tokenized / "out" / "tokenizer_config.json").read_text())["of"] == wanted
    assert json.loads((tokenized / "out" / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}


def test_a_tokenizer_that_gives_other_ids_brings_the_rows_in_its_order(tokenized: Path) -> None:
    write_tokenizer(tokenized / "base", [f"t{7 - i}" for i in range(8)], "")
    merged = ours(LINEAR + "models: [{model: a}, {model: b}]\ntokenizer_source: ./base", tokenized / "out")
    a, b = (load_file(tokenized / name / "model.safetensors")["lm_head.weight"] for name in "ab")
    order = [*reversed(range(8)), *range(8, 32)]
    torch.testing.assert_close(merged["lm_head.weight"], (a[order] + b[order]) / 2)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", "a"), ('"{% if true %}mine{% endif %}"', "mine"), ("|\n  {{ 'one' }}\n  two", "one\ntwo")],
)
def test_a_chat_template_is_written_and_used(tokenized: Path, asked: str, expected: str) -> None:
    from transformers import AutoTokenizer

    text = LINEAR + f"base_model: base\nmodels: [{{model: a}}, {{model: b}}]\nchat_template: {asked}\n"
    ours(text, tokenized / "out")
    tokenizer = AutoTokenizer.from_pretrained(tokenized / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == expected
    converted = recipe_text.written(load(tokenized / "out.yml").document.value)
    ours(converted, tokenized / "again", tokenized)
    template = "chat_template.jinja"
    assert (tokenized / "again" / template).read_text() == (tokenized / "out" / template).read_text()


@differs("experts")
def test_experts_keep_their_names(tmp_path: Path, save_tensors: Callable[[str, Tensors], Path]) -> None:
    for name, value in (("a", 1.0), ("b", 3.0)):
        tensors = {
            f"model.layers.{i}.block_sparse_moe.experts.{j}.w1.weight": torch.full((2, 2), value)
            for i in range(2)
            for j in range(2)
        }
        save_tensors(name, tensors)
    parts = "slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: b, layer_range: [1, 2]}]}]"
    merged = ours("merge_method: passthrough\n" + parts, tmp_path / "out")
    values = {name: float(tensor[0, 0]) for name, tensor in merged.items()}
    assert values == {
        f"model.layers.{i}.block_sparse_moe.experts.{j}.w1.weight": value
        for i, value in enumerate((1.0, 1.0, 3.0))
        for j in range(2)
    }


def test_every_difference_has_a_test() -> None:
    assert DIFFERENT.keys() == _TESTED
