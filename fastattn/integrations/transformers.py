"""Hugging Face transformers' models on fastattn's kernels.

>>> from fastattn.integrations.transformers import register
>>> register()  # doctest: +SKIP
>>> model.set_attn_implementation("fastattn")  # doctest: +SKIP

Works with gradient checkpointing, generation with dynamic and static caches, left and right padding,
sequences packed by `position_ids`, grouped-query attention and `torch.compile`. Where all keys of a query
are masked (a padding token's own row) attention gives 0, as transformers' `sdpa` does; `eager` gives a mean
over all tokens there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

from fastattn.ops.attention import attention, causal
from fastattn.ops.attention.masks import Mask, as_mask

# Reach every attention function by way of the model's **kwargs, and do not concern it.
_NOT_ATTENTION = frozenset(
    {
        "cache_position",
        "deterministic",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "use_cache",
    }
)
# Name where documents packed into one sequence begin and end.
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def register(name: str = "fastattn") -> None:
    """Make ``attn_implementation=name`` available to every transformers model.

    Registers the attention function and its mask function: with the first alone transformers would pass no
    mask at all, and padding would be attended to.

    Args:
        name: what to pass to `from_pretrained(attn_implementation=)` or `set_attn_implementation`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> register()
        >>> config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16)
        >>> model = GPT2LMHeadModel(config)
        >>> model.set_attn_implementation("fastattn")
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 11])
    """
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


@dataclass(frozen=True, eq=False)
class CompactMask:
    """What stands for transformers' ``[B, 1, L_q, L_k]`` mask in memory that grows with L_k alone.

    It goes from a model's mask function through its layers to `attention_forward`, and has what transformers
    and accelerate use of the tensor it stands for on the way.

    Attributes:
        mask: causal, or a bool tensor ``[B, 1, 1, L_k]`` for the padding, or both.
        shape: of the tensor it stands for.
    """

    mask: Mask
    shape: tuple[int, int, int, int]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def contiguous(self) -> CompactMask:
        return self

    def to(self, device: torch.device | str, **_: Any) -> CompactMask:
        dense = self.mask.dense
        return self if dense is None else replace(self, mask=replace(self.mask, dense=dense.to(device)))


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | CompactMask | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | CompactMask | None:
    """The mask function for transformers' `AttentionMaskInterface`.

    Args: those transformers passes to `sdpa_mask`.

    Returns:
        None for causal or bidirectional attention without padding; a `CompactMask` where padding comes in, or
        queries that continue a cache; for all else (a sliding window that bites, packed sequences, a static
        cache) the bool tensor ``[B, 1, L_q, L_k]`` that `sdpa_mask` makes.
    """
    if isinstance(attention_mask, CompactMask):  # made before the model was called
        return attention_mask
    # A window or chunk longer than the keys hides none of them.
    unlimited = local_size is not None and kv_length < local_size
    is_causal = allow_is_causal_skip and (unlimited or mask_function is causal_mask_function)
    is_full = allow_is_bidirectional_skip and (unlimited or mask_function is bidirectional_mask_function)
    # Not so in a static cache, where keys behind the last query's are not written yet.
    aligned = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if not (is_full or (is_causal and aligned)):
        return sdpa_mask(  # type: ignore[no-any-return]
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )

    mask = causal() if is_causal else Mask()
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        if is_tracing(padding) or not bool(padding.all()):
            mask = mask & as_mask(padding[:, None, None, :])
            return CompactMask(mask, (batch_size, 1, q_length, kv_length))
    if is_full or q_length in (1, kv_length):
        return None
    return CompactMask(mask, (batch_size, 1, q_length, kv_length))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | CompactMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function for transformers' `AttentionInterface`.

    Args:
        module: the attention layer; its `is_causal` holds where neither mask nor argument says.
        query: ``[B, H, L_q, D]``.
        key: ``[B, H_kv, L_k, D]``, H_kv divides H.
        value: ``[B, H_kv, L_k, D_v]``.
        attention_mask: what `attention_mask` made, or a tensor broadcastable to ``[B, H, L_q, L_k]``, bool
            (True = may attend) or floating (added to the scores). It then says all: `is_causal` is not read.
        dropout: probability in [0, 1).
        scaling: factor on the scores; ``1 / sqrt(D)`` if None.
        is_causal: whether a query sees no later key, where no mask is given.
        sliding_window: checked, not read: the mask holds it.
        position_bias: added to the scores, broadcastable to ``[B, H, L_q, L_k]``; gets a gradient.
        kwargs: what else the model passed.

    Returns:
        ``[B, L_q, H, D_v]``, and None for the weights.

    Raises:
        NotImplementedError: an argument that would change the result and can't be honoured.
        TypeError, ValueError: a mask of another kind or rank; tensors that do not fit.
    """
    _refuse_unknown(kwargs, packed_in_mask=isinstance(attention_mask, Tensor))
    mask: Mask | Tensor | None = None
    bias = position_bias
    if isinstance(attention_mask, CompactMask):
        mask = attention_mask.to(query.device).mask
    elif attention_mask is not None:
        if attention_mask.dim() != 4:
            expected = "expected 4 dimensions [B, H, L_q, L_k]"
            raise ValueError(f"attention_mask: {expected}, got {list(attention_mask.shape)}")
        if attention_mask.is_floating_point():
            bias = attention_mask if bias is None else bias + attention_mask
        else:
            mask = attention_mask
    else:
        if sliding_window is not None and key.shape[2] > sliding_window:
            raise NotImplementedError(
                f"sliding_window={sliding_window} over {key.shape[2]} keys: expected a mask with it, got None"
            )
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        if is_causal and query.shape[2] > 1:
            # No mask with L_k > L_q: the first call on a static cache, whose other keys are not written yet.
            mask = causal("top_left")
    out = attention(query, key, value, mask=mask, bias=bias, scale=scaling, dropout=dropout)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _refuse_unknown(kwargs: dict[str, Any], packed_in_mask: bool) -> None:
    for name, given in kwargs.items():
        if given is None or given is False or name in _NOT_ATTENTION:
            continue
        if name == "output_attentions":
            why = "use attn_implementation='eager' for attention weights"
        elif name in _PACKING:
            # Where sequences are packed by position_ids the mask is a tensor and holds these as well.
            if packed_in_mask or (name != "seq_idx" and given.shape[0] <= 2):
                continue
            why = "pack sequences by position_ids that start again at 0"
        else:
            why = "it is not supported, and would have to be ignored"
        raise NotImplementedError(f"{name}: expected None, got {type(given).__name__}; {why}")
