"""The linear layer."""

from fastattn.ops.linear.api import linear

__all__ = ["linear"]
