"""AdapterHub's bottleneck adapters: read, averaged, stacked and inspected.

The folders in `tests/oracles/fixtures/adapters_1_3_0/` were written by the library adapters 1.3.0; the script
`tests/oracles/adapters_1_3_0.py` says how.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from portmanteau import compositions, merge
from portmanteau.cli import app

ORACLE = Path(__file__).parent / "oracles" / "fixtures" / "adapters_1_3_0"


def saved(name: str) -> dict[str, Tensor]:
    """Give the tensors of one of the library's folders."""
    path = ORACLE / name / "adapter.safetensors"
    return load_file(path) if path.is_file() else torch.load(path.with_name("pytorch_adapter.bin"))


def config(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ORACLE / name / "adapter_config.json").read_text())
    return found


def save(folder: Path, tensors: Mapping[str, Tensor], **changes: Any) -> Path:
    """Save an adapter like `first`, with other tensors, and some keys of its config changed."""
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "adapter.safetensors")
    own = config("first")
    own["config"] |= changes.pop("config", {})
    (folder / "adapter_config.json").write_text(json.dumps({**own, **changes}))
    return folder


def edited(tmp_path: Path, change: Callable[[dict[str, Tensor]], None], source: str = "first", **changes: Any) -> Path:
    """Copy one of the library's adapters with tensors changed."""
    tensors = saved(source)
    change(tensors)
    return save(tmp_path / "edited", tensors, **{**config(source), **changes})


def composed(tmp_path: Path, merge_section: str) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"merge: {merge_section}\n")
    return compositions.compose(compositions.load(path))


def built(tmp_path: Path, merge_section: str, **options: Any) -> Path:
    merge.build(composed(tmp_path, merge_section), tmp_path / "out", **options)
    return tmp_path / "out"


def mistakes(tmp_path: Path, merge_section: str) -> str:
    with pytest.raises(merge.PortmanteauError) as caught:
        composed(tmp_path, merge_section)
    return str(caught.value).replace(f"{tmp_path}/", "").replace(f"{ORACLE}/", "")


def refused(folder: Path) -> str:
    with pytest.raises(merge.CheckpointError) as caught:
        merge.open_bottleneck(folder)
    return str(caught.value).replace(f"{folder}", "FOLDER")


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("name", "tensors", "reduction", "invertible", "head"),
    [
        ("first", 8, 4, False, []),
        ("second", 8, 4, False, []),
        ("swahili", 16, 2, True, []),
        ("quechua", 16, 2, True, []),
        ("task", 16, 8, False, ["head_config.json", "pytorch_model_head.bin"]),
    ],
)
def test_a_folder_of_the_library_is_read(name: str, tensors: int, reduction: int, invertible: bool, head: Any) -> None:
    found = merge.open_bottleneck(ORACLE / name)
    assert (found.name, found.is_invertible, list(found.head)) == (name, invertible, head)
    assert found.model == {
        "hidden_size": 16,
        "model_class": "BertAdapterModel",
        "model_name": "base",
        "model_type": "bert",
    }
    assert found.architecture == config(name)["config"]
    assert found.architecture["reduction_factor"] == reduction
    read, oracle = found.called(name), saved(name)
    assert len(read) == tensors
    assert read.specs.keys() == oracle.keys()
    assert all(torch.equal(read[key], oracle[key]) for key in oracle)


def old(key: str) -> str:
    """Spell a tensor's name as adapter-transformers 1 did."""
    key = key.replace(".output.adapters.", ".output.layer_text_lang_adapters.")
    return key.replace("invertible_adapters", "invertible_lang_adapters")


def as_version_1(folder: Path, name: str, **changes: Any) -> Path:
    """Save one of the library's adapters as adapter-transformers 1 did: old names, few options, no version."""
    save(folder, {old(key): tensor for key, tensor in saved(name).items()})
    kept = ("mh_adapter", "output_adapter", "reduction_factor", "original_ln_before", "original_ln_after")
    own = {key: value for key, value in config(name)["config"].items() if key in kept}
    own |= {"non_linearity": "gelu", "invertible_adapter": {"block_type": "nice", "reduction_factor": 2}}
    model = {key: value for key, value in config(name).items() if key not in ("config", "version")}
    (folder / "adapter_config.json").write_text(json.dumps({**model, "config": own, **changes}))
    return folder


