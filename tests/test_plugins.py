"""Methods that a user registered with mergekit, as operators: found where asked for, merged as mergekit does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import blake3
import pytest
import torch
import yaml
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from portmanteau import merge
from portmanteau.compositions import compose, load, tensorwise
from portmanteau.compositions.mergekit.methods import METHODS
from portmanteau.compositions.recipe import text as recipe_text
from portmanteau.compositions.recipe.operator_body import OperatorBody, SliceBody
from portmanteau.merge.limits import Limits
from portmanteau.merge.plugins import discovery, mergekit_method
from portmanteau.merge.registry import exists, find

with warnings.catch_warnings():
    # mergekit.io.lazy_unpickle names numpy.core, which NumPy 2 calls numpy._core
    warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import (
        BasePolicy,
        BatchParameter,
        GroupMergeMethod,
        InputContract,
        MergeMethodSpec,
        PerInput,
        PerNonBase,
        TensorBatch,
        TensorGroup,
    )
    from mergekit.merge_methods.easy_define import merge_method
    from mergekit.options import MergeOptions

pytestmark = pytest.mark.mergekit

NAMES = ("base", "a", "b")
OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
Share = Annotated[float, Field(ge=0, le=1, description="share of the first model")]


# ---- the plugins: one of each kind of method that mergekit knows -------------------------------------------------


@merge_method(name="first_share", reference_url="https://example.org/first-share")
def first_share(batch: TensorBatch, share: Annotated[Tensor, BatchParameter(Share)], power: int = 1) -> Tensor:
    """Take a share of the first model, and the rest of the mean of the others."""
    rest = torch.stack(batch.tensors[1:]).mean(dim=0)
    part = (share**power).reshape(-1, *[1] * (rest.dim() - 1))
    return part * batch.tensors[0] + (1 - part) * rest


@merge_method(name="pulled", contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2))
def pulled(group: TensorGroup, weight: PerNonBase[float], way: str = "sum", strength: float = 1.0) -> Tensor:
    """Add the weighted deltas to the base, or the one of largest norm."""
    deltas = [weight[entry.id] * (entry.tensor - group.base.tensor) for entry in group.non_base]
    chosen = sum(deltas) if way == "sum" else max(deltas, key=lambda delta: float(delta.norm()))
    return group.base.tensor + strength * chosen


@merge_method(name="shares_of_all", contract=InputContract(base=BasePolicy.OPTIONAL))
def shares_of_all(group: TensorGroup, share: PerInput[float], tilt: float = 0.0) -> Tensor:
    """Take the weighted mean of all inputs, the base too, which is tilted."""
    shares = {entry.id: share[entry.id] + (tilt if entry.is_base else 0.0) for entry in group.entries}
    return sum(shares[entry.id] * entry.tensor for entry in group.entries) / sum(shares.values())


@merge_method(name="in_file_order", contract=InputContract(base=BasePolicy.REQUIRED))
def in_file_order(group: TensorGroup) -> Tensor:
    """Weigh every input by its place."""
    return sum((place + 1) * tensor for place, tensor in enumerate(group.tensors))


class _Noisy(GroupMergeMethod):
    """Adds noise to the mean; the name of the tensor says how much."""

    spec = MergeMethodSpec(name="noisy", contract=InputContract(max_inputs=3))

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        size = 1.0 if "norm" in (group.metadata.name or "") else 0.0
        mean = torch.stack(group.tensors).mean(dim=0)
        return mean + size * torch.rand_like(mean)


PLUGINS = (first_share, pulled, shares_of_all, in_file_order, _Noisy())


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the plugins with mergekit, for one test; and let none be announced from another."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setattr(discovery, "_announced", [])
    for method in PLUGINS:
        registry.register(method)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save base, a and b: Llamas of four layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=32))
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape)
        model.config.bos_token_id = seed
        model.save_pretrained(folder / name)
    return folder


def theirs(config: Mapping[str, Any], out: Path) -> Mapping[str, Tensor]:
    run_merge(MergeConfiguration.model_validate(config), str(out), OPTIONS)
    return load_file(out / "model.safetensors")


def ours(config: Mapping[str, Any] | str, out: Path, **options: Any) -> Mapping[str, Tensor]:
    path = out.with_suffix(".yml")
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False))
    loaded = load(path)
    merge.build(compose(loaded), out, dtype=loaded.output.dtype, recipe=loaded.text, **options)
    return load_file(out / "model.safetensors")


def assert_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def mentioned(folder: Path, *names: str, **own: Any) -> list[dict[str, Any]]:
    """List models; `a={…}` gives one parameters of its own."""
    found = [{"model": str(folder / name)} for name in names]
    return [
        {**one, **({"parameters": own[name]} if name in own else {})} for one, name in zip(found, names, strict=True)
    ]


GRADIENT = [{"filter": "mlp", "value": [0.1, 0.9]}, {"filter": "self_attn", "value": 0.3}, {"value": [0.8, 0.2, 0.5]}]
CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "a share": lambda f: {
        "merge_method": "first_share",
        "models": mentioned(f, "a", "b", "base"),
        "parameters": {"share": GRADIENT, "power": 2},
    },
    "a base that is one of the models": lambda f: {
        "merge_method": "first_share",
        "models": mentioned(f, "b", "a"),
        "base_model": str(f / "base"),
        "parameters": {"share": [0.0, 1.0]},
    },
    "weights on deltas": lambda f: {
        "merge_method": "pulled",
        "base_model": str(f / "base"),
        "models": mentioned(f, "a", "b", a={"weight": GRADIENT}, b={"weight": 0.4}),
        "parameters": {"strength": [{"filter": "norm", "value": 0.5}, {"value": [1.0, 0.0]}]},
    },
    "the way by words": lambda f: {
        "merge_method": "pulled",
        "base_model": str(f / "base"),
        "models": mentioned(f, "a", "b", "base"),
        "parameters": {"weight": 0.5, "way": ["sum", "largest"]},
    },
    "a share of the base's own": lambda f: {
        "merge_method": "shares_of_all",
        "base_model": str(f / "base"),
        "models": mentioned(f, "a", "base", "b", base={"share": GRADIENT}, a={"share": 0.7}),
        "parameters": {"share": [0.5, 0.2], "tilt": 0.3},
    },
    "a share that all have": lambda f: {
        "merge_method": "shares_of_all",
        "base_model": str(f / "base"),
        "models": mentioned(f, "a", "b"),
        "parameters": {"share": 0.25},
    },
    "shares without a base": lambda f: {
        "merge_method": "shares_of_all",
        "models": mentioned(f, "a", "b", a={"share": 0.75}),
        "parameters": {"share": 0.25, "tilt": 9.0},
    },
    "an order": lambda f: {
        "merge_method": "in_file_order",
        "base_model": str(f / "base"),
        "models": mentioned(f, "b", "a"),
    },
    "slices": lambda f: {
        "merge_method": "pulled",
        "base_model": str(f / "base"),
        "slices": [
            {
                "sources": [
                    {"model": str(f / name), "layer_range": layers}
                    for name, layers in (("a", [0, 2]), ("base", [1, 3]), ("b", [2, 4]))
                ],
                "parameters": {"weight": weight},
            }
            for weight in (0.5, [0.2, 1.0])
        ],
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_plugins_method_merges_as_in_mergekit(models: Path, tmp_path: Path, case: str) -> None:
    config = {**CASES[case](models), "dtype": "float32"}
    merged = ours(config, tmp_path / "ours")
    assert_close(merged, theirs(config, tmp_path / "theirs"))
    native = recipe_text.written(load(tmp_path / "ours.yml").document.value)
    assert "merge_method" not in native
    assert_same(ours(native, tmp_path / "native"), merged)
    if "base_model" in config:  # else mergekit takes the config of any of them
        one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
        assert one["bos_token_id"] == other["bos_token_id"]


def test_a_recipe_of_ours_names_a_plugins_method_with_rules(models: Path, tmp_path: Path) -> None:
    base, a, b = (load_file(models / name / "model.safetensors") for name in NAMES)
    recipe = f"""
