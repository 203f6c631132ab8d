"""Exact attention: `attention`, `explain`, and the masks."""

from fastattn.ops.attention.api import Explanation, attention, explain
from fastattn.ops.attention.masks import Mask, causal, key_padding

__all__ = ["Explanation", "Mask", "attention", "causal", "explain", "key_padding"]
