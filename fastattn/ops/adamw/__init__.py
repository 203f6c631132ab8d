"""A step of AdamW over lists of tensors, with clipping's factor in the same pass."""

from fastattn.ops.adamw.api import adamw_step, total_norm

__all__ = ["adamw_step", "total_norm"]