def test_an_adapter_of_the_first_versions_is_read_as_adapters_reads_it(tmp_path: Path) -> None:
    found = merge.open_bottleneck(as_version_1(tmp_path / "old", "swahili", type="text_lang"))
    assert found.called("swahili").specs.keys() == saved("swahili").keys()
    expected = config("swahili")["config"] | {"non_linearity": "gelu_new"}
    assert found.architecture == expected  # gelu without a version meant what is called gelu_new now
    written = json.loads(found.config_text("sw"))
    assert (written["name"], written["version"], written["config"]) == ("sw", "adapters.1.3.0", expected)


def test_an_old_task_adapter_that_names_an_invertible_adapter_has_none(tmp_path: Path) -> None:
    found = merge.open_bottleneck(as_version_1(tmp_path / "old", "first", type="text_task"))
    assert not found.is_invertible
    assert found.architecture["inv_adapter_reduction_factor"] is None


def drop(ending: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if ending in key]:
            del tensors[key]

    return change


def add(**tensors: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda found: found.update({key.replace("__", "."): value for key, value in tensors.items()})


WIDTH = "bert.encoder.layer.0.output.adapters.first.adapter_down.0.weight"


@pytest.mark.parametrize(
    ("change", "changes", "said"),
    [
        (drop(""), {}, "holds no tensors of the adapter 'first'"),
        (drop("layer.1.output.adapters.first.adapter_up"), {}, r"the adapter at bert.encoder.layer.1.output has only"),
        (add(pooler__weight=torch.ones(1)), {}, "1 tensors belong to no bottleneck adapter: pooler.weight"),
        (drop("none"), {"name": "other"}, "holds the tensors of first, its config is that of 'other'"),
        (drop("none"), {"name": "../up"}, "name is '../up': an adapter's name is text without dots and slashes"),
        (drop("none"), {"hidden_size": 32}, rf"{WIDTH} is \[4, 16\]; hidden_size 32 and .* make it \[8, 32\]"),
        (drop("none"), {"config": {"reduction_factor": 2}}, r"is \[4, 16\]; hidden_size 16 and .* make it \[8, 16\]"),
        (drop("none"), {"config": {"reduction_factor": 0}}, "reduction_factor is 0, not a number above 0"),
        (drop("none"), {"config": {"inv_adapter": "nice"}}, "has no invertible adapter, and its config says otherwise"),
        (drop("none"), {"config": {"architecture": "lora"}}, "a LoRA, not a bottleneck adapter\n  hint: it can be"),
        (
            drop("none"),
            {"config": {"architecture": "lora", "composition_mode": "scale"}},
            r"an \(IA\)³, not a bottleneck adapter\n  hint: it can be merged into weights",
        ),
        (drop("none"), {"config": {"architecture": "prefix_tuning"}}, "a prefix tuning, .*\n  hint: it acts at run"),
        (drop("none"), {"config": {"architecture": "union", "configs": []}}, "a union of several methods, not a"),
        (drop("none"), {"config": {"architecture": "new"}}, "an adapter of the method 'new', not a bottleneck"),
        (
            drop("none"),
            {"peft_type": "LORA"},
            r"a PEFT adapter \(LORA\), not .*\n  hint: `lora` folds it into its base",
        ),
    ],
)
def test_what_is_no_whole_bottleneck_adapter_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], changes: dict[str, Any], said: str
) -> None:
    own = {**config("first")["config"], **changes.pop("config", {})}
    assert re.search(said, refused(edited(tmp_path, change, **{**changes, "config": own})))


def test_an_adapter_whose_reduction_differs_by_layer_is_read(tmp_path: Path) -> None:
    own = {**config("first")["config"], "reduction_factor": {"0": 4, "default": 4}}
    assert len(merge.open_bottleneck(edited(tmp_path, drop("none"), config=own)).tensors) == 8


