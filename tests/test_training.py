"""With a stock Trainer: what is held still, whose turn a step is, and which weights are saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from portmanteau import compositions, merge
from portmanteau.compositions import Zone, training
from portmanteau.compositions.training import Interleaved, Partition, Turns
from tests.conftest import LLAMA

Save = Callable[[str, Mapping[str, Tensor]], Path]
OUTER = ("model.layers.0.", "model.layers.1.", "model.layers.7.")
OUTSIDE = ("model.embed_tokens.", "model.norm.", "lm_head.")


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def examples(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Make examples of eight tokens; the first token says which data set they are of."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(10, 40, (count, 8), generator=generator)
    rows[:, 0] = seed
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    common: dict[str, Any] = {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**common, **settings})


class Watching(TrainerCallback):
    """Remembers the weights after every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def remember(self, model: torch.nn.Module) -> None:
        self.states.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.remember(others["model"])

    def changed(self, step: int) -> set[str]:
        before, after = self.states[step], self.states[step + 1]
        return {name for name in before if not torch.equal(before[name], after[name])}


# ------------------------------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize("train", ["outer", "middle"])
def test_what_is_trained_is_what_a_layer_swap_takes_from_that_expert(tmp_path: Path, train: Any) -> None:
    model = llama()
    frozen = training.freeze_layers(model, Partition(bottom=2, top=1), train=train)
    for name, seed in (("task", 1), ("language", 2)):
        llama(seed).save_pretrained(tmp_path / name)
    task, language = merge.open(tmp_path / "task"), merge.open(tmp_path / "language")
    swapped = compositions.layer_swap(task=task, language=language, bottom=2, top=1, transition=0)
    mine = "language" if train == "outer" else "task"
    labels = {name: swapped.node(name).labels for name in swapped}  # type: ignore[union-attr]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, found in labels.items() if found == (mine,)
    }
    assert set(frozen) == {name for name, found in labels.items() if found != (mine,)}


def test_a_transition_belongs_to_both_and_the_outside_to_whom_it_is_given() -> None:
    parts = Partition(bottom=1, top=1, transition=1, outside="neither").of(llama())
    by_layer = [parts[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(8)]
    assert by_layer == ["outer", "both", "middle", "middle", "middle", "middle", "both", "outer"]
    assert {part for name, part in parts.items() if name.startswith(OUTSIDE)} == {"neither"}


def test_modules_and_stacks_have_numbers_of_their_own() -> None:
    parts = Partition(bottom=1, top=0, modules={"attention": Zone(bottom=3)}).of(llama())
    assert [parts[f"model.layers.{i}.self_attn.q_proj.weight"] for i in range(4)] == ["outer"] * 3 + ["middle"]
    assert [parts[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(2)] == ["outer", "middle"]
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=3, num_heads=2, vocab_size=20))
    with pytest.raises(merge.MergeError, match="2 stacks of layers"):
        Partition(bottom=1, top=1).of(t5)
    parts = Partition(stacks={"encoder": Zone(bottom=1, top=1), "decoder": "outside"}, outside="middle").of(t5)
    assert [parts[f"encoder.block.{i}.layer.0.SelfAttention.q.weight"] for i in range(3)] == [
        "outer",
        "middle",
        "outer",
    ]
    assert parts["decoder.block.0.layer.0.SelfAttention.q.weight"] == "middle"


def test_a_model_whose_layers_cannot_be_found_is_refused() -> None:
    with pytest.raises(merge.MergeError, match="show no layers"):
        training.freeze_layers(torch.nn.Linear(2, 2), Partition(bottom=1, top=1), train="outer")
    with pytest.raises(merge.MergeError, match=r"has 8 layers, and bottom 5 \+ top 4"):
        training.freeze_layers(llama(), Partition(bottom=5, top=4), train="outer")
    model = llama()
    with pytest.raises(merge.MergeError, match="no parameter of the middle layers would be trained"):
        training.freeze_layers(model, Partition(bottom=8, top=0), train="middle")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parameters_that_were_still_stay_still_and_are_not_named() -> None:
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    frozen = training.freeze_layers(model, Partition(bottom=1, top=1, outside="middle"), train="middle")
    assert "model.norm.weight" not in frozen
    assert not model.model.norm.weight.requires_grad


def bert(seed: int, labels: int = 3) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=20, num_labels=labels))


def test_runs_that_share_a_frozen_head_can_be_averaged(tmp_path: Path) -> None:
    bert(0).save_pretrained(tmp_path / "first")
    first = merge.open(tmp_path / "first")
    for seed in (1, 2):
        model = bert(seed)
        assert training.freeze_head(model, first) == ("classifier.weight", "classifier.bias")
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
            "classifier.weight",
            "classifier.bias",
        ]
        model.save_pretrained(tmp_path / f"seed-{seed}" / "checkpoint-1")
    runs = [merge.open(tmp_path / f"seed-{seed}" / "checkpoint-1") for seed in (1, 2)]
    averaged = compositions.average(models=runs)
    assert torch.equal(averaged["classifier.weight"], first["classifier.weight"])


