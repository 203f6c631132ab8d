"""Token embedding, with positions and dropout in the same pass."""

from fastattn.ops.embedding.api import embedding

__all__ = ["embedding"]
