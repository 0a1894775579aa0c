"""With a stock Trainer: what makes the models, snapshots and sparse fine-tunes that recipes put together."""

from . import lottery_ticket
from .freezing import Partition, freeze_head, freeze_layers
from .partition_turns import Interleaved, Turns, partition_turns
from .weight_snapshots import weight_snapshots

__all__ = [
    "Interleaved",
    "Partition",
    "Turns",
    "freeze_head",
    "freeze_layers",
    "lottery_ticket",
    "partition_turns",
    "weight_snapshots",
]