models: {{base: {models}/base, a: {models}/a, b: {models}/b}}
merge:
  task_arithmetic:
    models: [a, b]
    base: base
    rules:
      - {{tensors: "*norm*", operator: pulled, weight: {{a: 1.0, b: 0.5}}}}
      - {{tensors: "*embed*", operator: shares_of_all, share: 1.0, base_share: 2.0}}
"""
    merged = ours(recipe, tmp_path / "out")
    norm, embed, head = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
    torch.testing.assert_close(merged[norm], a[norm] + 0.5 * (b[norm] - base[norm]))
    torch.testing.assert_close(merged[embed], (2 * base[embed] + a[embed] + b[embed]) / 4)
    torch.testing.assert_close(merged[head], a[head] + b[head] - base[head])


# ---- how it is carried out --------------------------------------------------------------------------------------


def saved(save_tensors: Callable[..., Path], shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Save models a and b of two tensors, of which one is a norm; give the tensors of a, then of b."""
    found = []
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        found += [torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)]
        save_tensors(name, {"model.norm.weight": found[-2], "x.weight": found[-1]})
    return found


def test_noise_depends_on_names_alone(tmp_path: Path, save_tensors: Callable[..., Path]) -> None:
    norm, weight, other_norm, other_weight = saved(save_tensors, (300, 700), torch.float32)
    recipe = "merge: {noisy: {models: [a, b]}}"
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    merged = ours(recipe, tmp_path / "one", threads=1, memory=20 << 20)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert_same(ours(recipe, tmp_path / "two", threads=4), merged)
    torch.testing.assert_close(merged["x.weight"], (weight + other_weight) / 2)
    noise = merged["model.norm.weight"] - (norm + other_norm) / 2
    assert -1e-5 < noise.min() < 0.01
    assert 0.99 < noise.max() < 1 + 1e-5
    recipe = f"models: {{c: {tmp_path}/a, d: {tmp_path}/b}}\nmerge: {{noisy: {{models: [c, d]}}}}"
    assert not torch.equal(ours(recipe, tmp_path / "three")["model.norm.weight"], merged["model.norm.weight"])


