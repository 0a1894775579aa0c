"""Which tensors meet: compositions take checkpoints and give a checkpoint, nothing read until it is asked for."""

from .average import Exponential, accumulative_averages, average
from .changes import Changes, changes
from .compose import compose
from .composition import Composition, composition
from .freezing import Partition, freeze_head, freeze_layers
from .greedy_soup import Soup, Try, greedy_soup
from .layer_swap import layer_swap
from .lora import lora
from .metric_command import measured_by
from .partition_turns import Interleaved, Turns, partition_turns
from .recipe import Recipe, load
from .tensorwise import Rule, tensorwise
from .weight_snapshots import weight_snapshots
from .zones import Ends, Zone

__all__ = [
    "Changes",
    "Composition",
    "Ends",
    "Exponential",
    "Interleaved",
    "Partition",
    "Recipe",
    "Rule",
    "Soup",
    "Try",
    "Turns",
    "Zone",
    "accumulative_averages",
    "average",
    "changes",
    "compose",
    "composition",
    "freeze_head",
    "freeze_layers",
    "greedy_soup",
    "layer_swap",
    "load",
    "lora",
    "measured_by",
    "partition_turns",
    "tensorwise",
    "weight_snapshots",
]
