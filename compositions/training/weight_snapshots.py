"""Snapshots of a model's weights while it is trained, as checkpoint averaging reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from portmanteau.merge import MergeError, OutputError
from portmanteau.merge.errors import Mistake
from portmanteau.merge.results.output import published

if TYPE_CHECKING:
    from transformers import TrainerCallback


def weight_snapshots(
    folder: str | Path, *, every_steps: int | None = None, every_epochs: int | None = None, tokenizer: Any = None
) -> TrainerCallback:
    """Make the callback that saves the weights every so many optimizer steps, or epochs, without optimizer states.

    A snapshot is a folder `checkpoint-STEP` with safetensors, config, tokenizer where one is given, and
    `trainer_state.json`; `average: {models: FOLDER/checkpoint-*}` reads them in the order of their steps. It appears by
    one rename when it is whole. The loss is logged at every snapshot, so that its `trainer_state.json` has it.

    >>> from portmanteau import merge
    >>> from transformers import PrinterCallback, Trainer, TrainingArguments
    >>> model, row = merge.open("examples/models/base").to_model(), [1, 5, 6, 7]
    >>> settings = TrainingArguments("trainer", max_steps=4, save_strategy="no", report_to="none", disable_tqdm=True)
    >>> rows = [{"input_ids": row, "labels": row}] * 8
    >>> trainer = Trainer(model, settings, train_dataset=rows, callbacks=[weight_snapshots("run", every_steps=2)])
    >>> trainer.remove_callback(PrinterCallback)  # which would print the losses here
    >>> output = trainer.train()
    >>> sorted(path.name for path in Path("run").iterdir())
    ['checkpoint-2', 'checkpoint-4']

    Args:
        folder: where snapshots go; not the Trainer's own `output_dir`, whose checkpoints have the same names.
        every_steps: save after every so many steps.
        every_epochs: save after every so many epochs.
        tokenizer: whatever has `save_pretrained`, saved with every snapshot.

    Raises MergeError for other than one of the two numbers; as the training begins OutputError for a folder that
    holds snapshots of another run, and MergeError for sharded weights.

    """
    from transformers import TrainerCallback

    if (every_steps is None) == (every_epochs is None) or (every_steps or every_epochs or 0) < 1:
        raise MergeError("every_steps", "say either every_steps or every_epochs, a number from 1 on")
    place = Path(folder)

    class WeightSnapshots(TrainerCallback):
        """Saves once the loss of the step has been logged."""

        def __init__(self) -> None:
            self._due = False
            self._epochs = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            """Refuse a place where snapshots would be mixed up."""
            _refuse(place, args, resumed=state.global_step > 0)
            self._epochs = int((state.epoch or 0) + 1e-6)  # whole ones; the share of one is a sum of fractions

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            """Ask for the loss, which the Trainer logs next."""
            if every_steps is not None and state.global_step % every_steps == 0:
                self._due = control.should_log = True

        def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            """Save where this step's loss is logged already, else ask for it."""
            self._epochs += 1
            if every_epochs is not None and self._epochs % every_epochs == 0:
                self._due = control.should_log = True
                if any(row["step"] == state.global_step and "loss" in row for row in state.log_history):
                    self.on_log(args, state, control, **others)

        def on_log(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            """Save the snapshot that is due."""
            if self._due and state.is_world_process_zero:
                with published(place / f"checkpoint-{state.global_step}") as work:
                    others["model"].save_pretrained(work.result)
                    if tokenizer is not None:
                        tokenizer.save_pretrained(work.result)
                    state.save_to_json(str(work.result / "trainer_state.json"))
            self._due = False

    return WeightSnapshots()


def _refuse(folder: Path, args: Any, *, resumed: bool) -> None:
    """Refuse a folder whose checkpoints are others', and weights that no process holds whole."""
    if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
        raise MergeError.of(
            [Mistake("", "weights sharded by DeepSpeed or FSDP are not saved", "save with the Trainer")]
        )
    if folder.resolve() == Path(args.output_dir).resolve():
        hint = "the Trainer resumes from what is called checkpoint-* there, and removes it"
        raise OutputError(str(folder), "is the Trainer's own output_dir", f"{hint}: choose another folder")
    if not resumed and any(folder.glob("checkpoint-*")):
        hint = "averaging would mix two runs: choose another folder, or remove them"
        raise OutputError(str(folder), "holds snapshots of an earlier run", hint)
