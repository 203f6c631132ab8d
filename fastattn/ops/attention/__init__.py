"""Exact attention: `attention`, `explain`, the masks and the compact biases; statistics, merging of parts."""

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
from fastattn.ops.attention.merge import merge_attention
from fastattn.ops.attention.statistics import AttentionStatistics, attention_statistics

__all__ = [
    "AttentionStatistics",
    "Bias",
    "Explanation",
    "Mask",
    "alibi",
    "attention",
    "attention_backward",
    "attention_statistics",
    "block_sparse",
    "causal",
    "chunked",
    "documents",
    "explain",
    "key_padding",
    "merge_attention",
    "prefix",
    "relative_position",
    "sliding_window",
]
