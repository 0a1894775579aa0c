"""Which tensors meet: compositions take checkpoints and give a checkpoint, nothing read until it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .assemble import assemble
from .average import Exponential, accumulative_averages, average
from .average_adapters import average_adapters
from .compose import compose
from .composition import Composition, composition
from .emr_task import emr_task
from .extract_lora import extract_lora
from .extract_sparse import extract_sparse
from .fisher import fisher
from .greedy_soup import Soup, Try, greedy_soup
from .layer_swap import layer_swap
from .lora import lora
from .metric_command import measured_by
from .overlap import Overlap, overlaps
from .preflight import Preflight, preflight
from .rebuilt import rebuilt
from .recipe.reading import Recipe, load
from .reports.comparison import changes, compare
from .reports.rows import Changes, Comparison, Meetings
from .revert_sparse import revert_sparse
from .slices import Slice, slices
from .sparse_fine_tune import Term, sparse_fine_tune
from .stack_adapters import stack_adapters
from .swap_lora import swap_lora
from .tensorwise import Rule, tensorwise
from .vocabulary.row_maps import RowOf, TokenRule
from .vocabulary.shared import with_vocabulary
from .zones import Ends, Zone

if TYPE_CHECKING:
    from . import training
else:

    def __getattr__(name: str) -> Any:
        """Import `training` when it is asked for: no command needs it."""
        if name == "training":
            return import_module(".training", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Changes",
    "Comparison",
    "Composition",
    "Ends",
    "Exponential",
    "Meetings",
    "Overlap",
    "Preflight",
    "Recipe",
    "RowOf",
    "Rule",
    "Slice",
    "Soup",
    "Term",
    "TokenRule",
    "Try",
    "Zone",
    "accumulative_averages",
    "assemble",
    "average",
    "average_adapters",
    "changes",
    "compare",
    "compose",
    "composition",
    "emr_task",
    "extract_lora",
    "extract_sparse",
    "fisher",
    "greedy_soup",
    "layer_swap",
    "load",
    "lora",
    "measured_by",
    "overlaps",
    "preflight",
    "rebuilt",
    "revert_sparse",
    "slices",
    "sparse_fine_tune",
    "stack_adapters",
    "swap_lora",
    "tensorwise",
    "training",
    "with_vocabulary",
]
