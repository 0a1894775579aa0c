"""Sparse fine-tuning: training against composable-sft's fixtures and arithmetic on paper; masks, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback

from portmanteau import compositions, merge
from portmanteau.compositions.training.lottery_ticket import Phase, fine_tune
from portmanteau.compositions.training.masks import masked, select
from portmanteau.compositions.training.sparse_result import SparseFineTuning, names_in
from tests.conftest import SaveLlama
from tests.oracles.lottery_ticket import FIXTURES, RUNS, Run, arguments, digest, examples, load_model

PLAIN = RUNS[0]
Maker = Callable[[PreTrainedModel, Phase], Trainer]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Compute as the fixtures were computed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def maker(run: Run, folder: Path, **changes: Any) -> Maker:
    """Give the function that makes the trainers of a run, some arguments changed."""

    def make(model: PreTrainedModel, phase: Phase) -> Trainer:
        return Trainer(model=model, args=replace(arguments(run, phase, folder), **changes), train_dataset=examples())

    return make


# ---------------------------------------------------------------------------------------------------- as composable-sft


@dataclass(frozen=True)
class Trained:
    """A run as we train it, and what composable-sft made of it."""

    run: Run
    model: BertForSequenceClassification
    result: SparseFineTuning
    expected: dict[str, Tensor]
    dense_phase: str


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: run.name)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    run: Run = request.param
    model = load_model(replace(run, frozen=""))
    make = maker(run, tmp_path_factory.mktemp(run.name))
    freeze = [run.frozen] if run.frozen else []
    result = fine_tune(model, make, count=run.count, iterations=run.iterations, freeze=freeze)
    path = FIXTURES / "lottery_ticket" / f"{run.name}.safetensors"
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["run"])
    return Trained(run, model, result, load_file(path), about["dense_phase"])


def test_training_finds_the_masks_and_weights_of_composable_sft(trained: Trained) -> None:
    found: dict[str, Tensor] = dict(trained.result.dense)
    for name, entries in trained.result.entries.items():
        found |= {f"{name}.indices": entries.indices, f"{name}.values": entries.final}
    torch.testing.assert_close(found, trained.expected, rtol=1e-9, atol=1e-11)


def test_the_weights_are_those_of_composable_sft_bit_for_bit(trained: Trained, tmp_path: Path) -> None:
    stock = load_model(trained.run)
    maker(trained.run, tmp_path)(stock, "dense").train()
    if digest(stock) != trained.dense_phase:
        pytest.skip("torch rounds otherwise on this machine: a stock Trainer alone gives other bits than the fixture's")
    expected = trained.expected
    weights = load_file(FIXTURES / "lottery_ticket" / "start.safetensors")
    for name, parameter in trained.model.named_parameters():
        whole = expected.get(name, weights[name].double())
        if f"{name}.indices" in expected:
            whole.view(-1)[expected[f"{name}.indices"]] = expected[f"{name}.values"]
        assert torch.equal(parameter, whole), name


# -------------------------------------------------------------------------------------------------- arithmetic on paper


class Target(PreTrainedModel):
    """Learns targets by heart: loss ½ Σ (w − t)² over a body [2, 1, 3] and a head [2]; the gradient is w − t."""

    config_class = PreTrainedConfig
    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.body = nn.Module()
        self.body.experts = nn.Parameter(torch.zeros(2, 1, 3))
        self.head = nn.Parameter(torch.zeros(2))
        self.post_init()

    def forward(self, body: Tensor, head: Tensor) -> dict[str, Tensor]:
        experts = self.body.experts
        assert isinstance(experts, nn.Parameter)
        return {"loss": ((experts - body[0]).square().sum() + (self.head - head[0]).square().sum()) / 2}


BODY = torch.tensor([[[8.0, -16.0, 1.0]], [[0.0, 8.0, -8.0]]])
HEAD = torch.tensor([4.0, 32.0])


def descend(folder: Path, **changes: Any) -> Maker:
    """Halve the distance in each step: plain gradient descent, rate ½; one step densely, two sparsely."""

    def make(model: PreTrainedModel, phase: Phase) -> Trainer:
        steps = 1 if phase == "dense" else 2
        plain = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        given = {**plain, "max_steps": steps, "per_device_train_batch_size": 1, **changes}
        data = [{"body": BODY, "head": HEAD}] * 8
        return Trainer(model=model, args=replace(arguments(PLAIN, phase, folder), **given), train_dataset=data)

    return make


def experts_of(model: Target) -> Tensor:
    experts = model.body.experts
    assert isinstance(experts, nn.Parameter)
    return experts.detach()


def test_only_the_most_changed_entries_train_and_the_head_starts_again(tmp_path: Path) -> None:
    model = Target()
    result = fine_tune(model, descend(tmp_path), count=3)
    # dense: w = t/2; the largest are −8, and of three of size 4 the first two; rewound, two steps give ¾ t
    assert experts_of(model).tolist() == [[[6.0, -12.0, 0.0]], [[0.0, 6.0, 0.0]]]
    assert result.dense["head"].tolist() == [3.0, 24.0] == model.head.tolist()
    entries = result.entries["body.experts"]
    assert entries.indices.tolist() == [0, 1, 4]
    assert entries.delta.tolist() == [6.0, -12.0, 6.0]
    assert result.masks["body.experts"].tolist() == [[[True, True, False]], [[False, True, False]]]
    assert result.shapes == {"body.experts": (2, 1, 3)}
    assert result.details["sparse phase"] == "2 steps, 1 × 1 examples a step, learning rate 0.5, L1 0, seed 7"
    assert result.count == 3


def test_a_density_is_rounded_down(tmp_path: Path) -> None:
    assert fine_tune(Target(), descend(tmp_path), density=0.49).count == 2  # 2.94 of 6


def test_what_an_iteration_cannot_share_out_evenly_goes_to_the_first(tmp_path: Path) -> None:
    model = Target()
    result = fine_tune(model, descend(tmp_path), count=3, iterations=2)
    # first: −16 and the first 8, two steps each to ¾ t; then the next 8; the earlier two go on to 15/16 t
    assert experts_of(model).tolist() == [[[7.5, -15.0, 0.0]], [[0.0, 6.0, 0.0]]]
    assert result.dense["head"].tolist() == [3.75, 30.0]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_l1_draws_back_once_a_step_whatever_the_accumulation(accumulation: int, tmp_path: Path) -> None:
    model = Target()
    make = descend(tmp_path, gradient_accumulation_steps=accumulation)
    fine_tune(model, make, count=2, sparse_l1=16.0)  # 8 entries: 2 × sign is added to the gradient
    # step 1: sign(0) = 0, w = t/2; step 2: w = ¾ t − ½ · 2 · sign
    assert experts_of(model).tolist() == [[[5.0, -11.0, 0.0]], [[0.0, 0.0, 0.0]]]
    assert model.head.tolist() == [2.0, 23.0]


def test_l1_in_the_dense_phase_changes_what_is_selected(tmp_path: Path) -> None:
    def make(model: PreTrainedModel, phase: Phase) -> Trainer:
        return descend(tmp_path, max_steps=2)(model, phase)

    # dense: ¾ t − ½ · λ/8 · sign(t); λ = 160 takes 10 off every entry: 6 → −4, −12 → −2, 0.75 → −9.25
    result = fine_tune(Target(), make, count=1, dense_l1=160.0)
    assert result.entries["body.experts"].indices.tolist() == [2]


def test_a_model_without_a_head_is_masked_whole(tmp_path: Path) -> None:
    model = Target()
    model.base_model_prefix = ""
    result = fine_tune(model, descend(tmp_path), count=2)
    # all targets in one ranking: 32 of the head and −16
    assert result.dense == {}
    assert {name: entries.indices.tolist() for name, entries in result.entries.items()} == {
        "body.experts": [1],
        "head": [1],
    }


def test_patterns_say_what_is_masked_and_what_is_held_still(tmp_path: Path) -> None:
    model = Target()
    result = fine_tune(model, descend(tmp_path), count=1, maskable=["he*"], freeze=["body.*"])
    assert experts_of(model).count_nonzero() == 0
    assert model.head.tolist() == [0.0, 24.0]
    assert (list(result.entries), result.dense) == (["head"], {})
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_all_trainers_are_made_before_training_and_no_hook_stays(tmp_path: Path) -> None:
    made: list[str] = []

    class Begins(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **others: Any) -> None:
            made.append("train")

    def make(model: PreTrainedModel, phase: Phase) -> Trainer:
        made.append(phase)
        trainer = descend(tmp_path)(model, phase)
        trainer.add_callback(Begins)
        return trainer

    model = Target()
    fine_tune(model, make, count=1, dense_l1=0.1, sparse_l1=0.1)
    assert made == ["dense", "sparse", "train", "train"]
    assert [parameter._backward_hooks for parameter in model.parameters()] == [{}, {}]


def test_the_moments_of_the_dense_phase_are_let_go(tmp_path: Path) -> None:
    moments: list[dict[Phase, int]] = []
    trainers: dict[Phase, Trainer] = {}

    class Ends(TrainerCallback):
        def on_train_end(self, *arguments: Any, **others: Any) -> None:
            made = {phase: trainer.optimizer for phase, trainer in trainers.items()}
            moments.append({phase: len(optimizer.state) if optimizer else 0 for phase, optimizer in made.items()})

    def make(model: PreTrainedModel, phase: Phase) -> Trainer:
        trainers[phase] = descend(tmp_path, optim="adamw_torch")(model, phase)
        trainers[phase].add_callback(Ends)
        return trainers[phase]

    fine_tune(Target(), make, count=1)
    assert moments == [{"dense": 2, "sparse": 0}, {"dense": 0, "sparse": 2}]


# --------------------------------------------------------------------------------------------------- masks of their own


def test_equal_changes_are_kept_in_the_order_of_tensors_and_places() -> None:
    before = {"b": torch.zeros(2, 2), "a": torch.zeros(3)}
    after = {"b": torch.tensor([[1.0, -2.0], [1.0, 0.0]]), "a": torch.tensor([-1.0, 1.0, 3.0])}
    kept = [(name, *place) for count in (2, 3, 4, 5, 6) for name, place in new_places(before, after, count)]
    # 3 and −2 first; the four of size 1 in the order in which `before` has them
    assert kept == [("b", 0, 0), ("b", 1, 0), ("a", 0), ("a", 1)]


def new_places(
    before: dict[str, Tensor], after: dict[str, Tensor], count: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give the entries that `count` has and `count − 1` has not; none for the first two."""
    if count > 2:
        more, fewer = select(before, after, count=count), select(before, after, count=count - 1)
        assert sum(int(mask.sum()) for mask in more.values()) == count
        yield from ((name, tuple(place)) for name in more for place in (more[name] & ~fewer[name]).nonzero().tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_ranking_is_one_over_all_tensors_of_any_rank(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = {"vector": (300,), "experts": (4, 30, 20), "empty": (0, 5), "matrix": (70, 40)}
    before = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    after = {name: (tensor + torch.randn(tensor.shape)).to(dtype) for name, tensor in before.items()}
    flat = torch.cat([(after[name].double() - before[name].double()).abs().view(-1) for name in shapes])
    order = sorted(range(len(flat)), key=lambda place: (-flat[place].item(), place))
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[order[:777]] = True
    masks = select(before, after, count=777)
    assert torch.equal(torch.cat([masks[name].view(-1) for name in shapes]), expected)


def test_entries_taken_earlier_stay_and_do_not_count() -> None:
    before, after = {"a": torch.zeros(4)}, {"a": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    taken = select(before, after, count=1)
    assert select(before, after, count=2, taken=taken)["a"].tolist() == [True, True, True, False]


def test_more_entries_than_changed_are_refused_with_their_number() -> None:
    with pytest.raises(merge.MergeError, match="3 entries to select, and 2 of 4 changed"):
        select({"a": torch.zeros(4)}, {"a": torch.tensor([0.0, -0.0, 1.0, 2.0])}, count=3)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_training_that_broke_down_is_refused(broken: float) -> None:
    with pytest.raises(merge.MergeError, match=r"layer\.bias: holds NaN or infinity"):
        select({"layer.bias": torch.zeros(2)}, {"layer.bias": torch.tensor([1.0, broken])}, count=1)


def test_masks_hold_for_the_context_only_and_keep_the_sign_of_zero() -> None:
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-0.0, 1.0, 2.0]]))
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    with masked(model, {"weight": torch.tensor([[False, True, False]])}):
        for _ in range(2):
            model(torch.tensor([[1.0, 1.0, -1.0]])).backward()
        assert model.weight.grad is not None
        assert model.weight.grad.tolist() == [[0.0, 2.0, 0.0]]
        optimizer.step()
    assert model.weight[0, 0].signbit()
    assert model.weight[0, 2] == 2.0
    model.zero_grad()
    model(torch.ones(1, 3)).backward()
    assert model.weight.grad.tolist() == [[1.0, 1.0, 1.0]]