def test_folders_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "nowhere").startswith("FOLDER: no such folder")
    assert refused(ORACLE / "base").startswith("FOLDER: holds no adapter_config.json")
    shutil.copytree(ORACLE / "second", tmp_path / "half")
    file = tmp_path / "half" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "not a whole safetensors file" in refused(tmp_path / "half")
    file.unlink()
    assert refused(tmp_path / "half").startswith("FOLDER: holds no adapter.safetensors or pytorch_adapter.bin")


def test_lora_says_whose_adapter_it_was_given(tmp_path: Path) -> None:
    section = f"{{lora: {{base: {ORACLE}/base, adapters: [{ORACLE}/first]}}}}"
    said = mistakes(tmp_path, section)
    assert "an adapter of AdapterHub's library adapters, not of peft" in said
    assert "hint: average_adapters and stack_adapters take" in said


# ------------------------------------------------------------------------------------------------------------ averaging


def constant(value: float, name: str, prefix: str = "bert.") -> dict[str, Tensor]:
    """Make the tensors of an adapter like `first`, all of one value."""
    named = {key.replace(".first.", f".{name}.").replace("bert.", prefix): t for key, t in saved("first").items()}
    return {key: torch.full_like(tensor, value) for key, tensor in named.items()}


def test_the_mean_is_that_of_adapters_bit_for_bit(tmp_path: Path) -> None:
    out = built(tmp_path, f"{{average_adapters: {{adapters: {{{ORACLE}/first: 1, {ORACLE}/second: 3}}, name: mean}}}}")
    ours, theirs = load_file(out / "adapter.safetensors"), saved("mean")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert json.loads((out / "adapter_config.json").read_text()) == config("mean")
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "adapter.safetensors",
        "adapter_config.json",
        "portmanteau.json",
    ]
    assert "library_name: adapter-transformers" in (out / "README.md").read_text()


def test_invertible_adapters_are_averaged_too(tmp_path: Path) -> None:
    adapters = f"{{{ORACLE}/swahili: 3, {ORACLE}/quechua: 1}}"
    ours = composed(tmp_path, f"{{average_adapters: {{adapters: {adapters}, name: languages}}}}")
    theirs = saved("languages")
    assert ours.specs.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor)
    assert any("invertible_adapters.languages." in key for key in ours)


@pytest.mark.parametrize(
    ("adapters", "more", "value"),
    [
        ("{a: 1, b: 3}", "", 4.0),  # (1 · 1 + 3 · 5) / 4
        ("[a, b]", "", 3.0),
        ("{a: 1, b: 3}", ", normalize: false", 16.0),
        ("{a: 2, b: -1}", ", normalize: false", -3.0),
        ("[b]", "", 5.0),
    ],
)
def test_weights_are_normalised_unless_told_otherwise(tmp_path: Path, adapters: str, more: str, value: float) -> None:
    save(tmp_path / "a", constant(1.0, "first"))
    save(tmp_path / "b", constant(5.0, "other"), name="other", config={"dropout": 0.5, "init_weights": "mam_adapter"})
    made = composed(tmp_path, f"{{average_adapters: {{adapters: {adapters}, name: new{more}}}}}")
    assert {key: set(made[key].flatten().tolist()) for key in made} == {key: {value} for key in constant(0, "new")}


def test_adapters_saved_from_models_with_and_without_a_head_meet(tmp_path: Path) -> None:
    save(tmp_path / "a", constant(1.0, "first"))
    save(tmp_path / "b", constant(5.0, "first", prefix=""), model_class="BertModel", model_name="other/path")
    made = composed(tmp_path, "{average_adapters: {adapters: [a, b], name: new}}")
    assert made.specs.keys() == constant(0, "new").keys()
    assert made.notes[:2] == (
        "b: 8 tensors renamed to those of a: prefix 'bert.' added",
        "the configs name the model differently, make sure that it is one: a 'base', b 'other/path'",
    )


