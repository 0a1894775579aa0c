"""A checkpoint as a transformers model in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .checkpoint import Checkpoint
from .companions import true_config
from .errors import CheckpointError, some

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def to_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """Make the model that the config names, with every tensor of the checkpoint loaded.

    Raises CheckpointError where there is no config, or where names are missing in the model or in the checkpoint.
    """
    import transformers

    if checkpoint.companions.config is None:
        raise CheckpointError(checkpoint.label, "has no config.json, so the kind of model is not known")
    fields = true_config(checkpoint.companions.config, checkpoint.specs.values())
    config = transformers.AutoConfig.for_model(**fields)
    names = fields.get("architectures") or ["AutoModel"]
    kind = getattr(transformers, names[0], transformers.AutoModel)
    state = {name: checkpoint.read(name) for name in checkpoint.specs}
    model, report = kind.from_pretrained(
        None,  # type: ignore[arg-type]  # from a state dict alone
        config=config,
        state_dict=state,
        dtype=config.dtype,
        output_loading_info=True,
    )
    if report["missing_keys"] or report["unexpected_keys"]:
        names = sorted([*report["missing_keys"], *report["unexpected_keys"]])
        raise CheckpointError(checkpoint.label, f"does not fit {kind.__name__}: {some(names)}")
    found: PreTrainedModel = model.eval()
    return found