def test_halves_are_merged_in_fp32_and_cast_once(tmp_path: Path, save_tensors: Callable[..., Path]) -> None:
    _, one, _, other = saved(save_tensors, (9, 5), torch.bfloat16)
    merged = ours("merge: {first_share: {models: [a, b], share: 0.3}}", tmp_path / "out")
    share = torch.tensor(0.3)
    assert torch.equal(merged["x.weight"], (share * one.float() + (1 - share) * other.float()).bfloat16())


def test_whole_tensors_are_accounted_for(tmp_path: Path, save_tensors: Callable[..., Path]) -> None:
    saved(save_tensors, (1000, 1000), torch.float32)
    path = tmp_path / "recipe.yml"
    path.write_text("merge: {noisy: {models: [a, b]}}")
    plan = merge.make_plan(compose(load(path)))
    matrices = 2 + 3 * 2  # result and scratch; of each model itself and two more
    assert Limits.of(1, None).in_flight(plan) >= matrices * 4_000_000
    threads, _ = Limits.of(8, 70_000_000).session(plan)
    assert threads == 2


# ---- what is read of a method, and what is refused ---------------------------------------------------------------


def test_parameters_are_settings() -> None:
    found = {name: find(name) for name in ("first_share", "pulled", "shares_of_all", "noisy")}
    bases = {name: (one.needs_base, one.takes_base) for name, one in found.items()}
    assert bases == {
        "first_share": (False, False),
        "pulled": (True, True),
        "shares_of_all": (False, True),
        "noisy": (False, False),
    }
    share, power = found["first_share"].settings.values()
    assert (share.name, share.type_name, share.required, share.per_model) == ("share", "float, ≥ 0, ≤ 1", True, False)
    assert (power.type_name, power.default) == ("int", 1)
    assert found["pulled"].settings["weight"].per_model
    assert list(found["shares_of_all"].settings) == ["share", "base_share", "tilt"]
    assert found["first_share"].summary == "Take a share of the first model, and the rest of the mean of the others."
    assert found["first_share"].source.endswith("test_plugins.first_share, https://example.org/first-share")
    assert found["noisy"].summary == "Adds noise to the mean; the name of the tensor says how much."


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("first_share: {models: [a, b], share: 1.5}", "share is 1.5: input should be less than or equal to 1"),
        ("first_share: {models: [a, b], share: [0.5, -1]}", "share is -1: input should be greater than or equal to 0"),
        ("first_share: {models: [a, b]}", "first_share needs 'share'"),
        ("first_share: {models: [a, b], share: 0.5, powr: 2}", "first_share has no setting 'powr'"),
        ("pulled: {models: [a, b], weight: 1}", "pulled needs a base"),
        ("noisy: {models: [a, b], base: a}", "noisy takes no base"),
        ("noisy: {models: [a, b, c, d]}", "noisy: takes 1 to 3 models, and 4 are given"),
        ("shares_of_all: {models: [b], base: a, share: 1}", "shares_of_all: needs the base's own share"),
        ("pulled: {models: [b], base: a, weight: 1, way: largest, strength: x}", "strength is 'x'"),
    ],
)
def test_what_is_wrong_is_told(body: str, message: str, tmp_path: Path, save_tensors: Callable[..., Path]) -> None:
    for name in "abcd":
        save_tensors(name, {"x.weight": torch.ones(2)})
    path = tmp_path / "recipe.yml"
    path.write_text(f"merge:\n  {body}\n")
    with pytest.raises(merge.PortmanteauError) as caught:
        merge.build(compose(load(path)), tmp_path / "out")
    assert message in str(caught.value)
    assert f"{path}:2" in str(caught.value)


