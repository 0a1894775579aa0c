"""What is said of a mergekit file's text, and what its parameters and references stand for."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
import torch
import yaml
from safetensors.torch import load_file

from portmanteau import cli
from tests.mergekit_files import AB, LINEAR, PART, native, notes, said
from tests.oracles.mergekit_0_1_5 import assert_close, assert_same, ours, theirs
from tests.oracles.mergekit_differences import differs

pytestmark = pytest.mark.mergekit


@differs("unknown keys")
def test_the_four_typos_that_mergekit_ignores_are_named_with_their_lines(
    llamas: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
    path = llamas / "typos.yml"
    path.write_text(dedent(text).lstrip("\n"))
    monkeypatch.setattr("sys.argv", ["portmanteau", "build", str(path), str(llamas / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert not (llamas / "out").exists()
    assert capsys.readouterr() == (
        "",
        f"{path}:3: unknown key 'modles'\n  hint: did you mean 'modules'?\n"
        f"{path}:6: unknown key 'parameter'\n  hint: did you mean 'parameters'?\n"
        f"{path}:8: ties has no parameter 'denisty'\n  hint: did you mean 'density'?\n"
        f"{path}:10: unknown key 'dtypee'\n  hint: did you mean 'dtype'?\n",
    )


def test_parameters_of_the_base_are_noted_where_they_have_no_effect(llamas: Path) -> None:
    base = "{model: base, parameters: {weight: 0.9, density: 0.1}}"
    text = f"merge_method: ties\nbase_model: base\nparameters: {{weight: 0.5}}\nmodels: [{base}, {{model: a}}]\n"
    told = (
        "line 4: weight of the base_model has no effect in ties",
        "line 4: density of the base_model has no effect in ties",
    )
    assert notes(text, llamas) == told
    config = text.replace("model: a", f"model: {llamas / 'a'}").replace(": base", f": {llamas / 'base'}")
    assert_close(ours(text, llamas / "ours"), theirs(yaml.safe_load(config), llamas / "theirs"))


def test_a_filter_that_fits_no_tensor_is_noted(llamas: Path) -> None:
    mistyped = "[{filter: slef_attn, value: 0.2}, {filter: lm_head, value: 0.3}, {value: 1.0}]"
    merge = f"merge_method: linear\nparameters: {{weight: {mistyped}}}\n"
    parts = [f"{{sources: [{{model: a, layer_range: [{first}, {first + 2}]}}]}}" for first in (0, 2)]
    note = "no tensor is called *slef_attn*: what is asked for it changes nothing"
    assert notes(merge + AB, llamas) == (note,)
    assert notes(merge + f"slices: [{', '.join(parts)}]", llamas) == (note,)


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
        (LINEAR + AB + "dtype: int64", "4: dtype is 'int64': weights are written as floats"),
        (LINEAR + AB + "out_dtype: int64", "4: dtype is 'int64': weights are written as floats"),
        (
            "name: x\ndtype: float99\n" + LINEAR + AB + "---\n" + LINEAR + "models: [{model: x}]",
            "2: dtype is 'float99'",
        ),
        (
            LINEAR + "modules: {tower: {models: [{model: a}]}}",
            "3: linear: a has no component 'tower'",
        ),
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


def test_a_slice_may_have_a_base_of_its_own(llamas: Path) -> None:
    source = lambda name, *ends: {"model": str(llamas / name), "layer_range": list(ends)}  # noqa: E731
    config = {
        "merge_method": "task_arithmetic",
        "dtype": "float32",
        "base_model": str(llamas / "base"),
        "parameters": {"weight": 0.4},
        "slices": [
            {"sources": [source("base", 0, 2), source("a", 0, 2)]},
            {"sources": [source("a", 1, 3), source("b", 2, 4)], "base_model": str(llamas / "b")},
            {"sources": [source("base", 3, 4), source("b", 3, 4)], "parameters": {"weight": 1.1}},
        ],
    }
    assert_close(ours(config, llamas / "ours"), theirs(config, llamas / "theirs"))


# ---- references -------------------------------------------------------------------------------------------------


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