def test_all_that_does_not_go_together_is_said_at_once(tmp_path: Path) -> None:
    save(tmp_path / "wide", constant(1.0, "first"), config={"non_linearity": "gelu", "scaling": 4.0}, model_type="t5")
    section = f"{{average_adapters: {{adapters: [{ORACLE}/first, ./wide, {ORACLE}/task, {ORACLE}/first], name: new}}}}"
    said = mistakes(tmp_path, section)
    for line in (
        f"./wide has another architecture: scaling is 4.0, in {ORACLE}/first 1.0; "
        f"non_linearity is 'gelu', in {ORACLE}/first 'relu'",
        f"{ORACLE}/task has another architecture: original_ln_before is False",
        "reduction_factor is 8, in",
        "./wide: model_type is 't5', in",
        "an adapter is named twice",
    ):
        assert line.replace(f"{ORACLE}/", "") in said
    assert said.count("recipe.yaml:1: average_adapters: ") == 4


def test_adapters_with_other_layers_are_refused(tmp_path: Path) -> None:
    fewer = {key: tensor for key, tensor in constant(1.0, "first").items() if "layer.0" in key}
    save(tmp_path / "fewer", fewer)
    said = mistakes(tmp_path, f"{{average_adapters: {{adapters: [{ORACLE}/first, fewer], name: new}}}}")
    assert "layer counts differ: first has 2 in bert.encoder.layer; fewer has 1 in bert.encoder.layer" in said


def test_weights_that_cancel_and_a_name_that_no_folder_can_have_are_refused(tmp_path: Path) -> None:
    adapters = f"{{{ORACLE}/first: 1, {ORACLE}/second: -1}}"
    cancelling = composed(tmp_path, f"{{average_adapters: {{adapters: {adapters}, name: new}}}}")
    with pytest.raises(merge.MergeError, match="sum to zero"):
        merge.make_plan(cancelling)
    assert "name is '../new'" in mistakes(tmp_path, f"{{average_adapters: {{adapters: {adapters}, name: ../new}}}}")
    assert "names no adapter" in mistakes(tmp_path, "{average_adapters: {adapters: [], name: new}}")


# ------------------------------------------------------------------------------------------------------------- stacking


STACK = f"{{stack_adapters: {{language: {ORACLE}/swahili, task: {ORACLE}/task}}}}"


