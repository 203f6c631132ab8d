"""Optimizers that drop in for torch's."""

from fastattn.optim.adamw import AdamW

__all__ = ["AdamW"]