def test_parameters_are_refused_by_line_in_mergekits_files(models: Path, tmp_path: Path) -> None:
    config = {
        "merge_method": "pulled",
        "base_model": str(models / "base"),
        "models": mentioned(models, "a", "base", a={"strength": 2.0}, base={"weight": 1.0}),
        "parameters": {"wieght": 1.0},
    }
    with pytest.raises(merge.RecipeError) as caught:
        ours(config, tmp_path / "out")
    assert [(mistake.where.rpartition(":")[2], mistake.what) for mistake in caught.value.mistakes] == [
        ("4", "pulled needs the parameter 'weight', which is not given"),
        ("6", "strength is no matter of one model in pulled"),
        ("11", "pulled has no parameter 'wieght'"),
    ]


def test_a_plugin_that_fails_is_named_with_the_tensor(tmp_path: Path, save_tensors: Callable[..., Path]) -> None:
    @merge_method(name="failing")
    def failing(group: TensorGroup) -> Tensor:
        raise ZeroDivisionError("no good")

    registry.register(failing)
    saved(save_tensors, (2,), torch.float32)
    with pytest.raises(
        merge.MergeError, match=r"weight of a, b: failing: the plugin gave up: ZeroDivisionError: no good"
    ):
        ours("merge: {failing: {models: [a, b]}}", tmp_path / "out")


def test_a_parameter_that_a_recipe_could_not_write_is_refused() -> None:
    @merge_method(name="unlucky")
    def unlucky(group: TensorGroup, layers: int = 1) -> Tensor:
        return group.tensors[0]

    registry.register(unlucky)
    with pytest.raises(merge.MergeError, match="method unlucky: has a parameter 'layers', which means something else"):
        find("unlucky")


def test_every_key_of_a_recipe_is_reserved() -> None:
    keys = {*OperatorBody.model_fields, *SliceBody.model_fields, "tensors"}
    own = {"part", "streams", "count"}  # of an operator's functions
    assert keys | own == mergekit_method.RESERVED


def test_mergekits_own_methods_are_not_taken_for_plugins() -> None:
    assert METHODS.keys() == mergekit_method.OWN
    assert not exists("dare_ties")


def test_a_program_uses_what_it_registered(tmp_path: Path, save_tensors: Callable[..., Path]) -> None:
    saved(save_tensors, (4,), torch.float32)
    one, other = (merge.open(tmp_path / name) for name in "ab")
    merged = tensorwise("first_share", models={"a": one, "b": other}, settings={"share": 0.25})
    torch.testing.assert_close(merged["x.weight"], 0.25 * one["x.weight"] + 0.75 * other["x.weight"])
    function = find("first_share").apply
    assert torch.equal(function(torch.tensor([[4.0], [8.0]]), share=0.25), torch.tensor([7.0]))


# ---- where plugins are found -------------------------------------------------------------------------------------

METHOD = """
from mergekit.merge_methods import TensorBatch, merge_method, register
import torch

@merge_method(name="halved")
def halved(batch: TensorBatch, factor: float = 0.5) -> torch.Tensor:
    "Multiply the first model."
    return batch.tensors[0] * factor

register(halved)
"""
OPERATOR = """
from portmanteau import merge

@merge.operator(source="here")
def tripled(models, *, part=None):
    "Multiply the first model by three."
    return models[0] * 3
"""
REPORT = (
    "import sys, portmanteau.cli\n"
    "try: portmanteau.cli.main()\n"
    "except SystemExit as end: status = end.code\n"
    "print('status', status or 0, *sorted({'torch', 'mergekit'}.intersection(sys.modules)))"
)


