"""mergekit and peft as oracles that we did not write: the same merge, asked for in their words and in ours.

Recipes go their whole way, from YAML text to files. mergekit 0.1.5 is called through its Python API.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft.utils.merge_utils import ties as peft_ties
from safetensors.torch import load_file, save_file
from torch import Tensor

from portmanteau import merge
from portmanteau.compositions import compose, load
from portmanteau.merge import operators

with warnings.catch_warnings():
    # mergekit.io.lazy_unpickle names numpy.core, which NumPy 2 calls numpy._core
    warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

pytestmark = pytest.mark.mergekit

Tensors = dict[str, Tensor]
Ours = Callable[..., Path]
Theirs = Callable[[dict[str, Any]], Path]
Models = Callable[..., Mapping[str, Path]]

OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
SETTINGS = [(2, 1, 1), (3, 2, 0), (1, 1, 2), (1, 3, 2), (4, 4, 0)]  # bottom, top, transition of 8 layers


# ---- the two programs -------------------------------------------------------------------------------------------


@pytest.fixture
def ours(tmp_path: Path) -> Ours:
    """Give a function that builds a recipe's text, whose paths are relative to the test's folder."""

    def build(text: str, name: str = "ours") -> Path:
        path, out = tmp_path / "recipe.yaml", tmp_path / f"{name}-merged"
        path.write_text(text, encoding="utf-8")
        loaded = load(path)
        merge.build(compose(loaded), out, dtype=loaded.output.dtype, recipe=loaded.text)
        return out

    return build


@pytest.fixture
def theirs(tmp_path: Path) -> Theirs:
    """Give a function that lets mergekit merge; model names stand for folders in the test's folder."""

    def run(config: dict[str, Any]) -> Path:
        run_merge(MergeConfiguration.model_validate(_with_paths(config, tmp_path)), str(tmp_path / "theirs"), OPTIONS)
        return tmp_path / "theirs"

    return run


def _with_paths(value: Any, folder: Path, key: str = "") -> Any:
    if isinstance(value, dict):
        return {inner: _with_paths(one, folder, inner) for inner, one in value.items()}
    if isinstance(value, list):
        return [_with_paths(one, folder) for one in value]
    return str(folder / value) if key in ("model", "base_model") else value


def tensors(folder: Path) -> Tensors:
    """Read all tensors of a folder with one file of weights."""
    return load_file(folder / "model.safetensors")


def assert_same_bytes(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name


def assert_close(one: Tensors, other: Tensors) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_rounded_alike(bf16: Tensors, fp32: Tensors) -> None:
    """Hold our bf16 result against mergekit's fp32 result cast once.

    Both are fp32 results rounded once to bf16, and the fp32 results may differ in their last bit (mergekit multiplies
    and adds in one step). So an entry next to the middle between two bf16 numbers may go to either, and one whose terms
    cancel may differ by the last bit of the terms, 1e-8. Of our 19,984 entries that is allowed to 3: two were seen.
    """
    assert bf16.keys() == fp32.keys()
    mine = torch.cat([bf16[name].flatten() for name in bf16])
    other = torch.cat([fp32[name].flatten() for name in bf16]).bfloat16()
    steps = (_ordinal(mine) - _ordinal(other)).abs()
    assert steps.count_nonzero() <= 3
    torch.testing.assert_close(mine[steps > 1], other[steps > 1], rtol=0.0, atol=1e-8)


def _ordinal(values: Tensor) -> Tensor:
    """Number the bf16 values in their order; both zeros are 0."""
    assert values.dtype == torch.bfloat16
    bits = values.view(torch.int16).int()
    return torch.where(bits < 0, -(1 << 15) - bits, bits)


# ---- the models -------------------------------------------------------------------------------------------------


@pytest.fixture
def experts(save_llama: Callable[..., Path]) -> Models:
    """Give a function that saves `base`, `math`, `swahili` and `code`, Llamas of 8 layers with no tensor alike."""

    def save(dtype: torch.dtype = torch.float32) -> Mapping[str, Path]:
        folders = {name: save_llama(name, dtype=dtype) for name in ("base", "math", "swahili", "code")}
        _fill(folders, dtype)
        return folders

    return save


@pytest.fixture
def encoders(tmp_path: Path) -> Models:
    """Give a function that saves `base`, `math`, `swahili` and `code`, BERTs of 8 layers with no tensor alike."""

    def save(dtype: torch.dtype = torch.float32) -> Mapping[str, Path]:
        # mergekit 0.1.5 knows every tensor of this head's BERT; it stops at BertModel (a TypeError while planning), and
        # leaves cls.predictions.transform out of BertForMaskedLM
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=8,
            num_attention_heads=2,
            vocab_size=40,
            max_position_embeddings=64,
        )
        folders = {name: tmp_path / name for name in ("base", "math", "swahili", "code")}
        for folder in folders.values():
            BertForSequenceClassification(config).to(dtype).save_pretrained(folder)
        _fill(folders, dtype)
        return folders

    return save


