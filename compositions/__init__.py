"""Which tensors meet: compositions take checkpoints and give a checkpoint, nothing read until it is asked for."""

from .assemble import assemble
from .average import Exponential, accumulative_averages, average
from .changes import Changes, changes
from .compose import compose
from .composition import Composition, composition
from .extract_sparse import extract_sparse
from .fisher import fisher
from .freezing import Partition, freeze_head, freeze_layers
from .greedy_soup import Soup, Try, greedy_soup
from .layer_swap import layer_swap
from .lora import lora
from .metric_command import measured_by
from .overlap import Overlap, overlaps
from .partition_turns import Interleaved, Turns, partition_turns
from .recipe import Recipe, load
from .revert_sparse import revert_sparse
from .slices import Slice, slices
from .sparse_fine_tune import Term, sparse_fine_tune
from .tensorwise import Rule, tensorwise
from .weight_snapshots import weight_snapshots
from .zones import Ends, Zone

__all__ = [
    "Changes",
    "Composition",
    "Ends",
    "Exponential",
    "Interleaved",
    "Overlap",
    "Partition",
    "Recipe",
    "Rule",
    "Slice",
    "Soup",
    "Term",
    "Try",
    "Turns",
    "Zone",
    "accumulative_averages",
    "assemble",
    "average",
    "changes",
    "compose",
    "composition",
    "extract_sparse",
    "fisher",
    "freeze_head",
    "freeze_layers",
    "greedy_soup",
    "layer_swap",
    "load",
    "lora",
    "measured_by",
    "overlaps",
    "partition_turns",
    "revert_sparse",
    "slices",
    "sparse_fine_tune",
    "tensorwise",
    "weight_snapshots",
]
