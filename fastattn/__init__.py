"""IO-aware attention for PyTorch: a drop-in for the attention you already call.

`attention` and its masks are the operation; `explain` tells which kernel runs it and why;
`scaled_dot_product_attention`, `MultiheadAttention` and `CausalSelfAttention` replace torch's and
nanoGPT's by swapping an import. Importing this package imports torch and nothing else.
"""

from fastattn.integrations.torch_sdpa import scaled_dot_product_attention
from fastattn.nn import CausalSelfAttention, MultiheadAttention
from fastattn.ops.attention import Explanation, Mask, attention, causal, explain, key_padding

__version__ = "0.1.0"

__all__ = [
    "CausalSelfAttention",
    "Explanation",
    "Mask",
    "MultiheadAttention",
    "attention",
    "causal",
    "explain",
    "key_padding",
    "scaled_dot_product_attention",
]