def test_a_head_that_does_not_fit_is_refused_and_the_model_left_alone(tmp_path: Path, save_tensors: Save) -> None:
    bert(0, labels=4).save_pretrained(tmp_path / "four")
    model = bert(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(merge.MergeError) as caught:
        training.freeze_head(model, merge.open(tmp_path / "four"))
    assert [mistake.what for mistake in caught.value.mistakes] == [
        "classifier.weight is [4, 8], the model's [3, 8]",
        "classifier.bias is [4], the model's [3]",
    ]
    other = merge.open(save_tensors("other", {"qa_outputs.weight": torch.zeros(2, 8)}))
    with pytest.raises(merge.MergeError, match=r"it lacks classifier\.weight, classifier\.bias") as caught:
        training.freeze_head(model, other)
    assert "the model lacks qa_outputs.weight" in str(caught.value)
    with pytest.raises(merge.MergeError, match="neither it nor the model has a head"):
        training.freeze_head(llama(), merge.open(save_tensors("bare", {"weight": torch.zeros(2)})))
    assert all(torch.equal(before[n], p) and p.requires_grad for n, p in model.named_parameters())


# ---------------------------------------------------------------------------------------------------------------- turns


def interleaved(steps: int, per_step: int, turns: Turns, **settings: Any) -> Interleaved:
    return Interleaved(examples(6, seed=1), examples(10, seed=2), steps, per_step, turns, **settings)


def test_examples_take_turns_by_steps_and_every_pass_has_each_once() -> None:
    found = interleaved(9, 4, Turns((("task", 2), ("language", 1))))
    sources = [int(found[i]["input_ids"][0]) for i in range(len(found))]
    assert sources == [1] * 8 + [2] * 4 + [1] * 8 + [2] * 4 + [1] * 8 + [2] * 4
    rows = [tuple(found[i]["input_ids"].tolist()) for i in range(len(found))]
    task = [row for row in rows if row[0] == 1]
    passes = [set(task[i : i + 6]) for i in range(0, 24, 6)]
    assert [len(one) for one in passes] == [6] * 4  # all six examples, four times
    assert task[:6] != task[6:12]
    again = interleaved(9, 4, Turns((("task", 2), ("language", 1))))
    assert [tuple(again[i]["input_ids"].tolist()) for i in range(len(again))] == rows
    other = interleaved(9, 4, Turns((("task", 2), ("language", 1))), seed=1)
    assert [tuple(other[i]["input_ids"].tolist()) for i in range(len(other))] != rows


@pytest.mark.parametrize("order", [(("task", 1),), (("task", 1), ("language", 0)), (("task", 1), ("langauge", 1))])
def test_turns_that_leave_one_out_are_refused(order: Any) -> None:
    with pytest.raises(merge.MergeError, match="does not give steps to both task and language"):
        Turns(order)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_each_step_changes_its_own_layers_only_under_momentum_and_weight_decay(
    tmp_path: Path, accumulation: int
) -> None:
    turns, model, watching = Turns((("task", 2), ("language", 1))), llama(), Watching()
    data = interleaved(7, 2 * accumulation, turns)
    seen: list[int] = []

    def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        seen.extend(int(row["input_ids"][0]) for row in rows)
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    watching.remember(model)
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            gradient_accumulation_steps=accumulation,
            weight_decay=0.5,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
        ),
        train_dataset=data,  # type: ignore[arg-type]
        data_collator=collate,
        callbacks=[training.partition_turns(model, Partition(bottom=2, top=1), turns=turns), watching],
    )
    trainer.train()
    assert trainer.state.global_step == 7
    outer = {name for name in watching.states[0] if name.startswith((*OUTER, *OUTSIDE))}
    middle = watching.states[0].keys() - outer
    steps = [middle, middle, outer, middle, middle, outer, middle]
    assert [watching.changed(step) for step in range(7)] == steps
    of_step = [1, 1, 2, 1, 1, 2, 1]
    assert seen == [source for source in of_step for _ in range(2 * accumulation)]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_the_callback_momentum_and_decay_would_move_every_layer(tmp_path: Path) -> None:
    model, watching = llama(), Watching()
    watching.remember(model)
    data = interleaved(2, 2, Turns())
    settings = arguments(tmp_path, weight_decay=0.5, num_train_epochs=1, train_sampling_strategy="sequential")
    Trainer(model, settings, train_dataset=data, callbacks=[watching]).train()  # type: ignore[arg-type]
    assert [watching.changed(step) for step in range(2)] == [set(watching.states[0])] * 2


def test_steps_of_one_part_are_those_of_a_training_of_that_part_alone(tmp_path: Path) -> None:
    model, alone = llama(), llama()
    turns = Turns((("task", 3), ("language", 1)))
    data = interleaved(3, 2, turns)
    settings = arguments(
        tmp_path, weight_decay=0.1, num_train_epochs=1, train_sampling_strategy="sequential", max_grad_norm=0.1
    )
    callback = training.partition_turns(model, Partition(bottom=2, top=1), turns=turns)
    Trainer(model, settings, train_dataset=data, callbacks=[callback]).train()  # type: ignore[arg-type]
    training.freeze_layers(alone, Partition(bottom=2, top=1), train="middle")
    Trainer(alone, settings, train_dataset=data).train()  # type: ignore[arg-type]
    found = dict(alone.named_parameters())
    assert all(torch.equal(found[name], parameter) for name, parameter in model.named_parameters())