def _fill(folders: Mapping[str, Path], dtype: torch.dtype) -> None:
    """Give every tensor entries of its own: those of the base, and changes that are larger.

    Magnitudes of the base spread over four decades below the changes, so that deltas of bf16 numbers are not multiples
    of one step: mergekit breaks ties of magnitude in any way, and there are none here at any boundary.
    """
    for seed, folder in enumerate(folders.values()):
        common, own = torch.Generator().manual_seed(1000), torch.Generator().manual_seed(seed)
        filled = {}
        for name, old in sorted(tensors(folder).items()):
            decades = 3 + 4 * torch.rand(old.shape, generator=common)
            base = (torch.randn(old.shape, generator=common) * 10**-decades).to(dtype)
            change = torch.randn(old.shape, generator=own) * (0.0 if folder.name == "base" else 0.1)
            filled[name] = (base + change).to(dtype) if old.is_floating_point() else old
        save_file(filled, folder / "model.safetensors", {"format": "pt"})


# ---- layer swap -------------------------------------------------------------------------------------------------


def slices(bottom: int, top: int, transition: int, blend: float) -> dict[str, Any]:
    """Write a layer swap of 8 layers as mergekit's slices: the language expert's share falls from 1 to 0 and rises.

    Embeddings follow mergekit's first slice, final norm and head its last: both are the language expert's here.
    """
    bounds = [0, bottom, bottom + transition, 8 - top - transition, 8 - top, 8]
    zones = zip(pairwise(bounds), (1.0, blend, 0.0, blend, 1.0), strict=True)
    return {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {"model": "swahili", "layer_range": [first, last], "parameters": {"weight": share}},
                    {"model": "math", "layer_range": [first, last], "parameters": {"weight": 1 - share}},
                ]
            }
            for (first, last), share in zones
            if first < last
        ],
    }


