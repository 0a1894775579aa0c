"""Which tensors meet: compositions take checkpoints and give a checkpoint, nothing read until it is asked for."""

from .average import Exponential, average
from .average_adapters import average_adapters
from .changes import Changes, changes
from .compose import compose
from .composition import Composition, composition
from .layer_swap import layer_swap
from .lora import lora
from .recipe import Recipe, load
from .stack_adapters import stack_adapters
from .tensorwise import Rule, tensorwise
from .zones import Ends, Zone

__all__ = [
    "Changes",
    "Composition",
    "Ends",
    "Exponential",
    "Recipe",
    "Rule",
    "Zone",
    "average",
    "average_adapters",
    "changes",
    "compose",
    "composition",
    "layer_swap",
    "load",
    "lora",
    "stack_adapters",
    "tensorwise",
]
