"""The attention function that transformers' models call."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.integrations.transformers.masks import CompactMask
from fastattn.ops.attention import attention, causal, documents, sliding_window
from fastattn.ops.attention import explain as explain_attention
from fastattn.ops.attention.masks import Mask, as_mask
from fastattn.ops.choice import Explanation

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

_listener: ContextVar[Callable[[nn.Module, Explanation], None] | None] = ContextVar("listener", default=None)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | CompactMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
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
        kwargs: what else the model passed. Honoured are ``softcap``, ``s_aux`` (attention sinks ``[H]``),
            ``position_bias`` (added to the scores, broadcastable to ``[B, H, L_q, L_k]``), ``cu_seq_lens_q``
            and ``cu_seq_lens_k`` (where packed documents begin), all but the last two with gradients, and
            ``sliding_window`` where no mask holds it.

    Returns:
        ``[B, L_q, H, D_v]``, and None for the weights.

    Raises:
        NotImplementedError: an argument that would change the result and can't be honoured.
        TypeError, ValueError: a mask of another kind or rank; tensors that do not fit.
    """
    options = _options(module, query, key, attention_mask, is_causal, kwargs)
    listener = None if torch.compiler.is_compiling() else _listener.get()
    if listener is not None:
        found = explain_attention(query, key, value, scale=scaling, dropout=dropout, **options)
        listener(module, found)
    out = attention(query, key, value, scale=scaling, dropout=dropout, **options)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def explain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | CompactMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Explanation:
    """Which backend `attention_forward` would run with the same arguments, and why the others would not.

    Args: those of `attention_forward`. Nothing is computed.

    Returns:
        see `fastattn.explain`.

    Raises: as `attention_forward` does.
    """
    options = _options(module, query, key, attention_mask, is_causal, kwargs)
    return explain_attention(query, key, value, scale=scaling, dropout=dropout, **options)


def explain_model(model: nn.Module, *args: Any, **inputs: Any) -> dict[str, Explanation]:
    """Which backend each attention layer of a model runs on, found by running it once without gradients.

    Args:
        model: a transformers model whose attention implementation is fastattn's.
        args, inputs: what it is called with.

    Returns:
        One `fastattn.Explanation` for each attention layer that ran, by the layer's name in the model.

    Raises:
        ValueError: no layer of it called fastattn.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from fastattn.integrations.transformers import explain_model, register
        >>> register()
        >>> config = GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16)
        >>> model = GPT2LMHeadModel(config).double()
        >>> model.set_attn_implementation("fastattn")
        >>> for layer, found in explain_model(model, torch.tensor([[1, 2, 3]])).items():
        ...     print(layer, found.backend)
        transformer.h.0.attn reference
        transformer.h.1.attn reference
    """
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, Explanation] = {}

    def listener(module: nn.Module, explanation: Explanation) -> None:
        found[names.get(module, type(module).__name__)] = explanation

    token = _listener.set(listener)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(*args, **inputs)
    finally:
        _listener.reset(token)
    if not found:
        config = getattr(model, "config", None)
        given = getattr(config, "_attn_implementation", None)
        raise ValueError(
            f"model: expected one whose attention is fastattn's, and no layer called it; got {given!r}: call "
            "register() and model.set_attn_implementation('fastattn')"
        )
    return found


def _options(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | CompactMask | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """The arguments for `fastattn.attention` besides q, k, v, scale and dropout."""
    kwargs = dict(kwargs)
    bias = kwargs.pop("position_bias", None)
    window = kwargs.pop("sliding_window", None)
    cu_seqlens = kwargs.pop("cu_seq_lens_q", None), kwargs.pop("cu_seq_lens_k", None)
    options = {"softcap": kwargs.pop("softcap", None), "sinks": kwargs.pop("s_aux", None)}
    mask: Mask | None = None
    if isinstance(attention_mask, CompactMask):
        moved = attention_mask.on(query.device)
        mask = moved.mask
        options |= {"q_start": moved.q_start, "k_start": moved.k_start}
    elif attention_mask is not None:
        if attention_mask.dim() != 4:
            expected = "expected 4 dimensions [B, H, L_q, L_k]"
            raise ValueError(f"attention_mask: {expected}, got {list(attention_mask.shape)}")
        if attention_mask.is_floating_point():
            bias = attention_mask if bias is None else bias + attention_mask
        else:
            mask = as_mask(attention_mask)
    else:
        mask = _without_mask(module, query, key, is_causal, window)
    packed = mask is not None and mask.documents is not None
    if not packed:
        mask = _by_cu_seqlens(mask, *cu_seqlens)
    # What seq_idx says, which of the packed documents a token is of, the mask has to hold already.
    _refuse_unknown(kwargs, packed or cu_seqlens[0] is not None)
    return {"mask": mask, "bias": bias, **options}


def _without_mask(
    module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None, window: int | None
) -> Mask | None:
    q_length, k_length = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    limited = window is not None and k_length > window
    if limited and q_length != k_length:
        raise NotImplementedError(
            f"sliding_window={window} over {k_length} keys and {q_length} queries: expected a mask that says "
            "where the queries stand, got None"
        )
    if limited:
        assert window is not None
        return sliding_window(window - 1, 0 if is_causal else window - 1)
    # No mask with L_k > L_q: the first call on a static cache, whose other keys are not written yet.
    return causal("top_left") if is_causal and q_length > 1 else None


def _by_cu_seqlens(mask: Mask | None, cu_q: Tensor | None, cu_k: Tensor | None) -> Mask | None:
    """`mask`, and the documents of these bounds kept apart; tokens behind the last attend to nothing."""
    if cu_q is None or cu_k is None:
        if cu_q is not cu_k:
            raise ValueError("cu_seq_lens_q, cu_seq_lens_k: expected both or none, got one")
        return mask
    packed = documents(cu_q, cu_k)
    return packed if mask is None else mask & packed


def _refuse_unknown(kwargs: dict[str, Any], packed: bool) -> None:
    for name, given in kwargs.items():
        if given is None or given is False or name in _NOT_ATTENTION:
            continue
        if name == "output_attentions":
            why = "use attn_implementation='eager' for attention weights"
        elif name == "seq_idx":
            if packed:
                continue
            why = (
                "pack sequences by position_ids that start again at 0, or by cu_seq_lens_q and cu_seq_lens_k"
            )
        elif name == "cache":
            why = "paged caches of continuous batching are not supported: use generate()"
        else:
            why = "it is not supported, and would have to be ignored"
        raise NotImplementedError(f"{name}: expected None, got {type(given).__name__}; {why}")
