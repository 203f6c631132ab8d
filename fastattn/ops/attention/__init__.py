"""Exact attention: `attention`, its masks and biases; packed sequences, caches, statistics, merged parts."""

from fastattn.ops.attention.api import attention, attention_backward, explain
from fastattn.ops.attention.biases import Bias, alibi, relative_position
from fastattn.ops.attention.float8 import attention_float8
from fastattn.ops.attention.kv_cache import (
    KVCache,
    Rotary,
    attention_with_kv_cache,
    explain_with_kv_cache,
)
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
from fastattn.ops.attention.varlen import varlen_attention

__all__ = [
    "AttentionStatistics",
    "Bias",
    "KVCache",
    "Mask",
    "Rotary",
    "alibi",
    "attention",
    "attention_backward",
    "attention_float8",
    "attention_statistics",
    "attention_with_kv_cache",
    "block_sparse",
    "causal",
    "chunked",
    "documents",
    "explain",
    "explain_with_kv_cache",
    "key_padding",
    "merge_attention",
    "prefix",
    "relative_position",
    "sliding_window",
    "varlen_attention",
]
