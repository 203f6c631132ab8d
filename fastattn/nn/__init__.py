"""Modules: they hold parameters, and no mathematics."""

from fastattn.nn.attention import CausalSelfAttention, MultiheadAttention
from fastattn.nn.linear import Linear
from fastattn.nn.mlp import MLP

__all__ = ["CausalSelfAttention", "Linear", "MLP", "MultiheadAttention"]
