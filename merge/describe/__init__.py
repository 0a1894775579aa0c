"""Plans, checkpoints and other folders as plain values for tables and JSON."""

from typing import TYPE_CHECKING

from ..on_demand import on_demand

if TYPE_CHECKING:
    from .checkpoints import checkpoint
    from .plans import lacks, plan, reference

__all__ = ["checkpoint", "lacks", "plan", "reference"]

on_demand(__name__, {"checkpoint": "checkpoints", "lacks": "plans", "plan": "plans", "reference": "plans"})
