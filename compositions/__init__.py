"""Which tensors meet: compositions take checkpoints and give a checkpoint, nothing read until it is asked for."""

from .composition import Composition, composition
from .layer_swap import Ends, Zone, layer_swap
from .tensorwise import Rule, tensorwise

__all__ = ["Composition", "Ends", "Rule", "Zone", "composition", "layer_swap", "tensorwise"]
