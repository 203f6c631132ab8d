"""Modules: they hold parameters, and no mathematics."""

from fastattn.nn.attention import CausalSelfAttention, MultiheadAttention

__all__ = ["CausalSelfAttention", "MultiheadAttention"]
