"""`xformers.ops` by its own names, on fastattn's kernels, whether xformers is installed or not.

>>> from fastattn.integrations import xformers as xops  # import xformers.ops as xops
>>> from fastattn.integrations.xformers import fmha  # from xformers.ops import fmha
>>> xops.LowerTriangularMask is fmha.attn_bias.LowerTriangularMask
True

`memory_efficient_attention` and what belongs to it take the biases of `attn_bias` and xformers' own alike.
What can't be done exactly is refused by name: keys in pages, for which there is
`fastattn.attention_with_kv_cache`, and an `op` to be chosen by hand.
"""

from __future__ import annotations

import sys

from fastattn.integrations.xformers import attn_bias
from fastattn.integrations.xformers.attn_bias import (
    AttentionBias,
    BlockDiagonalCausalMask,
    BlockDiagonalMask,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    LowerTriangularMaskWithTensorBias,
)
from fastattn.integrations.xformers.functions import (
    explain,
    memory_efficient_attention,
    memory_efficient_attention_backward,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
    memory_efficient_attention_partial,
    merge_attentions,
)

fmha = sys.modules[__name__]

__all__ = [
    "AttentionBias",
    "BlockDiagonalCausalMask",
    "BlockDiagonalMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "LowerTriangularMaskWithTensorBias",
    "attn_bias",
    "explain",
    "fmha",
    "memory_efficient_attention",
    "memory_efficient_attention_backward",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
    "memory_efficient_attention_partial",
    "merge_attentions",
]
