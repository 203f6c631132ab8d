"""Modules: they hold parameters, and no mathematics."""

from fastattn.nn.attention import CausalSelfAttention, MultiheadAttention
from fastattn.nn.linear import Linear

__all__ = ["CausalSelfAttention", "Linear", "MultiheadAttention"]
