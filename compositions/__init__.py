"""Which tensors meet: compositions take checkpoints and give a checkpoint, nothing read until it is asked for."""

from .average import Exponential, average
from .changes import Changes, changes
from .compose import compose
from .composition import Composition, composition
from .extract_lora import extract_lora
from .layer_swap import layer_swap
from .lora import lora
from .recipe import Recipe, load
from .swap_lora import swap_lora
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
    "changes",
    "compose",
    "composition",
    "extract_lora",
    "layer_swap",
    "load",
    "lora",
    "swap_lora",
    "tensorwise",
]
