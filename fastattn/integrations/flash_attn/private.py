"""flash-attn's private forward and backward, which ring attention in other packages calls.

Every parameter has flash-attn's name and place, by which they are called; the functions are not decorated,
for `inspect.getfullargspec`, by which ring-flash-attention finds these, does not look through a decorator.
None of them is traced by autograd.
`rng_state` is int64 ``(2,)``: the seed of dropout, and 0. `zero_tensors` and `num_splits` are taken and not
needed: nothing is left uninitialised, and the keys are split without a hint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.integrations.flash_attn import calls
from fastattn.integrations.flash_attn.cache import CacheCall
from fastattn.integrations.flash_attn.calls import Call, Options
from fastattn.integrations.flash_attn.functions import varlen_call
from fastattn.integrations.flash_attn.layouts import Sequences
from fastattn.ops.attention import attention_backward


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """`x`, copied where its last dimension is not dense."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`flash_attn_func` without a gradient: ``(out, softmax_lse, S_dmask, rng_state)``."""
    window = (window_size_left, window_size_right)
    options = Options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    with torch.no_grad():
        return _forward(calls.dense(q, k, v, options), return_softmax)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes the gradients into dq, dk and dv; returns softmax_d.

    `out` and `softmax_lse` may be those over more keys than `k` has: then the gradients are these keys'
    share.

    Returns:
        The row sums of ``dout · out``, ``(batch_size, nheads, seqlen)`` in float32.

    Raises:
        ValueError: dropout without the forward's `rng_state`, which says what was dropped.
    """
    window = (window_size_left, window_size_right)
    options = Options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    with torch.no_grad():
        call = calls.dense(q, k, v, options, _seed(dropout_p, rng_state))
        return _backward(call, dout, out, softmax_lse, (dq, dk, dv))


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float | None = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`flash_attn_varlen_func` without a gradient: ``(out, softmax_lse, S_dmask, rng_state)``.

    Of sequence n it takes the keys from place ``leftpad_k[n]`` to before place ``seqused_k[n]``, both int32
    ``(batch_size,)``; the bottom right corners of queries and of these keys are aligned.
    """
    window = (window_size_left, window_size_right)
    options = Options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    with torch.no_grad():
        call = varlen_call(q, k, v, *bounds, options, block_table, leftpad_k, seqused_k)
        return _forward(call, return_softmax)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """As `_flash_attn_backward`, for packed sequences; softmax_d is ``(nheads, total_q)``."""
    window = (window_size_left, window_size_right)
    options = Options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    queries, keys = Sequences(cu_seqlens_q, max_seqlen_q), Sequences(cu_seqlens_k, max_seqlen_k)
    with torch.no_grad():
        call = calls.varlen(q, k, v, queries, keys, options, _seed(dropout_p, rng_state))
        return _backward(call, dout, out, softmax_lse, (dq, dk, dv))


def _forward(call: Call | CacheCall, return_softmax: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse = call.run()
    probabilities = call.probabilities() if return_softmax else out.new_empty((0,))
    rng_state = torch.zeros((2,), dtype=torch.int64, device=out.device)
    seed = call.options.get("seed")
    if seed is not None:
        rng_state[:1] = seed
    return out, lse, probabilities, rng_state


def _backward(
    call: Call,
    dout: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Tensor:
    layout = call.layout
    found = attention_backward(
        layout.queries(dout),
        call.q,
        call.k,
        call.v,
        layout.queries(out),
        layout.lse(softmax_lse),
        **call.options,
    )
    back = (layout.from_queries, layout.from_keys, layout.from_keys)
    for into, gradient, unpacked in zip(gradients, found, back, strict=True):
        if into is not None:
            into.copy_(unpacked(gradient))
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2)


def _seed(dropout_p: float, rng_state: Tensor | None) -> Tensor | None:
    if dropout_p == 0:
        return None
    if rng_state is None:
        raise ValueError(
            "rng_state: expected the forward's with dropout_p > 0, got None; another drops other elements"
        )
    return rng_state[:1]