def test_a_stack_is_the_folder_that_adapters_saves(tmp_path: Path) -> None:
    out, theirs = built(tmp_path, STACK), ORACLE / "stack"
    for name in ("adapter_setup.json", "task/head_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((theirs / name).read_text())
    for name in ("swahili", "task"):
        own = json.loads((out / name / "adapter_config.json").read_text())
        assert own == config(f"stack/{name}")
        ours, oracle = load_file(out / name / "adapter.safetensors"), load_file(theirs / name / "adapter.safetensors")
        assert ours.keys() == oracle.keys()
        assert all(torch.equal(ours[key], oracle[key]) for key in oracle)
    head = "task/pytorch_model_head.bin"
    assert (out / head).read_bytes() == (ORACLE / head).read_bytes()


def test_a_stack_says_that_it_cannot_be_merged_and_keeps_a_receipt(tmp_path: Path) -> None:
    out = built(tmp_path, STACK)
    assert "bottleneck adapters cannot be merged into weights" in (out / "README.md").read_text()
    receipt = json.loads((out / "portmanteau.json").read_text())
    assert [entry["checkpoint"] for entry in receipt["inputs"]] == [f"{ORACLE}/swahili", f"{ORACLE}/task"]
    assert receipt["outputs"].keys() == saved("swahili").keys() | saved("task").keys()
    (note,) = receipt["notes"]
    assert "model.load_adapter_setup(FOLDER, set_active=True, use_safetensors=True)" in note


def test_a_stack_is_written_in_the_dtype_asked_for(tmp_path: Path) -> None:
    out = built(tmp_path, STACK, dtype="bfloat16")
    stored = [load_file(out / name / "adapter.safetensors") for name in ("swahili", "task")]
    assert {tensor.dtype for found in stored for tensor in found.values()} == {torch.bfloat16}


def test_what_has_no_part_in_a_stack_is_said(tmp_path: Path) -> None:
    notes = composed(tmp_path, f"{{stack_adapters: {{language: {ORACLE}/task, task: {ORACLE}/swahili}}}}").notes
    assert [note.removeprefix(f"{ORACLE}/") for note in notes[1:]] == [
        "task: its prediction head is left out, the task's is used",
        "swahili: its invertible adapter has no effect: adapters uses only that of the first in a stack",
    ]


def test_two_adapters_of_one_name_are_refused_with_a_way_that_works(tmp_path: Path) -> None:
    shutil.copytree(ORACLE / "first", tmp_path / "a")
    said = mistakes(tmp_path, f"{{stack_adapters: {{language: {ORACLE}/first, task: ./a}}}}")
    assert "recipe.yaml:1: stack_adapters: both adapters are called 'first', and a model holds a name once" in said
    assert "hint: rename one: build {average_adapters: {adapters: [./a], name: …}}" in said
    renamed = built(tmp_path, "{average_adapters: {adapters: [./a], name: another}}")
    stack = composed(tmp_path, f"{{stack_adapters: {{language: {ORACLE}/first, task: {renamed}}}}}")
    first = saved("first")
    assert len(stack) == 2 * len(first)
    assert all(torch.equal(stack[key.replace("first", "another")], tensor) for key, tensor in first.items())


def test_adapters_of_different_models_are_not_stacked(tmp_path: Path) -> None:
    save(tmp_path / "other", constant(1.0, "first"), model_type="roberta")
    said = mistakes(tmp_path, f"{{stack_adapters: {{language: {ORACLE}/swahili, task: ./other}}}}")
    assert "./other: model_type is 'roberta', in swahili 'bert'" in said


# ----------------------------------------------------------------------------------------------------------- inspecting


def inspected(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    assert done.exit_code == 0, done.exception
    return done.stdout


def test_inspect_shows_what_an_adapter_is_and_where_it_stands() -> None:
    shown = inspected(ORACLE / "swahili").splitlines()
    assert shown[0].endswith("swahili: 16 tensors, 712 entries, 2.8 kB")
    assert shown[1] == (
        "kind: bottleneck adapter; name: swahili; model: base; model type: bert; hidden size: 16; "
        "reduction factor: 2; activation: relu; invertible: nice, reduction factor 2"
    )
    rows = [line.split() for line in shown[4:] if line.strip()]
    assert rows[1] == ["bert.encoder.layer.*.output", "0-1", "8", "2.2", "kB", "F32"]
    assert rows[2] == ["bert.invertible_adapters", "8", "608", "B", "F32"]


def test_inspect_shows_the_adapters_of_a_stack_as_json(tmp_path: Path) -> None:
    for folder in (ORACLE / "stack", built(tmp_path, STACK)):
        found = json.loads(inspected("--json", "--tensors", folder))
        assert [(one["name"], one["reduction_factor"]) for one in found["about"]] == [("swahili", 2), ("task", 8)]
        assert [one["where"] for one in found["groups"]][::3] == [
            "swahili: bert.encoder.layer.*.output",
            "task: bert.encoder.layer.*.output",
        ]
        assert (found["tensors"], found["entries"], len(found["list"])) == (32, 712 + 328, 32)


def test_layers_that_are_left_out_are_seen(tmp_path: Path) -> None:
    tensors = {key.replace("layer.1", f"layer.{i}"): t.clone() for key, t in saved("first").items() for i in (1, 2, 5)}
    found = json.loads(inspected("--json", save(tmp_path / "a", tensors)))
    assert [group["layers"] for group in found["groups"]] == ["0-2, 5"]


def test_inspect_says_what_is_no_bottleneck_adapter(tmp_path: Path) -> None:
    own = {**config("first")["config"], "architecture": "lora"}
    done = CliRunner().invoke(app, ["inspect", str(edited(tmp_path, drop("none"), config=own))])
    assert isinstance(done.exception, merge.CheckpointError)
    assert "a LoRA, not a bottleneck adapter" in str(done.exception)
