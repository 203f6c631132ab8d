"""Two linear layers with an activation between them."""

from fastattn.ops.mlp.api import mlp

__all__ = ["mlp"]
