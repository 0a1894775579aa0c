"""Recipes: the forms that must work, and every mistake named by its line, all at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from portmanteau import merge
from portmanteau.compositions import compose, load
from tests.conftest import Write

Save = Callable[[str, Mapping[str, Tensor]], Path]


@pytest.fixture(autouse=True)
def models(save_tensors: Save) -> None:
    """Save a (ones), b (threes) and base (zeros), of four layers, which the recipes name."""
    for name, value in (("a", 1.0), ("b", 3.0), ("base", 0.0)):
        tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((2, 2), value) for i in range(4)}
        tensors |= {f"model.layers.{i}.input_norm.weight": torch.full((2,), value) for i in range(4)}
        save_tensors(name, tensors | {"lm_head.weight": torch.full((4, 2), value)})


def composed(path: Path) -> merge.Composed:
    return compose(load(path))


def first(merged: merge.Checkpoint, name: str) -> float:
    return float(merged[name].flatten()[0])


def by_layer(merged: merge.Checkpoint, inner: str = "mlp.up_proj.weight") -> list[float]:
    return [round(first(merged, f"model.layers.{i}.{inner}"), 6) for i in range(4)]


def mistakes(path: Path) -> list[str]:
    """Give the mistakes of a recipe as `LINE: WHAT`."""
    with pytest.raises(merge.RecipeError) as caught:
        composed(path)
    return [f"{m.where.removeprefix(f'{path}:')}: {m.what}" for m in caught.value.mistakes]


def test_an_operator_merges_models_by_name_with_weights(write: Write) -> None:
    path = write("""
        models: {one: ./a, two: ./b}
        merge: {linear: {models: {one: 0.75, two: 0.25}}}
    """)
    assert by_layer(composed(path)) == [1.5] * 4


def test_paths_may_stand_where_names_are_expected_and_are_relative_to_the_recipe(write: Write) -> None:
    assert by_layer(composed(write("merge: {linear: {models: [a, ./b]}}"))) == [2.0] * 4


def test_a_weight_may_be_a_gradient_over_depth(write: Write) -> None:
    merged = composed(
        write("""
        merge:
          task_arithmetic:
            base: base
            models: {a: {weight: [0.0, 0.5, 2.0]}, b: 0.0}
    """)
    )
    # depths 0, 1/3, 2/3, 1 over the points 0, 0.5, 1: 0, 1/3, 1, 2; the head takes the first value
    assert by_layer(merged) == [0.0, 0.333333, 1.0, 2.0]
    assert first(merged, "lm_head.weight") == 0.0


def test_the_first_rule_that_fits_a_tensor_holds_for_it(write: Write) -> None:
    merged = composed(
        write("""
        merge:
          task_arithmetic:
            base: base
            models: {a: 1.0, b: 1.0}
            rules:
              - {tensors: "*.layers.1.*", weight: 0.5}
              - {tensors: "*norm*", operator: linear}
              - {tensors: "lm_head.*", operator: copy, models: [b]}
              - {tensors: "*.layers.3.*", weight: {a: 0.0}}
    """)
    )
    assert by_layer(merged) == [4.0, 2.0, 4.0, 3.0]
    assert by_layer(merged, "input_norm.weight") == [2.0, 2.0, 2.0, 2.0]
    assert first(merged, "lm_head.weight") == 3.0


def test_a_setting_may_be_chosen_by_tensor_name(write: Write) -> None:
    merged = composed(
        write("""
        merge:
          task_arithmetic:
            base: base
            models:
              a: {weight: [{tensors: "*norm*", value: 0.25}, {tensors: "*.layers.*", value: [0.0, 3.0]}]}
              b: 0.0
            scale: [{tensors: "lm_head.*", value: 5.0}, {value: 2.0}]
    """)
    )
    assert by_layer(merged) == [0.0, 2.0, 4.0, 6.0]
    assert by_layer(merged, "input_norm.weight") == [0.5] * 4
    assert first(merged, "lm_head.weight") == 5.0  # where no pattern fits, a setting has its default: 1


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("[{tensors: x, valeu: 1}]", "1: a choice of scale lacks its value"),
        ("[{tensor: x, value: 1}]", "1: unknown key 'tensor'"),
        ("[{tensors: 3, value: 1}]", "1: 3 is no pattern"),
        ("[{value: [{value: 1}]}]", "1: a choice of scale lacks its value"),
        ("[{value: big}]", "1: scale is 'big': input should be a valid number"),
        ("{a: 1}", "1: scale is {'a': 1}: input should be a valid number"),
    ],
)
def test_choices_that_cannot_be_read_are_refused(write: Write, value: str, found: str) -> None:
    path = write(f"merge: {{task_arithmetic: {{base: base, models: [a], scale: {value}}}}}")
    assert any(one.startswith(found) for one in mistakes(path))


def test_another_vocabulary_is_refused_for_models_without_an_embedding(write: Write, tmp_path: Path) -> None:
    for name, words in (("a", {"x": 0, "y": 1}), ("b", {"x": 1, "y": 0})):
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    path = write("merge: {linear: {models: [a]}}\noutput: {tokenizer: b}")
    assert mistakes(path) == ["2: a has another vocabulary, and no embedding is found in it"]


def test_a_chat_template_is_a_text_or_the_commonest(write: Write, tmp_path: Path) -> None:
    for name, text in (("a", "{{ 1 }}"), ("b", "{{ 2 }}"), ("base", "{{ 2 }}")):
        (tmp_path / name / "chat_template.jinja").write_text(text)
    text = "merge: {linear: {models: [a, b, base]}}\noutput: {chat_template: %s}"
    for number, (given, expected) in enumerate((("auto", "{{ 2 }}"), ("'{{ 3 }}'", "{{ 3 }}"))):
        merge.build(composed(write(text % given)), tmp_path / f"out{number}")
        assert (tmp_path / f"out{number}" / "chat_template.jinja").read_text() == expected
    found = "2: chat_template is 'chat_ml': no Jinja template and no known name; did you mean 'chatml'?"
    assert mistakes(write(text % "chat_ml")) == [found]


def test_a_list_alone_is_what_the_first_key_says(write: Write) -> None:
    assert by_layer(composed(write("merge: {average: [a, b]}"))) == [2.0] * 4


def test_a_model_is_assembled_from_parts_by_name(write: Write) -> None:
    merged = composed(write('merge: {assemble: {parts: {"*norm*": a, "*": b}}}'))
    assert (by_layer(merged), by_layer(merged, "input_norm.weight")) == ([3.0] * 4, [1.0] * 4)
    assert mistakes(write('merge: {assemble: {parts: {"*norm*": a, "*x*": b, "*.layers.*": b}}}')) == [
        "1: assemble: no tensor belongs to '*x*'",
        "1: assemble: no part takes lm_head.weight",
    ]
    by_component = composed(write("merge: {assemble: {parts: {layers: b, default: a}}}"))
    assert by_layer(by_component) == [3.0] * 4
    assert mistakes(write("merge: {assemble: {parts: {default: a, layers: b}}}")) == [
        "1: assemble: parts before it take all that belongs to 'layers'"
    ]


def test_steps_nest_without_intermediate_files(write: Write, tmp_path: Path) -> None:
    path = write("""
        steps:
          soup: {linear: {models: [a, b]}}
          sum: {task_arithmetic: {base: base, models: [soup, a]}}
        merge: {linear: {models: {sum: 1, soup: 1}}}
    """)
    assert by_layer(composed(path)) == [2.5] * 4  # soup 2, sum 2 + 1 = 3
    merge.build(composed(path), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "base", "out", "recipe.yaml"]


def test_steps_that_need_each_other_are_refused(write: Write) -> None:
    path = write("""
        steps:
          one: {linear: {models: [two]}}
          two: {linear: {models: [one]}}
        merge: {linear: {models: [one]}}
    """)
    assert mistakes(path) == ["3: steps need each other: one → two → one"]


def test_every_mistake_is_named_by_its_line_at_once(write: Write) -> None:
    path = write("""
        modles: {}
        models: {a: ./a, c: ./c}
        merge:
          ties:
            base: base
            models: {a: {densty: 0.5}, b: nonsense}
            density: 1.5
            rules:
              - {tensors: "*", operator: tis}
              - {tensors: "*", elect: median}
        output: {dtype: bfloat17, shard_sise: 5GB}
    """)
    assert mistakes(path) == [
        "2: unknown key 'modles'",
        "3: no file or folder './c'",
        "7: ties has no setting 'densty'",
        "7: weight is 'nonsense': input should be a valid number, unable to parse string as a number",
        "8: density is 1.5: input should be less than or equal to 1",
        "10: unknown operator 'tis'",
        "11: elect is 'median': input should be 'none', 'weighted' or 'unweighted'",
        "12: dtype is 'bfloat17': unknown dtype 'bfloat17'; did you mean 'bfloat16'?",
        "12: unknown key 'shard_sise'",
    ]


def test_the_nearest_known_name_is_offered(write: Write) -> None:
    path = write("""
        models: {math: ./a, other: ./b}
        merge:
          ties:
            base: base
            models: {mth: 1.0, other: {densty: 0.5}}
            densiti: 0.2
    """)
    with pytest.raises(merge.RecipeError) as caught:
        composed(path)
    hints = {m.what: m.hint for m in caught.value.mistakes}
    assert hints == {
        "no model, file or folder 'mth'": "did you mean 'math'?",
        "ties has no setting 'densty'": "did you mean 'density'?",
        "ties has no setting 'densiti'": "did you mean 'density'?",
    }
    assert [m.where.rpartition(":")[2] for m in caught.value.mistakes] == ["6", "6", "7"]


SWAP = "merge: {layer_swap: {task: a, language: b, bottom: %s}}"
TOO_MANY = "model.layers has 4 layers, and bottom 3 + top 1 + transitions 2 = 6 are asked for"
CANCELLING = "the weights [1.0, -1.0] sum to zero: set normalize: false, or other weights"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("merge: {linaer: {models: [a]}}", "1: unknown composition or operator 'linaer'"),
        (SWAP % "1, topp: 1", "1: unknown key 'topp'"),
        (SWAP % "1, top: -1", "1: top is -1: input should be greater than or equal to 0"),
        (SWAP % "3, top: 1", f"1: layer_swap: {TOO_MANY}"),
        (SWAP % "1, top: 1, transition: {botom: 1}", "1: unknown key 'botom'"),
        ("merge: {layer_swap: {task: a, bottom: 1, top: 1}}", "1: layer_swap lacks the key 'language'"),
        ("merge: {slerp: {models: [a]}}", "1: slerp takes exactly 2 models, 1 are given"),
        ("merge: {ties: {models: [a, b]}}", "1: ties needs a base"),
        ("merge: {linear: {base: base, models: [a, b]}}", "1: linear takes no base"),
        ("merge: {linear: {models: {a: 1, b: -1}}}", f"1: linear: {CANCELLING}"),
        ("merge: {linear: {models: [a, b], weight: {a: 1, c: 2}}}", "1: unknown model 'c'"),
        ("merge: {linear: {models: [a, b]}}\nmerge: {}", "2: the key 'merge' is given twice"),
        ("models: {a: ./a}", "1: has no key 'merge'"),
        ("- merge", "holds no recipe"),
        ("merge: [a", "not valid YAML"),
        ("merge: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("merge: {linear: {models: [no/such/model]}}", "1: no model, file or folder 'no/such/model'"),
        ("merge: {linear: {models: [a]}}\n---\nmerge: {linear: {models: [b]}}", "3: a second document"),
    ],
)
def test_a_mistake_is_named(write: Write, text: str, found: str) -> None:
    with pytest.raises(merge.PortmanteauError) as caught:
        merge.make_plan(composed(write(text)))
    assert len(caught.value.mistakes) == 1
    mistake = caught.value.mistakes[0]
    assert found in f"{mistake.where.removeprefix(str(write(text)) + ':')}: {mistake.what}"


def test_all_models_that_cannot_be_opened_are_reported(write: Write, tmp_path: Path) -> None:
    for name in ("a", "b"):
        weights = tmp_path / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(merge.RecipeError) as caught:
        composed(write("merge: {linear: {models: [a, b]}}"))
    assert [("a/model" in m.where, "b/model" in m.where) for m in caught.value.mistakes] == [
        (True, False),
        (False, True),
    ]


def test_numbers_in_exponent_form_are_numbers(write: Write) -> None:
    assert by_layer(composed(write("merge: {linear: {models: {a: 1e-3, b: 3e-3}}}"))) == [2.5] * 4


def test_the_output_section_is_read(write: Write) -> None:
    path = write("""
        merge: {linear: {models: [a]}}
        output: {dtype: fp16, shard_size: 1.5 MB, tokenizer: b}
    """)
    output = load(path).output
    assert output.tokenizer is not None
    assert (output.dtype, output.shard_size, output.tokenizer.source.path) == ("F16", 1_500_000, "b")


def test_companions_come_from_the_named_donor(write: Write, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "tokenizer_config.json").write_text(f'{{"name": "{name}"}}')
        (tmp_path / name / "config.json").write_text(f'{{"model_type": "llama", "of": "{name}"}}')
    out = tmp_path / "out"
    merge.build(composed(write("merge: {linear: {models: [a, b]}}\noutput: {tokenizer: b}")), out)
    assert '"name": "b"' in (out / "tokenizer_config.json").read_text()
    assert '"of": "a"' in (out / "config.json").read_text()


def test_a_step_carries_the_line_that_asked_for_it(write: Write) -> None:
    path = write("""
        merge:
          linear:
            models: [a, b]
            rules:
              - {tensors: "lm_head.*", operator: copy, models: [a]}
    """)
    steps = {step.output.name: step.why for step in merge.make_plan(composed(path)).steps}
    assert steps["lm_head.weight"] == f"{path}:6"
    assert steps["model.layers.0.input_norm.weight"] == f"{path}:3"


def test_a_random_operator_depends_on_seed_tensor_and_model_name_only(write: Write) -> None:
    text = "merge: {dare: {base: base, models: [a, b], density: 0.5, seed: %d}}"
    one, again, other = composed(write(text % 1)), composed(write(text % 1)), composed(write(text % 2))
    name = "lm_head.weight"
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], other[name])


def test_a_copy_is_multiplied_where_a_factor_says_so(write: Write) -> None:
    merged = composed(write("merge: {copy: {models: [b], factor: [1.0, 0.25]}}"))
    assert by_layer(merged) == [3.0, 2.25, 1.5, 0.75]


def test_integers_are_copied_as_they_are_whatever_the_factor(write: Write, save_tensors: Save) -> None:
    save_tensors("counted", {"steps": torch.tensor([4, 6]), "w": torch.tensor([4.0])})
    merged = composed(write("merge: {copy: {models: [counted], factor: 0.5}}"))
    assert (merged["steps"].tolist(), merged["w"].tolist()) == ([4, 6], [2.0])


def test_the_scale_of_a_merge_does_not_reach_what_is_copied(write: Write) -> None:
    rules = '[{tensors: "lm_head.*", operator: copy, models: [b]}]'
    merged = composed(write(f"merge: {{ties: {{base: base, models: [a, b], scale: 0.5, rules: {rules}}}}}"))
    assert first(merged, "lm_head.weight") == 3.0


def test_nuslerp_takes_models_or_with_a_base_their_deltas(write: Write) -> None:
    plain = composed(write("merge: {nuslerp: {models: {a: 1, b: 3}}}"))
    assert by_layer(plain) == [2.5] * 4  # parallel: linear, a quarter of 1 and three of 3
    deltas = composed(write("merge: {nuslerp: {base: a, models: {base: 1, b: 3}}}"))
    assert by_layer(deltas) == [2.25] * 4  # 1 + (−1 · 1/4 + 2 · 3/4)


def test_quantised_tensors_are_merged_by_copying_only(write: Write, tmp_path: Path) -> None:
    for name in ("q", "r"):
        header = b'{"w":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}   '
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    found = mistakes(write("merge: {linear: {models: [q, r]}}"))
    assert found == ["1: linear: 1 quantised tensors cannot be merged: w"]
    scaled = mistakes(write("merge: {copy: {models: [q], factor: 0.5}}"))
    assert scaled == ["1: copy: 1 quantised tensors cannot be merged: w"]
    rule = "rules: [{tensors: w, operator: copy, models: [r]}]"
    merge.build(composed(write(f"merge: {{linear: {{models: [q, r], {rule}}}}}")), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes().endswith(b"ab")


@pytest.mark.parametrize("unmatched", ["error", "keep", "drop"])
def test_layers_are_never_kept_or_dropped_as_leftovers(write: Write, save_tensors: Save, unmatched: str) -> None:
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(2, 2) for i in range(3)}
    tensors |= {f"model.layers.{i}.input_norm.weight": torch.ones(2) for i in range(3)}
    save_tensors("short", tensors | {"lm_head.weight": torch.ones(4, 2)})
    found = mistakes(write(f"merge: {{linear: {{models: [a, short], unmatched: {unmatched}}}}}"))
    assert found == ["1: linear: layer counts differ: a has 4 in model.layers; short has 3 in model.layers"]


def test_tensors_that_not_every_model_has_are_kept_or_dropped_only_when_asked(write: Write, save_tensors: Save) -> None:
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(2, 2) for i in range(4)}
    tensors |= {f"model.layers.{i}.input_norm.weight": torch.ones(2) for i in range(4)}
    save_tensors("extra", tensors | {"lm_head.weight": torch.ones(4, 2), "classifier.weight": torch.full((3, 2), 7.0)})
    text = "merge: {linear: {models: [a, extra], unmatched: %s}}"
    assert mistakes(write(text % "error")) == ["1: linear: a lacks 1 tensors that others have: classifier.weight"]
    kept, dropped = composed(write(text % "keep")), composed(write(text % "drop"))
    assert first(kept, "classifier.weight") == 7.0
    (note,) = kept.notes
    assert note == "1 tensors that not every model has were kept from the first model that has them: classifier.weight"
    assert "classifier.weight" not in dropped.specs
    assert dropped.notes == ("1 tensors that not every model has were left out: classifier.weight",)
