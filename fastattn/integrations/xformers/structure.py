"""What xformers' attention biases say, by their class names and attributes, as masks and biases of ours.

xformers is not imported: its own objects and those of `attn_bias` are read alike.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention.masks import Mask, causal, documents, sliding_window


def structure(attn_bias: Any, q_length: int, k_length: int) -> Mask:
    """The mask that an attention bias of xformers stands for; `tensor_of` is what some have besides.

    Args:
        attn_bias: an object of one of xformers' classes, or of those in `attn_bias`.
        q_length: queries of the problem; block-diagonal biases have to be for as many.
        k_length: keys of the problem.

    Raises:
        NotImplementedError: a class that is not one of these, by name, with what to use instead.
        ValueError: a block-diagonal bias for other lengths, or whose blocks of keys overlap.
    """
    name = _name_of(attn_bias)
    if name in _PLAIN:
        return _PLAIN[name](attn_bias)
    if name in _BLOCKS:
        return _blocks(name, attn_bias, q_length, k_length) & _BLOCKS[name](attn_bias)
    if name.startswith("Paged"):
        why = "for keys in pages use fastattn.attention_with_kv_cache"
    else:
        why = "pass the mask as a tensor, or call fastattn.attention with a mask of its own"
    raise NotImplementedError(f"attn_bias: expected None, a tensor or one of {NAMES}, got {name}; {why}")


def _name_of(attn_bias: Any) -> str:
    """The first name among its classes that says what it is, else its own."""
    for one in type(attn_bias).__mro__:
        if one.__name__ in _PLAIN or one.__name__ in _BLOCKS:
            return one.__name__
        # What makes another tensor of itself may be another mask, as may what xformers itself derives.
        if "materialize" in vars(one) or one.__module__.startswith("xformers."):
            break
    return type(attn_bias).__name__


def _local(align: Any) -> Callable[[Any], Mask]:
    return lambda bias: sliding_window(bias._window_size - 1, 0, align)


def _window(bias: Any) -> Mask:
    return sliding_window(bias.window_left, bias.window_right)


_PLAIN: dict[str, Callable[[Any], Mask]] = {
    "LowerTriangularMask": lambda bias: causal("top_left"),
    "LowerTriangularMaskWithTensorBias": lambda bias: causal("top_left"),
    "LowerTriangularFromBottomRightMask": lambda bias: causal(),
    "LowerTriangularFromBottomRightLocalAttentionMask": _local("bottom_right"),
    "LocalAttentionFromBottomRightMask": _window,
}
# Block by block; what holds within each.
_BLOCKS: dict[str, Callable[[Any], Mask]] = {
    "BlockDiagonalMask": lambda bias: Mask(),
    "BlockDiagonalCausalMask": lambda bias: causal("top_left"),
    "BlockDiagonalCausalFromBottomRightMask": lambda bias: causal(),
    "BlockDiagonalCausalLocalAttentionMask": _local("top_left"),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": _local("bottom_right"),
    "BlockDiagonalPaddedKeysMask": lambda bias: Mask(),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": lambda bias: causal(),
    "BlockDiagonalLocalAttentionPaddedKeysMask": _window,
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": _local("bottom_right"),
    "BlockDiagonalGappyKeysMask": lambda bias: Mask(),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": lambda bias: causal(),
}
NAMES = sorted([*_PLAIN, *_BLOCKS])


def _blocks(name: str, bias: Any, q_length: int, k_length: int) -> Mask:
    q, k = bias.q_seqinfo, bias.k_seqinfo
    for side, info, length in (("queries", q, q_length), ("keys", k, k_length)):
        if info.seqstart_py[-1] != length:
            raise ValueError(
                f"{name}: expected {info.seqstart_py[-1]} {side}, the sum of its blocks, got {length}"
            )
    if not hasattr(k, "seqlen"):
        return documents(q.seqstart, k.seqstart)

    blocks = list(zip(k.seqstart_py, k.seqlen_py, strict=False))
    if any(start + size > following for (start, size), (following, _) in pairwise(blocks)):
        raise ValueError(
            f"{name}: expected blocks of keys one behind the other, got starts {list(k.seqstart_py)} "
            f"with lengths {list(k.seqlen_py)}"
        )
    # Between any two blocks, and before the first, a document of the keys not in use and of no queries.
    ends = k.seqstart[: len(blocks)] + k.seqlen
    nothing = torch.zeros_like(q.seqstart[:1])
    cu_q = torch.cat((nothing, torch.stack((q.seqstart[:-1], q.seqstart[1:]), 1).flatten()))
    cu_k = torch.cat((nothing, torch.stack((k.seqstart[: len(blocks)], ends), 1).flatten()))
    return documents(cu_q, cu_k)


def tensor_of(attn_bias: Any) -> Tensor | None:
    """The tensor that is added to the scores, if there is one."""
    if isinstance(attn_bias, Tensor):
        return attn_bias
    if _name_of(attn_bias) == "LowerTriangularMaskWithTensorBias":
        bias: Tensor = attn_bias._bias
        return bias
    return None
