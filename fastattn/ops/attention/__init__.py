"""Exact attention: `attention`, `explain`, the masks and the compact biases."""

from fastattn.ops.attention.api import Explanation, attention, attention_backward, explain
from fastattn.ops.attention.biases import Bias, alibi, relative_position
from fastattn.ops.attention.masks import (
    Mask,
    block_sparse,
    causal,
    chunked,
    documents,
    key_padding,
    prefix,
    sliding_window,
)

__all__ = [
    "Bias",
    "Explanation",
    "Mask",
    "alibi",
    "attention",
    "attention_backward",
    "block_sparse",
    "causal",
    "chunked",
    "documents",
    "explain",
    "key_padding",
    "prefix",
    "relative_position",
    "sliding_window",
]
