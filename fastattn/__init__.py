"""IO-aware attention for PyTorch: a drop-in for the attention you already call.

`attention` with its masks and biases is the operation; `explain` tells which kernel runs it and why;
`scaled_dot_product_attention`, `MultiheadAttention` and `CausalSelfAttention` replace torch's and
nanoGPT's by swapping an import; `optimize(model)` replaces the attention inside a model by way of
`torch.compile`. Importing this package imports torch and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn.integrations.torch_sdpa import scaled_dot_product_attention
from fastattn.nn import CausalSelfAttention, MultiheadAttention
from fastattn.ops.attention import (
    AttentionStatistics,
    Bias,
    KVCache,
    Mask,
    Rotary,
    alibi,
    attention,
    attention_float8,
    attention_statistics,
    attention_with_kv_cache,
    block_sparse,
    causal,
    chunked,
    documents,
    explain_with_kv_cache,
    key_padding,
    merge_attention,
    prefix,
    relative_position,
    sliding_window,
    varlen_attention,
)
from fastattn.ops.choice import Explanation
from fastattn.ops.cross_entropy import cross_entropy, linear_cross_entropy, linear_kl_div
from fastattn.ops.embedding import embedding
from fastattn.ops.explain import explain
from fastattn.ops.layer_norm import dropout_add_layer_norm, dropout_add_rms_norm, layer_norm, rms_norm
from fastattn.ops.linear import linear
from fastattn.ops.mlp import mlp
from fastattn.ops.rotary import rotary

if TYPE_CHECKING:
    from fastattn import compiler, optim
    from fastattn.compiler.model import optimize

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
    "attention_float8",
    "attention_statistics",
    "attention_with_kv_cache",
    "block_sparse",
    "causal",
    "chunked",
    "compiler",
    "cross_entropy",
    "documents",
    "embedding",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "explain",
    "explain_with_kv_cache",
    "key_padding",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_kl_div",
    "merge_attention",
    "mlp",
    "optim",
    "optimize",
    "prefix",
    "relative_position",
    "rms_norm",
    "rotary",
    "scaled_dot_product_attention",
    "sliding_window",
    "varlen_attention",
]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "nn", "optim"])


def __getattr__(name: str) -> Any:
    """What waits until it is asked for: `compiler` and `optimize` bring torch's compiler with them."""
    import importlib  # noqa: PLC0415

    if name in ("compiler", "optim"):
        return importlib.import_module(f"fastattn.{name}")
    if name == "optimize":
        return importlib.import_module("fastattn.compiler.model").optimize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
