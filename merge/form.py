"""What a result is on disk: the file of its weights, and what its model card says of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WHOLE_MODEL = "model.safetensors"


@dataclass(frozen=True)
class Form:
    """The layout of a result's folder.

    Attributes:
        weights: the name of the weight file; only that of a model is cut in shards, which have an index.
        metadata: what the header of the weight file says beside the tensors.
        library: the library that loads the folder, `library_name` on the Hub.
        title: what the model card calls it.
        folders: tensor → the sub-folder where it lies, in a weight file of that name; without one, beside the card.

    """

    weights: str = WHOLE_MODEL
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    library: str = "transformers"
    title: str = "A merged model"
    folders: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_model(self) -> bool:
        """Tell whether it is a model, and not something to be added to one."""
        return self.weights == WHOLE_MODEL


MODEL = Form()