def config_of(folder: Path) -> dict[str, Any]:
    """Read config.json, but for the version of transformers that wrote it."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {key: value for key, value in found.items() if key != "transformers_version"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bottom", "top", "transition"), SETTINGS)
@pytest.mark.parametrize("family", ["experts", "encoders"])
def test_layer_swap_is_mergekits_linear_merge_with_a_slice_for_each_zone(
    request: pytest.FixtureRequest,
    ours: Ours,
    theirs: Theirs,
    family: str,
    bottom: int,
    top: int,
    transition: int,
    dtype: torch.dtype,
) -> None:
    request.getfixturevalue(family)(dtype)
    zones = f"bottom: {bottom}, top: {top}, transition: {transition}, outside: language"
    own = ours(f"merge: {{layer_swap: {{task: math, language: swahili, {zones}}}}}")
    other = theirs(slices(bottom, top, transition, blend=0.5))
    assert_same_bytes(tensors(own), tensors(other))
    assert config_of(own) == config_of(other)


def test_layer_swap_with_a_blend_of_a_quarter_is_mergekits_bit_for_bit_in_bf16(
    experts: Models, ours: Ours, theirs: Theirs
) -> None:
    experts(torch.bfloat16)  # 0.25 and 0.75 times a bf16 number are exact in fp32: one rounding, the sum's
    own = ours("merge: {layer_swap: {task: math, language: swahili, bottom: 2, top: 2, transition: 2, blend: 0.25}}")
    assert_same_bytes(tensors(own), tensors(theirs(slices(2, 2, 2, blend=0.25))))


# ---- operators, tensor by tensor --------------------------------------------------------------------------------


def theirs_of(method: str, models: Mapping[str, Mapping[str, Any]], **common: Any) -> dict[str, Any]:
    """Write a mergekit config: settings for each model, and the `parameters` common to all."""
    config: dict[str, Any] = {"merge_method": method, "dtype": "float32", "parameters": common}
    config["models"] = [{"model": name, "parameters": dict(own)} for name, own in models.items()]
    if method not in ("linear", "karcher"):
        config["base_model"] = "math" if method == "slerp" else "base"
    return config


def ours_of(operator: str, models: Any, rules: Any = (), **settings: Any) -> str:
    """Write our recipe for the same."""
    base = {} if operator in ("linear", "slerp", "karcher") else {"base": "base"}
    body = {**base, "models": models, **settings, **({"rules": list(rules)} if rules else {})}
    return yaml.safe_dump({"merge": {operator: body}}, sort_keys=False)


# no round numbers: 0.7 x + 0.45 y lies, for many bf16 x and y, exactly in the middle between two bf16 numbers
WEIGHTS = {"math": 0.7071, "swahili": 0.4343}
NEGATIVE = {"math": 0.8954, "swahili": -0.3491, "code": 0.2087}
UNEVEN = {"math": {"weight": 0.7071, "density": 0.3}, "swahili": {"weight": 0.4343, "density": 0.8}}
RISING, FALLING = [0.0, 0.5123, 1.0], [1.0, 0.2371]


def weights(values: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    return {name: {"weight": weight} for name, weight in values.items()}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear, normalised": (ours_of("linear", WEIGHTS), theirs_of("linear", weights(WEIGHTS))),
    "linear, not normalised": (
        ours_of("linear", WEIGHTS, normalize=False),
        theirs_of("linear", weights(WEIGHTS), normalize=False),
    ),
    "linear, a negative weight": (ours_of("linear", NEGATIVE), theirs_of("linear", weights(NEGATIVE))),
    "linear, a negative weight, not normalised": (
        ours_of("linear", NEGATIVE, normalize=False),
        theirs_of("linear", weights(NEGATIVE), normalize=False),
    ),
    "linear, gradients": (
        ours_of("linear", {"math": RISING, "swahili": FALLING}),
        theirs_of("linear", {"math": {"weight": RISING}, "swahili": {"weight": FALLING}}),
    ),
    **{
        f"slerp, t = {t}": (ours_of("slerp", ["math", "swahili"], t=t), theirs_of("slerp", weights(WEIGHTS), t=t))
        for t in (0.0, 0.3, 0.5, 1.0)
    },
    "slerp, filters and gradients": (
        ours_of(
            "slerp",
            ["math", "swahili"],
            t=0.4,
            rules=[
                {"tensors": "*self_attn*", "t": [0.0, 0.5, 0.3, 0.7, 1.0]},
                {"tensors": "*mlp*", "t": [1.0, 0.5, 0.7, 0.3, 0.0]},
            ],
        ),
        theirs_of(
            "slerp",
            weights(WEIGHTS),
            t=[
                {"filter": "self_attn", "value": [0.0, 0.5, 0.3, 0.7, 1.0]},
                {"filter": "mlp", "value": [1.0, 0.5, 0.7, 0.3, 0.0]},
                {"value": 0.4},
            ],
        ),
    ),
    "task_arithmetic": (ours_of("task_arithmetic", WEIGHTS), theirs_of("task_arithmetic", weights(WEIGHTS))),
    "task_arithmetic, λ = 0.6, a negative weight": (
        ours_of("task_arithmetic", NEGATIVE, scale=0.6),
        theirs_of("task_arithmetic", weights(NEGATIVE), **{"lambda": 0.6}),
    ),
    "task_arithmetic, normalised": (
        ours_of("task_arithmetic", NEGATIVE, normalize=True, scale=1.5),
        theirs_of("task_arithmetic", weights(NEGATIVE), normalize=True, **{"lambda": 1.5}),
    ),
    **{
        f"ties, density {density}, {word}": (
            ours_of("ties", models, density=density, divide="weights" if normalize else "none"),
            theirs_of("ties", weights(models), density=density, normalize=normalize),
        )
        for density in (0.2, 0.5, 1.0)
        for normalize, models, word in (
            (True, WEIGHTS, "divided by the weights"),
            (False, NEGATIVE, "a negative weight, not divided"),
        )
    },
    "ties, a negative weight, divided by the weights": (
        ours_of("ties", NEGATIVE, density=0.5),
        theirs_of("ties", weights(NEGATIVE), density=0.5),
    ),
    "ties, weights that cancel": (
        ours_of("ties", {"math": 0.5, "swahili": -0.5}, density=0.9),
        theirs_of("ties", weights({"math": 0.5, "swahili": -0.5}), density=0.9),
    ),
    "ties, a density for each model, λ = 1.3": (
        ours_of("ties", UNEVEN, scale=1.3),
        theirs_of("ties", UNEVEN, **{"lambda": 1.3}),
    ),
    "ties, gradients and filters": (
        ours_of(
            "ties",
            {"math": {"weight": RISING}, "swahili": 0.4343},
            density=[0.9, 0.3],
            rules=[{"tensors": "*.mlp.*", "density": 0.5}, {"tensors": "*norm*", "weight": 0.25, "density": 1.0}],
        ),
        theirs_of(
            "ties",
            {
                "math": {"weight": [{"filter": "norm", "value": 0.25}, {"value": RISING}]},
                "swahili": {"weight": [{"filter": "norm", "value": 0.25}, {"value": 0.4343}]},
            },
            density=[
                {"filter": ".mlp.", "value": 0.5},
                {"filter": "norm", "value": 1.0},
                {"value": [0.9, 0.3]},
            ],
        ),
    ),
    "dare_linear at density 1": (
        ours_of("dare", NEGATIVE, density=1.0, scale=0.8),
        theirs_of("dare_linear", weights(NEGATIVE), density=1.0, **{"lambda": 0.8}),
    ),
    "dare_linear at density 1, normalised": (
        ours_of("dare", NEGATIVE, density=1.0, divide="weights"),
        theirs_of("dare_linear", weights(NEGATIVE), density=1.0, normalize=True),
    ),
    "dare_ties at density 1": (
        ours_of("dare", NEGATIVE, density=1.0, elect="weighted", rescale="l1"),
        theirs_of("dare_ties", weights(NEGATIVE), density=1.0),
    ),
    "dare_ties at density 1, normalised": (
        ours_of("dare", WEIGHTS, density=1.0, elect="weighted", divide="weights"),
        theirs_of("dare_ties", weights(WEIGHTS), density=1.0, normalize=True),
    ),
    "breadcrumbs, a density for each model": (
        ours_of("breadcrumbs", UNEVEN, gamma=0.05),
        theirs_of("breadcrumbs", UNEVEN, gamma=0.05),
    ),
    "breadcrumbs_ties": (
        ours_of("breadcrumbs", NEGATIVE, density=0.5, gamma=0.1, elect="weighted"),
        theirs_of("breadcrumbs_ties", weights(NEGATIVE), density=0.5, gamma=0.1),
    ),
    "della at density 1": (
        ours_of("della", WEIGHTS, density=1.0, rescale="l1"),
        theirs_of("della", weights(WEIGHTS), density=1.0),
    ),
    "nuslerp of task vectors, row by row": (
        ours_of("nuslerp", WEIGHTS, flatten=False),
        theirs_of("nuslerp", weights(WEIGHTS), nuslerp_flatten=False),
    ),
    "multislerp of task vectors, gradients": (
        ours_of("multislerp", {"math": [0.2, 0.9], "swahili": 0.4343}),
        theirs_of("multislerp", {"math": {"weight": [0.2, 0.9]}, "swahili": {"weight": 0.4343}}),
    ),
    "karcher": (
        ours_of("karcher", ["math", "swahili", "code"]),
        theirs_of("karcher", {"math": {}, "swahili": {}, "code": {}}),
    ),
    "sce": (
        ours_of("sce", ["math", "swahili", "code"], density=0.3),
        theirs_of("sce", {"math": {}, "swahili": {}, "code": {}}, select_topk=0.3),
    ),
    "ram": (
        ours_of("ram", ["math", "swahili", "code"], epsilon=0.1),
        theirs_of("ram", {"math": {}, "swahili": {}, "code": {}}, epsilon=0.1),
    ),
    "ramplus_tl": (
        ours_of("ram", ["math", "swahili"], epsilon=0.1, r=0.3, alpha=0.5),
        theirs_of("ramplus_tl", {"math": {}, "swahili": {}}, epsilon=0.1, r=0.3, alpha=0.5),
    ),
    "model_stock, filter by filter": (
        ours_of("model_stock", ["math", "swahili", "code"], filter_wise=True),
        theirs_of("model_stock", {"math": {}, "swahili": {}, "code": {}}, filter_wise=True),
    ),
    "nearswap, a gradient": (
        ours_of("nearswap", ["math"], t=[0.01, 0.1]),
        theirs_of("nearswap", {"math": {}}, t=[0.01, 0.1]),
    ),
}


@pytest.mark.parametrize(("recipe", "config"), CASES.values(), ids=CASES.keys())
def test_an_fp32_merge_equals_mergekits_to_one_in_a_million(
    experts: Models, ours: Ours, theirs: Theirs, recipe: str, config: dict[str, Any]
) -> None:
    experts(torch.float32)
    assert_close(tensors(ours(recipe)), tensors(theirs(config)))


@pytest.mark.parametrize(("recipe", "config"), CASES.values(), ids=CASES.keys())
def test_a_bf16_merge_is_mergekits_fp32_merge_cast_once(
    experts: Models, ours: Ours, theirs: Theirs, recipe: str, config: dict[str, Any]
) -> None:
    experts(torch.bfloat16)
    assert_rounded_alike(tensors(ours(recipe)), tensors(theirs(config)))


@pytest.mark.parametrize("factor", [1.5, -1.5], ids=["collinear", "opposite"])
def test_slerp_of_nearly_collinear_models_is_linear_as_in_mergekit(
    experts: Models, ours: Ours, theirs: Theirs, factor: float
) -> None:
    folders = experts()
    first = tensors(folders["math"])
    second = {name: factor * values + 1e-4 * tensors(folders["code"])[name] for name, values in first.items()}
    save_file(second, folders["swahili"] / "model.safetensors", {"format": "pt"})
    merged = tensors(ours(ours_of("slerp", ["math", "swahili"], t=0.25)))
    assert_close(merged, tensors(theirs(theirs_of("slerp", weights(WEIGHTS), t=0.25))))
    assert_close(merged, {name: 0.75 * first[name] + 0.25 * second[name] for name in first})


# ---- peft's conventions, on deltas ------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("shares", [(1.0, 1.0, 1.0), (0.7, 0.2, 0.4), (0.9, -0.35, 0.2)], ids=str)
def test_ties_with_the_unweighted_sign_and_the_count_is_pefts(density: float, shares: tuple[float, ...]) -> None:
    deltas = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(3))
    expected = peft_ties(list(deltas), torch.tensor(shares), density, majority_sign_method="total")
    merged = operators.ties(deltas, weight=shares, density=density, elect="unweighted", divide="count")
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)


# ---- what is random is held to its law --------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.25, 0.8])
def test_dare_keeps_its_share_within_five_sigma_and_scales_it_by_one_over_density(density: float) -> None:
    entries = 1 << 18
    merged = operators.dare(torch.full((1, entries), 3.0), density=density, seed=5)
    kept = merged[merged != 0]
    sigma = math.sqrt(entries * density * (1 - density))
    assert abs(len(kept) - entries * density) < 5 * sigma
    torch.testing.assert_close(kept, torch.full_like(kept, 3.0 / density))


def test_dare_draws_for_every_model_and_tensor_anew(experts: Models, ours: Ours) -> None:
    base = tensors(experts()["base"])
    kept = {}
    for name in ("math", "swahili"):
        merged = tensors(ours(ours_of("dare", {name: 1.0}, density=0.5), name))
        kept[name] = {key: (merged[key] != base[key]).flatten() for key in base}
    queries = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(8)]
    models = torch.cat([kept["math"][key] & kept["swahili"][key] for key in base])
    layers = torch.cat([kept["math"][a] & kept["math"][b] for a, b in pairwise(queries)])
    for both in (models, layers):  # of two independent draws of a half, a quarter is kept twice
        assert abs(int(both.sum()) - len(both) / 4) < 5 * math.sqrt(len(both) * 3 / 16)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dare_with_l1_rescaling_keeps_the_sum_of_magnitudes(density: float) -> None:
    deltas = torch.randn(1, 100_000, generator=torch.Generator().manual_seed(4))
    merged = operators.dare(deltas, density=density, rescale="l1")
    torch.testing.assert_close(merged.double().abs().sum(), deltas.double().abs().sum(), rtol=1e-5, atol=0.0)
    kept = merged != 0
    ratio = merged[kept] / deltas[0][kept]  # one factor for all, near 1/density
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert ratio[0] == pytest.approx(1 / density, rel=0.05)
