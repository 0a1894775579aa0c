"""Plans, checkpoints and other folders as plain values for tables and JSON."""

from .plans import checkpoint, lacks, plan, reference

__all__ = ["checkpoint", "lacks", "plan", "reference"]
