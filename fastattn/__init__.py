"""IO-aware attention for PyTorch: a drop-in for the attention you already call.

`attention` with its masks and biases is the operation; `explain` tells which kernel runs it and why;
`scaled_dot_product_attention`, `MultiheadAttention` and `CausalSelfAttention` replace torch's and
nanoGPT's by swapping an import. Importing this package imports torch and nothing else.
"""

from fastattn.integrations.torch_sdpa import scaled_dot_product_attention
from fastattn.nn import CausalSelfAttention, MultiheadAttention
from fastattn.ops.attention import (
    AttentionStatistics,
    Bias,
    Explanation,
    KVCache,
    Mask,
    Rotary,
    alibi,
    attention,
    attention_statistics,
    attention_with_kv_cache,
    block_sparse,
    causal,
    chunked,
    documents,
    explain,
    explain_with_kv_cache,
    key_padding,
    merge_attention,
    prefix,
    relative_position,
    sliding_window,
    varlen_attention,
)
from fastattn.ops.rotary import rotary

__version__ = "0.1.0"

__all__ = [
    "AttentionStatistics",
    "Bias",
    "CausalSelfAttention",
    "Explanation",
    "KVCache",
    "Mask",
    "MultiheadAttention",
    "Rotary",
    "alibi",
    "attention",
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
    "rotary",
    "scaled_dot_product_attention",
    "sliding_window",
    "varlen_attention",
]