def test_masks_end_where_training_fails() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt), masked(model, {"bias": torch.tensor([True, False])}):
        raise KeyboardInterrupt
    assert model.bias._backward_hooks == {}


def test_masks_that_do_not_fit_are_refused_together() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    masks = {"weigth": torch.ones(2, 2), "weight": torch.ones(4), "bias": torch.ones(2)}
    with pytest.raises(merge.MergeError) as caught, masked(model, masks):
        pass
    assert [mistake.where for mistake in caught.value.mistakes] == ["weigth", "weight", "bias"]
    assert caught.value.mistakes[0].hint == "did you mean 'weight'?"


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, "count: give either a count or a density"),
        ({"count": 1, "density": 0.5}, "count: give either a count or a density"),
        ({"count": 0}, "count: 0 entries to select\n  hint: from 1 to 6, which is how many are maskable"),
        ({"count": 7}, "count: 7 entries to select\n  hint: from 1 to 6"),
        ({"density": 0.1}, "count: 0 entries to select"),
        ({"density": 1.5}, "density: 1.5 is not a share"),
        ({"count": 1, "iterations": 2}, "count: 1 entries to select, in 2 iterations\n  hint: from 2 to 6"),
        ({"count": 1, "iterations": 0}, "iterations: 0"),
        ({"count": 1, "dense_l1": -1.0}, "L1: λ = -1.0"),
        ({"count": 1, "freeze": ["boby.*"]}, "freeze: no parameter fits 'boby.*'"),
        ({"count": 1, "maskable": ["torso.*"]}, "maskable: no parameter fits 'torso.*'"),
        ({"count": 1, "freeze": ["body.*"]}, "model: no parameter that requires a gradient is named body.*"),
        ({"count": 1, "freeze": ["*"]}, "model: every parameter is frozen"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_training(
    settings: dict[str, Any], found: str, tmp_path: Path
) -> None:
    model = Target()
    with pytest.raises(merge.MergeError) as caught:
        fine_tune(model, descend(tmp_path), **settings)
    assert found in str(caught.value)
    assert experts_of(model).count_nonzero() == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weight_decay_is_refused_where_it_meets_a_mask(tmp_path: Path) -> None:
    with pytest.raises(merge.MergeError, match=r"sparse phase: weight decay on body\.experts\n"):
        fine_tune(Target(), descend(tmp_path, weight_decay=0.1), count=1)

    def make(model: PreTrainedModel, phase: Phase) -> Trainer:
        trainer = descend(tmp_path)(model, phase)
        trainer.optimizer = torch.optim.AdamW(model.parameters())  # torch's own default decays by 0.01
        return trainer

    with pytest.raises(merge.MergeError, match=r"dense phase: weight decay on body\.experts\n"):
        fine_tune(Target(), make, count=1)


def test_weight_decay_on_the_head_alone_is_allowed(tmp_path: Path) -> None:
    def make(model: PreTrainedModel, phase: Phase) -> Trainer:
        assert isinstance(model, Target)
        body, head = {"params": [model.body.experts]}, {"params": [model.head], "weight_decay": 0.5}
        trainer = descend(tmp_path)(model, phase)
        trainer.optimizer = torch.optim.SGD([body, head], lr=0.5)
        return trainer

    result = fine_tune(Target(), make, count=1)
    # w ← w − ½ (w − t + ½ w) = ¼ w + ½ t: ½ t, then ⅝ t
    assert result.dense["head"].tolist() == [2.5, 20.0]


def test_trainers_that_would_not_keep_to_the_masks_are_refused(tmp_path: Path) -> None:
    make, other = descend(tmp_path), Target()
    with pytest.raises(merge.MergeError, match="dense phase: trains another model"):
        fine_tune(Target(), lambda _, phase: make(other, phase), count=1)
    model = Target()
    one = make(model, "dense")
    with pytest.raises(merge.MergeError, match="gives one trainer twice"):
        fine_tune(model, lambda _, phase: one, count=1)

    def sharded(model: PreTrainedModel, phase: Phase) -> Trainer:
        trainer = make(model, phase)
        trainer.is_fsdp_enabled = phase == "sparse"
        trainer.args.fp16 = phase == "dense"
        return trainer

    with pytest.raises(merge.MergeError) as caught:
        fine_tune(Target(), sharded, count=1, dense_l1=0.1)
    assert [mistake.what for mistake in caught.value.mistakes] == [
        "fp16 scales the gradients, and L1's would not be",
        "shards the parameters",
    ]


def test_fewer_changed_entries_than_asked_for_are_refused_after_the_dense_phase(tmp_path: Path) -> None:
    with pytest.raises(merge.MergeError, match="6 entries to select, and 5 of 6 changed"):
        fine_tune(Target(), descend(tmp_path), count=6)


def test_weights_moved_outside_the_masks_are_noticed(tmp_path: Path) -> None:
    class Nudge(TrainerCallback):
        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            experts_of(others["model"])[1, 0, 0] += 1e-6

    def make(model: PreTrainedModel, phase: Phase) -> Trainer:
        trainer = descend(tmp_path)(model, phase)
        trainer.add_callback(Nudge)
        return trainer

    with pytest.raises(merge.MergeError, match=r"moved entries outside the masks: body\.experts"):
        fine_tune(Target(), make, count=1)


def test_a_sparse_phase_that_broke_down_is_refused(tmp_path: Path) -> None:
    def make(model: PreTrainedModel, phase: Phase) -> Trainer:
        return descend(tmp_path, learning_rate=0.5 if phase == "dense" else 1e38)(model, phase)

    with pytest.raises(merge.MergeError, match="head: holds NaN or infinity after training"):
        fine_tune(Target(), make, count=1)


def test_parameters_that_the_base_does_not_hold_are_refused_before_training(
    tmp_path: Path, save_llama: SaveLlama
) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(save_llama("base", num_hidden_layers=2))
    base = merge.open(save_llama("shallow", num_hidden_layers=1, vocab_size=44))

    def never(model: PreTrainedModel, phase: Phase) -> Trainer:
        raise AssertionError("made a trainer")

    with pytest.raises(merge.MergeError) as caught:
        fine_tune(model, never, count=1, base=base)
    wheres = {mistake.where for mistake in caught.value.mistakes}
    assert "model.embed_tokens.weight" in wheres
    assert "model.layers.1.mlp.up_proj.weight" in wheres
    assert len(wheres) == 1 + 9


def test_the_base_may_spell_the_names_without_the_models_prefix(tmp_path: Path) -> None:
    bert = load_model(PLAIN)
    bert.base_model.save_pretrained(tmp_path / "headless")
    base = merge.open(tmp_path / "headless")
    shapes = {name: tuple(p.shape) for name, p in bert.named_parameters() if name.startswith("bert.")}
    names = names_in(base, shapes)
    assert names == {name: name.removeprefix("bert.") for name in shapes}


# --------------------------------------------------------------------------------------------------------------- saving


def test_what_is_saved_is_added_to_the_base_as_it_was_trained(tmp_path: Path, save_llama: SaveLlama) -> None:
    base = merge.open(save_llama("base", num_hidden_layers=2))
    model = base.to_model()
    text = torch.randint(3, 40, (24, 8), generator=torch.Generator().manual_seed(0))

    def make(model: PreTrainedModel, phase: Phase) -> Trainer:
        given = replace(arguments(PLAIN, phase, tmp_path), max_steps=2)
        return Trainer(model=model, args=given, train_dataset=[{"input_ids": t, "labels": t} for t in text])

    fine_tune(model, make, count=50, freeze=["*norm*"], base=base).save(tmp_path / "tuned", base)
    tuned = merge.open_sparse(tmp_path / "tuned")
    assert (tuned.count, tuned.dense, tuned.details["method"]) == (50, ("lm_head.weight",), "LT-SFT")
    composed = compositions.sparse_fine_tune(base=base, diffs=[tuned])
    for name, parameter in model.named_parameters():  # base + (final − base) may be off by a rounding
        torch.testing.assert_close(composed[name], parameter.detach(), rtol=0, atol=1e-7)
        still = parameter.detach() == base[name]
        assert torch.equal(composed[name][still], base[name][still])


def test_the_example_trains_both_sparse_fine_tunes(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "train_sparse.py"
    command = [sys.executable, str(script), str(tmp_path), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["task", "language"]
    tuned = [merge.open_sparse(tmp_path / name) for name in ("task", "language")]
    assert [one.count for one in tuned] == [26465, 26465]  # 0.08 of 330,816
    assert [one.dense for one in tuned] == [(), ()]
