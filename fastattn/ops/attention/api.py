"""`fastattn.attention`: checks what it is given, chooses a backend, and calls it. Speaks to people."""

from __future__ import annotations

import math

from torch import Tensor

from fastattn.ops import choice
from fastattn.ops.attention import library, reference
from fastattn.ops.attention.biases import Bias, as_bias
from fastattn.ops.attention.checks import check_inputs, check_options, check_saved
from fastattn.ops.attention.masks import Mask, as_mask
from fastattn.ops.attention.problem import resolve


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    q_start: int | Tensor | None = None,
    k_start: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention in tiles, without the L_q × L_k matrix in memory.

    Computes ``softmax(softcap(scale · q kᵀ) + bias) v`` over the keys the mask keeps, forward and backward,
    with work in proportion to what is not masked. The same arguments give the same bits on every run and for
    any number of threads, and a sequence's result does not depend on what else is in the batch.

    Args:
        q: ``[B, H, L_q, D]``, float32, bfloat16 or float16 (float64 in the reference backend). Any strides
            with a unit last one cost no copy, so ``x.view(B, L, H, D).transpose(1, 2)`` is fine.
        k: ``[B, H_kv, L_k, D]``, q's dtype. H_kv divides H: query head h reads key head ``h // (H / H_kv)``
            (grouped-query attention; H_kv = 1 is multi-query).
        v: ``[B, H_kv, L_k, D_v]``, q's dtype. All three may be nested tensors of layout `torch.jagged`, as
            `torch.nn.functional.scaled_dot_product_attention` takes them; out and lse are nested then.
        mask: `causal()`, `sliding_window(left, right)`, `prefix(n)`, `chunked(size)`,
            `documents(cu_seqlens)`, `key_padding(lengths)`, `block_sparse(blocks, block_size)`, a bool tensor
            broadcastable to ``[B, H, L_q, L_k]`` (True = may attend), these joined by ``&`` and ``|``, or
            None.
        bias: added to the scores: `alibi(slopes)`, `relative_position(table)`, a float32, bfloat16, float16
            or float64 tensor broadcastable to ``[B, H, L_q, L_k]`` with as many dimensions, or a sum of
            these. Gets a gradient of its own shape, the same on every run; memory for the matrix is taken
            only where the bias itself takes it. -inf masks. Where all of a row's biases are below -1e6, lse
            and with it the gradients lose the digits that float32 does not have.
        scale: factor on q kᵀ; ``1 / sqrt(D)`` if None.
        softcap: scores x become ``softcap · tanh(x / softcap)`` before bias and mask are added.
        sinks: floating ``[H]``: one more score for each row of a head, that takes its share of the softmax
            and has no value. Gets a gradient. lse includes it.
        dropout: probability in [0, 1) with which a probability is zeroed, in steps of 1/65,536. It is applied
            whenever it is not 0: pass 0.0 in evaluation.
        seed: which probabilities are dropped: an int in [0, 2^63) or an int64 tensor ``[1]``. The same seed
            drops the same elements on every backend. Drawn from torch's generator if None.
        q_start: for a part of a longer sequence, the position of its first query: an int, or an integer
            tensor ``[B]``. Where it or `k_start` is given, masks, compact biases and dropout go by the
            positions ``q_start + i`` and ``k_start + j``, and no `align` is read. `key_padding`,
            `block_sparse` and tensors always go by the indices i and j.
        k_start: the position of its first key.
        return_lse: also return the log-sum-exp of each row's scores.
        backend: ``"cpu"`` (the C++ kernels), ``"triton"`` (NVIDIA GPUs of sm_80 and newer, AMD GPUs; on CPU
            tensors only with TRITON_INTERPRET=1 in the environment, in Triton's interpreter, for tests) or
            ``"reference"`` (plain PyTorch); an explicit one never falls back. The best that can run it if
            None; `fastattn.explain` tells which that is.

    Returns:
        ``out`` ``[B, H, L_q, D_v]`` in q's dtype; with `return_lse` also ``lse`` ``[B, H, L_q]``, natural
        logarithm, float32 (float64 for float64 inputs), differentiable. A row with nothing to attend to
        has out 0, lse -inf (its sink, where it has one) and gradients 0.

    Raises:
        ValueError: shapes, devices or options that do not fit, with the expected and the given.
        TypeError: dtypes that do not fit.
        NotImplementedError: `backend` can't do this, with every reason.

    Under ``torch.autocast`` q, k and v are cast to the autocast dtype first, as in
    `torch.nn.functional.scaled_dot_product_attention`.

    Source: Dao et al., "FlashAttention", NeurIPS 2022 (arXiv 2205.14135); Dao, "FlashAttention-2", ICLR 2024
    (arXiv 2307.08691).

    Example:
        >>> import torch, fastattn
        >>> q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
        >>> fastattn.attention(q, k, v, mask=fastattn.causal()).shape
        torch.Size([1, 2, 5, 8])
        >>> window = fastattn.sliding_window(2, 0)
        >>> fastattn.attention(q, k, v, mask=window, bias=fastattn.alibi(torch.tensor([0.5, 0.25]))).shape
        torch.Size([1, 2, 5, 8])
    """
    if any(isinstance(x, Tensor) and x.is_nested for x in (q, k, v)):
        from fastattn.ops.attention.varlen import nested_attention  # noqa: PLC0415 - it calls this function

        if q_start is not None or k_start is not None:
            raise ValueError(
                "q_start, k_start: expected None with nested tensors, positions count from each start"
            )
        return nested_attention(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout=dropout,
            seed=seed,
            return_lse=return_lse,
            backend=backend,
        )
    choice.require_tensors(q=q, k=k, v=v)
    q, k, v = choice.autocast(q, k, v)
    mask_, bias_ = as_mask(mask), as_bias(bias)
    check_inputs(q, k, v)
    check_options(q, k, mask_, bias_, softcap, sinks, dropout, q_start, k_start)
    chosen = choice.choose(q, backend)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    seed = choice.as_seed(seed, dropout, q.device)
    numbers = (float(scale), float(softcap or 0.0), float(dropout))
    # Dynamo takes no tensor twice as an input of an autograd function.
    if k is q:
        k = k.view_as(k)
    if v is q or v is k:
        v = v.view_as(v)

    if chosen == "reference":
        scale, cap, dropout = numbers
        with choice.no_autocast(q.device):
            out, lse = reference.attention(
                q, k, v, mask_, bias_, sinks, scale, cap, dropout, seed, q_start, k_start
            )
    else:
        problem = resolve(q, k, mask_, bias_, sinks, seed, q_start, k_start, *numbers)
        out, lse = library.attention(q, k, v, *problem, chosen)
    return (out, lse) if return_lse else out


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    q_start: int | Tensor | None = None,
    k_start: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attention` for q, k and v, from rows whose out and lse are known.

    What ring attention is made of: with the `out` and `lse` of rows that attended to keys on other devices as
    well, it gives these keys' share of the gradients; dq is summed over the shares.

    Args:
        dout: ``[B, H, L_q, D_v]``, the gradient that reaches out, in its dtype.
        q, k, v: as in `attention`.
        out: ``[B, H, L_q, D_v]``, over all keys, in the dtype that `attention` gives it (q's, or autocast's).
        lse: ``[B, H, L_q]``, over all keys, and sinks where there are any; float32 (float64 for float64).
        dlse: ``[B, H, L_q]``, the gradient that reaches lse, in its dtype, or None.
        mask, bias, scale, softcap, dropout, seed, q_start, k_start, backend: as in `attention`; with dropout
            the seed has to be given.

    Returns:
        dq, dk and dv, of the shapes and dtype of q, k and v; under autocast in its dtype.

    Raises: as `attention` does.

    Example:
        >>> import torch, fastattn
        >>> q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
        >>> out, lse = fastattn.attention(q, k, v, return_lse=True)
        >>> dq, dk, dv = attention_backward(torch.ones_like(out), q, k, v, out, lse)
        >>> dk.shape
        torch.Size([1, 2, 5, 8])
    """
    if isinstance(q, Tensor) and isinstance(out, Tensor) and out.dtype != q.dtype:
        q, k, v = choice.autocast(q, k, v)  # as forward has
    mask_, bias_ = as_mask(mask), as_bias(bias)
    check_inputs(q, k, v)
    check_options(q, k, mask_, bias_, softcap, None, dropout, q_start, k_start)
    check_saved(q, v, dout, dlse, out, lse)
    if dropout > 0 and seed is None:
        raise ValueError("seed: expected forward's, which decides what is dropped, got None")
    chosen = choice.choose(q, backend)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    seed = choice.as_seed(seed, dropout, q.device)
    numbers = (float(scale), float(softcap or 0.0), float(dropout))
    if chosen == "reference":
        scale, cap, dropout = numbers
        with choice.no_autocast(q.device):
            return reference.backward(
                dout, dlse, q, k, v, out, lse, mask_, bias_, scale, cap, dropout, seed, q_start, k_start
            )
    problem = resolve(q, k, mask_, bias_, None, seed, q_start, k_start, *numbers)
    saved = (dout, dlse, q, k, v, out, lse)
    dq, dk, dv, *_ = library.gradient(*saved, *problem, chosen, library.WANTED_QKV)
    return dq, dk, dv


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    q_start: int | Tensor | None = None,
    k_start: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> choice.Explanation:
    """Which backend `attention` would run with the same arguments, and why the others would not.

    Args: those of `attention`. Nothing is computed.

    Returns:
        An `Explanation`; printing it gives a line for each backend.

    Raises:
        ValueError, TypeError: for arguments no backend takes, as `attention` does.

    Example:
        >>> import torch, fastattn
        >>> q = torch.randn(1, 2, 5, 8, dtype=torch.float64)
        >>> fastattn.explain(q, q, q).backend
        'reference'
    """
    choice.require_tensors(q=q, k=k, v=v)
    q, k, v = choice.autocast(q, k, v)
    check_inputs(q, k, v)
    check_options(q, k, as_mask(mask), as_bias(bias), softcap, sinks, dropout, q_start, k_start)
    choice.check_seed(seed, q.device)
    return choice.explanation(q, backend)
