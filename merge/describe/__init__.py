"""Plans, checkpoints and other folders as plain values for tables and JSON."""

from .plans import checkpoint, plan, reference

__all__ = ["checkpoint", "plan", "reference"]
