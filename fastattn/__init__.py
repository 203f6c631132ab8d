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
    Mask,
    alibi,
    attention,
    attention_statistics,
    block_sparse,
    causal,
    chunked,
    documents,
    explain,
    key_padding,
    merge_attention,
    prefix,
    relative_position,
    sliding_window,
)

__version__ = "0.1.0"

__all__ = [
    "AttentionStatistics",
    "Bias",
    "CausalSelfAttention",
    "Explanation",
    "Mask",
    "MultiheadAttention",
    "alibi",
    "attention",
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
    "scaled_dot_product_attention",
    "sliding_window",
]
