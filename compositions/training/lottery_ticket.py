"""Lottery-ticket sparse fine-tuning: train densely, keep the entries that changed most, rewind, train only those.

Ansell et al. 2021 (arXiv 2110.07560); code: `lt_sft.py` of github.com/cambridgeltl/composable-sft at 29f7872.
Training is no composition: it makes the sparse fine-tunings that a recipe composes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from portmanteau.merge import Checkpoint, MergeError
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import matches

from .masks import BROKEN, LOWER, masked, select
from .sparse_result import Entries, SparseFineTuning, names_in

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, Trainer

Phase = Literal["dense", "sparse"]
MakeTrainer = Callable[["PreTrainedModel", Phase], "Trainer"]
Tensors = dict[str, "Tensor"]


def fine_tune(
    model: PreTrainedModel,
    make_trainer: MakeTrainer,
    *,
    count: int | None = None,
    density: float | None = None,
    maskable: Sequence[str] = (),
    freeze: Sequence[str] = (),
    iterations: int = 1,
    dense_l1: float = 0.0,
    sparse_l1: float = 0.0,
    base: Checkpoint | None = None,
) -> SparseFineTuning:
    """Train a sparse fine-tuning of the model; the model itself ends with the trained weights.

    Each iteration: (1) a dense phase trains every parameter that requires a gradient; (2) of the maskable entries those
    that changed most are selected, in one ranking over all tensors (see `select`); (3) every parameter is set back to
    where the iteration began; (4) a sparse phase trains the selected entries, and those of earlier iterations. What
    requires a gradient and is not maskable (a head) is trained whole in both phases, and kept whole.

    All trainers are made before training begins, so that what is wrong with them is found then.

    >>> from portmanteau import merge
    >>> from transformers import PrinterCallback, Trainer, TrainingArguments
    >>> rows = [{"input_ids": [1, 5, 6, 7], "labels": [1, 5, 6, 7]}] * 8
    >>> def make_trainer(model, phase):
    ...     settings = TrainingArguments(phase, max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True)
    ...     trainer = Trainer(model, settings, train_dataset=rows)
    ...     trainer.remove_callback(PrinterCallback)  # which would print the losses here
    ...     return trainer
    >>> base = merge.open("examples/models/base")
    >>> tuned = fine_tune(base.to_model(), make_trainer, count=100, freeze=["*norm*", "lm_head.*"], base=base)
    >>> tuned.count
    100
    >>> tuned.save("task-sparse", base)
    >>> merge.open_sparse("task-sparse").count  # what sparse_fine_tune adds to the base
    100

    Args:
        model: where training starts. A language's sparse fine-tuning is applied beforehand, if there is one.
        make_trainer: gives a stock Trainer of this model for a phase: at each call a new one, with an optimizer of its
            own, without weight decay. Phases that save snapshots need an `output_dir` each.
        count: how many entries to select.
        density: the same as a share of the maskable entries, rounded down.
        maskable: patterns of names to mask, among the parameters that require a gradient. By default those below the
            model's `base_model_prefix`; in a model without a head, all.
        freeze: patterns of names to hold still meanwhile, such as `*LayerNorm*`.
        iterations: how often; each selects its share of the count.
        dense_l1: λ in the dense phase: adds λ/N · Σ |θ − θ0| to the loss, once for each optimizer step. The sum runs
            over all entries that train, the head's too; θ0 is where training started; N counts the entries of all
            parameters. (The published code means the same and adds nothing: its θ0 is not detached from θ.)
        sparse_l1: λ in the sparse phase.
        base: the checkpoint that the result will be added to: it has to hold every maskable parameter.

    Raises MergeError before training for settings that do not fit, for trainers that would not keep to the masks, and
    for maskable parameters that the base does not hold; after the dense phase, where fewer entries changed than are to
    be selected.

    """
    with _frozen(model, freeze):
        sparse, dense = _divided(model, maskable)
        shapes = {name: tuple(parameter.shape) for name, parameter in sparse.items()}
        if base is not None:
            names_in(base, shapes)
        entries = sum(parameter.numel() for parameter in sparse.values())
        shares = _shares(_wanted(count, density, entries), entries, iterations)
        strength: dict[Phase, float] = {"dense": dense_l1, "sparse": sparse_l1}
        trainers = [(make_trainer(model, "dense"), make_trainer(model, "sparse")) for _ in shares]
        _check_trainers(model, trainers, sparse, strength)
        details: dict[str, Any] = {
            f"{phase} phase": _described(trainer, strength[phase])
            for phase, trainer in zip(strength, trainers[0], strict=True)
        }
        training = _Training(model, tuple(sparse), _copies(model), strength)
        masks: Tensors = {}
        for share in shares:
            masks = training.iterate(*trainers.pop(0), share, masks)
        training.check(masks)
    details |= {"method": "LT-SFT", "maskable entries": entries, "iterations": iterations, "freeze": " ".join(freeze)}
    return SparseFineTuning(
        {name: Entries.under(masks[name], training.start[name], parameter) for name, parameter in sparse.items()},
        {name: parameter.detach().cpu().clone() for name, parameter in dense.items()},
        shapes,
        {key: str(value) for key, value in details.items()},
    )


@dataclass(frozen=True)
class _Training:
    """A model in training: which of its parameters are masked, and where all of them started."""

    model: PreTrainedModel
    sparse: tuple[str, ...]
    start: Tensors
    strength: Mapping[Phase, float]

    def iterate(self, dense: Trainer, sparse: Trainer, count: int, taken: Tensors) -> Tensors:
        """Train densely, select, rewind, train sparsely; give the masks, those taken earlier among them."""
        parameters = dict(self.model.named_parameters())
        began = _copies(self.model) if taken else self.start
        with _drawn_back(dense, self.start, self.strength["dense"]):
            dense.train()
        if dense.optimizer is not None:
            dense.optimizer.state.clear()  # Adam's moments are twice the model; the sparse phase makes its own
        before = {name: self.start[name] for name in self.sparse}
        masks = select(before, {name: parameters[name] for name in self.sparse}, count=count, taken=taken)
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.data.copy_(began[name])
        with _drawn_back(sparse, self.start, self.strength["sparse"]), masked(self.model, masks):
            sparse.train()
        return masks

    def check(self, masks: Tensors) -> None:
        """Refuse what broke down; compare every entry that was not to train with where it started, byte by byte."""
        moved = []
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not parameter.isfinite().all():
                raise MergeError(name, BROKEN, LOWER)
            if name in masks or not parameter.requires_grad:
                differs = _bits(parameter.detach().cpu()) != _bits(self.start[name])
                if (differs & ~masks[name] if name in masks else differs).any():
                    moved.append(name)
        if moved:
            hint = "the Trainer's optimizer, or one of its callbacks, moves weights that have no gradient"
            raise MergeError("make_trainer", f"training moved entries outside the masks: {some(moved)}", hint)


def _copies(model: nn.Module) -> Tensors:
    """Copy all parameters to the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