def test_what_would_mix_up_the_turns_is_refused_all_at_once(tmp_path: Path) -> None:
    model = llama()
    callback = training.partition_turns(model, Partition(bottom=2, top=1))
    data = interleaved(4, 2, Turns((("task", 2), ("language", 1))))
    settings = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=9)
    with pytest.raises(merge.MergeError) as caught:
        Trainer(model, settings, train_dataset=data, callbacks=[callback]).train()  # type: ignore[arg-type]
    assert [mistake.where for mistake in caught.value.mistakes] == [
        "train_sampling_strategy", "examples_per_step", "steps", "turns"
    ]  # fmt: skip
    with pytest.raises(merge.MergeError, match="steps of the task would train no parameter"):
        training.partition_turns(model, Partition(bottom=8, top=0))


# ------------------------------------------------------------------------------------------------------------ snapshots


class Words:
    """Stands for a tokenizer."""

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "vocab.txt").write_text("a\nb\n")


def test_snapshots_are_the_weights_at_their_steps_and_average_reads_them(tmp_path: Path) -> None:
    model, watching = llama(), Watching()
    callback = training.weight_snapshots(tmp_path / "run", every_steps=4, tokenizer=Words())
    settings = arguments(tmp_path, max_steps=12, logging_strategy="no")
    trainer = Trainer(model, settings, train_dataset=examples(8, seed=1), callbacks=[callback, watching])  # type: ignore[arg-type]
    trainer.train()
    folders = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert folders == ["checkpoint-12", "checkpoint-4", "checkpoint-8"]
    for step in (4, 8, 12):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        assert {path.name for path in folder.iterdir()} == {
            "model.safetensors", "config.json", "generation_config.json", "vocab.txt", "trainer_state.json"
        }  # fmt: skip
        found = load_file(folder / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in watching.states[step - 1].items())
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["global_step"] == step
        assert [row["step"] for row in state["log_history"] if "loss" in row] == [4, 8, 12][: step // 4]
    (tmp_path / "average.yaml").write_text("merge: {average: {models: run/checkpoint-*}}")
    merged = compositions.compose(compositions.load(tmp_path / "average.yaml"))
    name = "model.layers.3.mlp.up_proj.weight"
    node = merged.node(name)
    assert isinstance(node, merge.Step)
    assert node.labels == tuple(f"run/checkpoint-{step}" for step in (4, 8, 12))
    mean = sum(watching.states[step - 1][name].double() for step in (4, 8, 12)) / 3
    torch.testing.assert_close(merged[name].double(), mean, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("logging", [{"logging_strategy": "no"}, {"logging_steps": 1}, {"logging_strategy": "epoch"}])
def test_a_snapshot_is_taken_after_every_so_many_epochs(tmp_path: Path, logging: dict[str, Any]) -> None:
    model, watching = llama(), Watching()
    callback = training.weight_snapshots(tmp_path / "run", every_epochs=2)
    settings = arguments(tmp_path, num_train_epochs=5, **logging)  # four steps an epoch
    Trainer(model, settings, train_dataset=examples(8, seed=1), callbacks=[callback, watching]).train()  # type: ignore[arg-type]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-16", "checkpoint-8"]
    for step in (8, 16):
        found = load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in watching.states[step - 1].items())
        state = json.loads((tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["log_history"][-1]["step"] == step
        assert "loss" in state["log_history"][-1]


def test_a_snapshot_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise KeyboardInterrupt

    callback = training.weight_snapshots(tmp_path / "run", every_steps=1, tokenizer=Broken())
    settings = arguments(tmp_path, max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        Trainer(llama(), settings, train_dataset=examples(8, seed=1), callbacks=[callback]).train()  # type: ignore[arg-type]
    assert list((tmp_path / "run").iterdir()) == []


def test_places_where_snapshots_would_be_mixed_up_are_refused(tmp_path: Path) -> None:
    data, settings = examples(8, seed=1), arguments(tmp_path, max_steps=1)
    own = training.weight_snapshots(settings.output_dir or "", every_steps=1)
    with pytest.raises(merge.OutputError, match="own output_dir"):
        Trainer(llama(), settings, train_dataset=data, callbacks=[own]).train()  # type: ignore[arg-type]
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    earlier = training.weight_snapshots(tmp_path / "run", every_steps=1)
    with pytest.raises(merge.OutputError, match="snapshots of an earlier run"):
        Trainer(llama(), settings, train_dataset=data, callbacks=[earlier]).train()  # type: ignore[arg-type]


@pytest.mark.parametrize("numbers", [{}, {"every_steps": 1, "every_epochs": 1}, {"every_steps": 0}])
def test_snapshots_need_one_number(tmp_path: Path, numbers: dict[str, int]) -> None:
    with pytest.raises(merge.MergeError, match="either every_steps or every_epochs"):
        training.weight_snapshots(tmp_path, **numbers)