@pytest.fixture
def folder(tmp_path: Path, save_tensors: Callable[..., Path]) -> Path:
    """Give a folder with a model, a plugin of either kind, and a recipe and a mergekit file for each."""
    save_tensors("a", {"x.weight": torch.tensor([2.0, 4.0])})
    (tmp_path / "methods.py").write_text(METHOD)
    (tmp_path / "operators.py").write_text(OPERATOR)
    (tmp_path / "halved.yml").write_text("merge: {halved: {models: [a], factor: 0.25}}")
    (tmp_path / "mergekit.yml").write_text("merge_method: halved\nmodels: [{model: a}]\n")
    (tmp_path / "tripled.yml").write_text("merge: {tripled: {models: [a]}}")
    (tmp_path / "linear.yml").write_text("merge: {linear: {models: [a]}}")
    return tmp_path


def run(folder: Path, *command: str, before: str = "", **environment: str) -> tuple[str, str]:
    """Run a command; give what stands in the last line, status and modules, and all that it said."""
    done = subprocess.run(
        [sys.executable, "-c", before + REPORT, *command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines()[-1], done.stdout + done.stderr


def on_the_path(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.mark.parametrize(("recipe", "factor"), [("halved.yml", 0.25), ("mergekit.yml", 0.5)])
def test_an_option_names_the_plugin(folder: Path, recipe: str, factor: float) -> None:
    status, said = run(folder, "build", recipe, "out", "--plugin", "./methods.py")
    assert (status, "Traceback" in said) == ("status 0 mergekit torch", False)
    assert torch.equal(load_file(folder / "out" / "model.safetensors")["x.weight"], factor * torch.tensor([2.0, 4.0]))


def test_a_module_on_the_path_is_a_plugin_too(folder: Path) -> None:
    status, said = run(folder, "show", "halved", "--plugin", "methods", **on_the_path(folder))
    assert status == "status 0 mergekit torch"
    assert "Multiply the first model." in said
    assert "factor" in said
    _, said = run(folder, "show", "--plugin", "methods", **on_the_path(folder))
    assert "halved" in said


def test_operators_of_ours_come_from_plugins_too_and_need_no_mergekit(folder: Path) -> None:
    assert run(folder, "build", "tripled.yml", "out", "--plugin", "operators.py")[0] == "status 0 torch"
    assert torch.equal(load_file(folder / "out" / "model.safetensors")["x.weight"], torch.tensor([6.0, 12.0]))


def test_an_installed_package_says_by_an_entry_point_what_it_has(folder: Path) -> None:
    about = folder / "methods-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: methods\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{discovery.GROUP}]\nhalved = methods\n")
    assert run(folder, "plan", "halved.yml", **on_the_path(folder))[0] == "status 0 mergekit torch"


@pytest.mark.parametrize("command", ["check linear.yml", "plan linear.yml", "show linear", "convert linear.yml"])
def test_plugins_are_imported_only_for_operators_that_are_none_of_ours(folder: Path, command: str) -> None:
    assert run(folder, *command.split(), "--plugin", "methods.py")[0] == "status 0"


def test_an_unknown_name_alone_imports_nothing(folder: Path) -> None:
    status, said = run(folder, "check", "halved.yml")
    assert status == "status 1"
    assert "unknown composition or operator 'halved'" in said
    assert "for one of a plugin add --plugin MODULE" in said
    status, said = run(folder, "check", "mergekit.yml")
    assert status == "status 1"
    assert "mergekit.yml:1: unknown merge_method 'halved'" in said


def test_without_mergekit_the_message_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'mergekit': raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    status, said = run(folder, "check", "halved.yml", "--plugin", "methods.py", before=absent)
    assert status.startswith("status 1")
    assert "--plugin methods.py: needs the module 'mergekit'\n  hint: pip install 'portmanteau[mergekit]'" in said
    monkeypatch.setattr(mergekit_method, "_version", lambda: None)
    with pytest.raises(merge.RecipeError, match=r"add --plugin MODULE and pip install 'portmanteau\[mergekit\]'"):
        load(folder / "halved.yml")


@pytest.mark.parametrize(
    ("plugin", "text", "message"),
    [
        ("absent.py", "", "--plugin: no module 'absent.py'"),
        ("absent.module", "", "--plugin: no module 'absent.module'"),
        ("broken.py", "import no_such_module", "--plugin broken.py: needs the module 'no_such_module'"),
        ("broken.py", "1 / 0", "--plugin broken.py: cannot be imported: ZeroDivisionError: division by zero"),
        ("broken.py", METHOD * 2, "--plugin broken.py: cannot be imported: ValueError: Merge method 'halved' is"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_said(folder: Path, plugin: str, text: str, message: str) -> None:
    if text:
        (folder / plugin).write_text(text)
    status, said = run(folder, "check", "halved.yml", "--plugin", plugin)
    assert status.startswith("status 1")
    assert message in said
    assert "Traceback" not in said


def test_a_name_of_ours_is_no_method_of_a_plugin(folder: Path) -> None:
    (folder / "mergekit.yml").write_text("merge_method: median\nmodels: [{model: a}]\n")
    with pytest.raises(merge.RecipeError, match="median is a name in our recipes; a plugin's method needs another"):
        load(folder / "mergekit.yml")


# ---- what a receipt says of plugins ------------------------------------------------------------------------------


def blake3_of(path: Path) -> str:
    return blake3.blake3(path.read_bytes()).hexdigest()


def receipt(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "portmanteau.json").read_text())
    return found


@pytest.mark.parametrize(("recipe", "plugin"), [("halved.yml", "methods.py"), ("tripled.yml", "operators.py")])
def test_a_receipt_names_the_plugin_that_was_used_and_the_digest_of_its_source(
    folder: Path, recipe: str, plugin: str
) -> None:
    command = ("build", recipe, "out", "--plugin", "./methods.py", "--plugin", "operators.py", "--fresh")
    assert run(folder, *command)[0].startswith("status 0")
    shown = {"methods.py": "./methods.py", "operators.py": "operators.py"}[plugin]
    assert receipt(folder)["plugins"] == {shown: {plugin: blake3_of(folder / plugin)}}


def test_of_a_package_every_module_that_was_imported_is_named(folder: Path) -> None:
    (folder / "fancy").mkdir()
    (folder / "fancy" / "__init__.py").write_text("from . import tripling\n")
    (folder / "fancy" / "tripling.py").write_text(OPERATOR)
    (folder / "fancy" / "unused.py").write_text("")
    assert run(folder, "build", "tripled.yml", "out", "--plugin", "fancy", **on_the_path(folder))[0] == "status 0 torch"
    names = ("fancy/__init__.py", "fancy/tripling.py")
    assert receipt(folder)["plugins"] == {"fancy": {name: blake3_of(folder / name) for name in names}}


def test_a_build_that_used_no_plugin_names_none(folder: Path) -> None:
    assert run(folder, "build", "linear.yml", "out", "--plugin", "./methods.py")[0].startswith("status 0")
    assert receipt(folder)["plugins"] == {}


def test_a_result_is_not_up_to_date_when_the_source_of_its_plugin_changed(folder: Path) -> None:
    command = ("build", "tripled.yml", "out", "--plugin", "operators.py")
    assert run(folder, *command)[0] == "status 0 torch"
    assert "out: up to date" in run(folder, *command)[1]
    moved = (*command[:-1], "./operators.py")  # the same source, by another name
    assert "out: up to date" in run(folder, *moved)[1]
    (folder / "operators.py").write_text(OPERATOR.replace("* 3", "* 5"))
    status, said = run(folder, *command)
    assert status.startswith("status 1")
    assert "exists already, and is not what is asked for: the plugin's source operators.py changed\n" in said
    status, said = run(folder, *command, "--force")
    assert status == "status 0 torch"
    assert torch.equal(load_file(folder / "out" / "model.safetensors")["x.weight"], torch.tensor([10.0, 20.0]))


def test_a_build_that_was_ended_starts_anew_when_the_source_of_its_plugin_changed(folder: Path) -> None:
    stops = "if len(models[0]) == 2 and __import__('pathlib').Path('stop').exists(): raise merge.MergeError('', 'stop')"
    ending = OPERATOR.replace("return", f"{stops}\n    return")
    save_file({"x": torch.ones(2), "y": torch.ones(3)}, folder / "a" / "model.safetensors")  # the larger goes first
    (folder / "operators.py").write_text(ending)
    (folder / "stop").touch()
    command = ("build", "tripled.yml", "out", "--plugin", "operators.py", "--threads", "1")
    assert "1 finished tensor is kept" in run(folder, *command)[1]
    (folder / "stop").unlink()
    (folder / "operators.py").write_text(ending.replace("* 3", "* 5"))
    status, said = run(folder, *command)
    assert status == "status 0 torch"
    what = "starting anew, not continuing the build that was ended: the plugin's source operators.py changed"
    assert f"note: {what}\n" in said
    made = load_file(folder / "out" / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in made.items()} == {"x": [5.0] * 2, "y": [5.0] * 3}