def _bits(tensor: Tensor) -> Tensor:
    """See the entries as integers of the same bits, so that −0 differs from 0."""
    import torch

    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])


# -------------------------------------------------------------------------------------------------- what is trained how


@contextmanager
def _frozen(model: nn.Module, patterns: Sequence[str]) -> Iterator[None]:
    """Hold still the parameters that the patterns name, while the context lasts."""
    parameters = dict(model.named_parameters())
    _check_patterns("freeze", patterns, parameters)
    held = [p for n, p in parameters.items() if p.requires_grad and any(matches(pattern, n) for pattern in patterns)]
    for parameter in held:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


def _check_patterns(where: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Refuse patterns that fit no name."""
    known = list(names)
    idle = [pattern for pattern in patterns if not any(matches(pattern, name) for name in known)]
    if idle:
        hint = f"known: {some(known)}"
        raise MergeError.of(Mistake(where, f"no parameter fits {pattern!r}", hint) for pattern in idle)


def _divided(
    model: PreTrainedModel, patterns: Sequence[str]
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Divide the parameters that require a gradient into those to be masked and those to be trained whole."""
    training = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _check_patterns("maskable", patterns, training)
    below = "*" if model.base_model is model else f"{model.base_model_prefix}.*"
    chosen = {name for name in training if any(matches(pattern, name) for pattern in patterns or (below,))}
    if not chosen:
        what = f"no parameter that requires a gradient is named {below}" if training else "every parameter is frozen"
        raise MergeError("model", what, "`maskable` names parameters by patterns")
    return (
        {name: parameter for name, parameter in training.items() if name in chosen},
        {name: parameter for name, parameter in training.items() if name not in chosen},
    )


def _wanted(count: int | None, density: float | None, entries: int) -> int:
    """Give the number of entries to select."""
    if count is None and density is not None:
        if not 0 < density <= 1:
            raise MergeError("density", f"{density} is not a share", "above 0, at most 1")
        return int(density * entries)
    if count is None or density is not None:
        raise MergeError("count", "give either a count or a density", f"{entries:,} entries are maskable")
    return count


def _shares(count: int, entries: int, iterations: int) -> list[int]:
    """Share the count out over the iterations; the first ones get what is left over."""
    if iterations < 1:
        raise MergeError("iterations", f"{iterations}, and training needs at least one")
    if not iterations <= count <= entries:
        each = "" if iterations == 1 else f", in {iterations} iterations"
        hint = f"from {iterations:,} to {entries:,}, which is how many are maskable"
        raise MergeError("count", f"{count:,} entries to select{each}", hint)
    return [count // iterations + (number < count % iterations) for number in range(iterations)]


# ------------------------------------------------------------------------------------------------------------- trainers


def _check_trainers(
    model: PreTrainedModel,
    trainers: Sequence[tuple[Trainer, Trainer]],
    sparse: Mapping[str, nn.Parameter],
    strength: Mapping[Phase, float],
) -> None:
    """Refuse trainers that would train something else, or would not keep to the masks."""
    every = [trainer for pair in trainers for trainer in pair]
    mistakes = [Mistake("L1", f"λ = {value}", "0 or more") for value in strength.values() if not value >= 0]
    if len({id(trainer) for trainer in every}) < len(every):
        mistakes.append(Mistake("make_trainer", "gives one trainer twice", "each phase needs a fresh one"))
    for pair in trainers:
        for phase, trainer in zip(strength, pair, strict=True):
            mistakes += _mistakes(model, trainer, phase, sparse, strength[phase])
    if mistakes:
        raise MergeError.of(mistakes)


def _mistakes(
    model: PreTrainedModel, trainer: Trainer, phase: Phase, sparse: Mapping[str, nn.Parameter], strength: float
) -> Iterator[Mistake]:
    where = f"make_trainer, {phase} phase"
    if trainer.model is not model:
        yield Mistake(where, "trains another model", "make it with the model that it is given")
        return
    if decayed := _decayed(trainer, model, sparse):
        hint = "weight decay moves every entry, outside the masks too: set it to 0 for them"
        yield Mistake(where, f"weight decay on {some(decayed)}", hint)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        yield Mistake(where, "shards the parameters", "masks need whole parameters: train without FSDP and DeepSpeed")
    if strength and trainer.args.fp16:
        yield Mistake(where, "fp16 scales the gradients, and L1's would not be", "train in bf16 or fp32, or without L1")


def _described(trainer: Trainer, strength: float) -> str:
    """Say in short how a trainer trains, for the result's details."""
    given = trainer.args
    length = f"{given.max_steps} steps" if given.max_steps > 0 else f"{given.num_train_epochs:g} epochs"
    batch = f"{given.per_device_train_batch_size} × {given.gradient_accumulation_steps} examples a step"
    return f"{length}, {batch}, learning rate {given.learning_rate:g}, L1 {strength:g}, seed {given.seed}"


def _decayed(trainer: Trainer, model: nn.Module, sparse: Mapping[str, nn.Parameter]) -> list[str]:
    """Name the maskable parameters that the trainer's optimizer decays, or will."""
    if trainer.optimizer is None:
        names = set(trainer.get_decay_parameter_names(model)) if trainer.args.weight_decay else set()
        return [name for name in sparse if name in names]
    groups = [group for group in trainer.optimizer.param_groups if group.get("weight_decay")]
    decayed = {id(parameter) for group in groups for parameter in group["params"]}
    return [name for name, parameter in sparse.items() if id(parameter) in decayed]


@contextmanager
def _drawn_back(trainer: Trainer, start: Tensors, strength: float) -> Iterator[None]:
    """Draw training back to its start by L1: adds λ/N · sign(θ − θ0) to the gradients, once for each optimizer step.

    In the first backward pass of the step, by gradient hooks; a callback says when a step begins. N counts the entries
    of all parameters. Entered before masks, so that they hold for L1 too.
    """
    if not strength:
        yield
        return
    from transformers import TrainerCallback

    model: Any = trainer.model
    parameters: dict[str, Any] = {n: parameter for n, parameter in model.named_parameters() if parameter.requires_grad}
    weight = strength / sum(parameter.numel() for parameter in model.parameters())
    due: set[str] = set()

    class StepBegins(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **others: Any) -> None:
            due.update(parameters)

    def hook(name: str) -> Callable[[Tensor], Tensor]:
        parameter: Tensor = parameters[name]
        reference = start[name].to(parameter.device)

        def draw(gradient: Tensor) -> Tensor:
            if name not in due:
                return gradient
            due.remove(name)
            return gradient.add((parameter.detach() - reference).sign(), alpha=weight)

        return draw

    trainer.add_callback(StepBegins)
    hooks = [parameter.register_hook(hook(name)) for name, parameter in parameters.items()]
    try:
        yield
    finally:
        trainer.remove_callback(StepBegins)
        for each in hooks:
            each.remove()
