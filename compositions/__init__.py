"""Which tensors meet: compositions take checkpoints and give a checkpoint, nothing read until it is asked for."""

from typing import TYPE_CHECKING

from portmanteau.merge.on_demand import on_demand

if TYPE_CHECKING:
    from . import training
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

_HOMES = {  # of the names that live in a file of another name
    "Changes": "reports.rows",
    "Comparison": "reports.rows",
    "Composition": "composition",
    "Ends": "zones",
    "Exponential": "average",
    "Meetings": "reports.rows",
    "Overlap": "overlap",
    "Preflight": "preflight",
    "Recipe": "recipe.reading",
    "RowOf": "vocabulary.row_maps",
    "Rule": "tensorwise",
    "Slice": "slices",
    "Soup": "greedy_soup",
    "Term": "sparse_fine_tune",
    "TokenRule": "vocabulary.row_maps",
    "Try": "greedy_soup",
    "Zone": "zones",
    "accumulative_averages": "average",
    "changes": "reports.comparison",
    "compare": "reports.comparison",
    "load": "recipe.reading",
    "measured_by": "metric_command",
    "overlaps": "overlap",
    "with_vocabulary": "vocabulary.shared",
}
on_demand(__name__, {name: _HOMES.get(name, name) for name in __all__})
