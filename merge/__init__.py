"""How tensors are merged and where their bytes are: checkpoints, operators, plans, and the writing of results."""

from typing import TYPE_CHECKING

from .on_demand import on_demand

if TYPE_CHECKING:
    from . import operators
    from .adapters.adapter import Adapter, open_adapter
    from .adapters.bottleneck import Bottleneck, open_bottleneck
    from .building import build
    from .checkpoint import Checkpoint
    from .composed import Composed
    from .errors import CheckpointError, MergeError, OutputError, PortmanteauError, RecipeError
    from .in_memory import InMemory
    from .node import Source, Step, Survey
    from .operator import Operator, operator
    from .plan import Plan, make_plan
    from .progress import Progress
    from .receipt import Receipt
    from .results.verify import Verified, verify
    from .sparse.file import SparseFineTune, open_sparse
    from .stored import StoredCheckpoint, open
    from .surveyed import Surveyed
    from .tensor_spec import TensorSpec

__all__ = [
    "Adapter",
    "Bottleneck",
    "Checkpoint",
    "CheckpointError",
    "Composed",
    "InMemory",
    "MergeError",
    "Operator",
    "OutputError",
    "Plan",
    "PortmanteauError",
    "Progress",
    "Receipt",
    "RecipeError",
    "Source",
    "SparseFineTune",
    "Step",
    "StoredCheckpoint",
    "Survey",
    "Surveyed",
    "TensorSpec",
    "Verified",
    "build",
    "make_plan",
    "open",
    "open_adapter",
    "open_bottleneck",
    "open_sparse",
    "operator",
    "operators",
    "verify",
]

_HOMES = {  # of the names that live in a file of another name
    "Adapter": "adapters.adapter",
    "Bottleneck": "adapters.bottleneck",
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "Composed": "composed",
    "InMemory": "in_memory",
    "MergeError": "errors",
    "Operator": "operator",
    "OutputError": "errors",
    "Plan": "plan",
    "PortmanteauError": "errors",
    "Progress": "progress",
    "Receipt": "receipt",
    "RecipeError": "errors",
    "Source": "node",
    "SparseFineTune": "sparse.file",
    "Step": "node",
    "StoredCheckpoint": "stored",
    "Survey": "node",
    "Surveyed": "surveyed",
    "TensorSpec": "tensor_spec",
    "Verified": "results.verify",
    "build": "building",
    "make_plan": "plan",
    "open": "stored",
    "open_adapter": "adapters.adapter",
    "open_bottleneck": "adapters.bottleneck",
    "open_sparse": "sparse.file",
    "verify": "results.verify",
}
on_demand(__name__, {name: _HOMES.get(name, name) for name in __all__})
