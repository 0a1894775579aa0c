"""Which tensors meet: compositions take checkpoints and give a checkpoint, nothing read until it is asked for."""

from .average import Exponential, average
from .average_adapters import average_adapters
from .changes import Changes, changes
from .compose import compose
from .composition import Composition, composition
from .extract_sparse import extract_sparse
from .layer_swap import layer_swap
from .lora import lora
from .overlap import Overlap, overlaps
from .recipe import Recipe, load
from .revert_sparse import revert_sparse
from .sparse_fine_tune import Term, sparse_fine_tune
from .stack_adapters import stack_adapters
from .tensorwise import Rule, tensorwise
from .zones import Ends, Zone

__all__ = [
    "Changes",
    "Composition",
    "Ends",
    "Exponential",
    "Overlap",
    "Recipe",
    "Rule",
    "Term",
    "Zone",
    "average",
    "average_adapters",
    "changes",
    "compose",
    "composition",
    "extract_sparse",
    "layer_swap",
    "load",
    "lora",
    "overlaps",
    "revert_sparse",
    "sparse_fine_tune",
    "stack_adapters",
    "tensorwise",
]
