"""Plans, checkpoints and other folders as plain values for tables and JSON."""

from .checkpoints import checkpoint
from .plans import lacks, plan, reference

__all__ = ["checkpoint", "lacks", "plan", "reference"]
