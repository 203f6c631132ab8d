"""`fastattn.attention`: checks what it is given, chooses a backend, and calls it. Speaks to people."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn import _backends
from fastattn.ops.attention import library, reference
from fastattn.ops.attention.masks import Mask, as_mask

MAX_HEAD_DIM = 512
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Explanation(NamedTuple):
    """What `fastattn.explain` found out.

    Attributes:
        backend: the backend that would run, or None where none can.
        reasons: for every backend that would not run, why; a backend that could run but is not the best
            says which one is taken before it.
        isa: the instruction set of the `cpu` backend's kernels, where that is what would run.
    """

    backend: str | None
    reasons: dict[str, list[str]]
    isa: str | None = None

    def __str__(self) -> str:
        head = "none can run this" if self.backend is None else self.backend
        lines = [f"backend: {head}" + (f" ({self.isa})" if self.isa else "")]
        lines += [f"  not {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        return "\n".join(lines)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact softmax attention in tiles, without the L_q × L_k matrix in memory.

    Computes ``softmax(scale · q kᵀ + bias) v`` over the keys the mask keeps, forward and backward.

    Args:
        q: ``[B, H, L_q, D]``, float32, bfloat16 or float16 (float64 in the reference backend). Any strides
            with a unit last one cost no copy, so ``x.view(B, L, H, D).transpose(1, 2)`` is fine.
        k: ``[B, H_kv, L_k, D]``, q's dtype. H_kv divides H: query head h reads key head ``h // (H / H_kv)``
            (grouped-query attention; H_kv = 1 is multi-query).
        v: ``[B, H_kv, L_k, D_v]``, q's dtype.
        mask: `causal()`, `key_padding(lengths)`, a bool tensor broadcastable to ``[B, H, L_q, L_k]``
            (True = may attend), these joined by ``&``, or None.
        bias: added to the scaled scores; float32, bfloat16, float16 or float64, broadcastable to
            ``[B, H, L_q, L_k]`` with as many dimensions. Gets a gradient of its own shape, the same on every
            run. -inf masks. Where all of a row's biases are below -1e6, lse and with it the gradients lose
            the digits that float32 does not have.
        scale: factor on q kᵀ; ``1 / sqrt(D)`` if None.
        dropout: probability in [0, 1) with which a probability is zeroed, in steps of 1/65,536. It is applied
            whenever it is not 0: pass 0.0 in evaluation.
        seed: which probabilities are dropped: an int in [0, 2^63) or an int64 tensor ``[1]``. The same seed
            drops the same elements on every backend. Drawn from torch's generator if None.
        return_lse: also return the log-sum-exp of each row's scores.
        backend: ``"cpu"`` or ``"reference"``; an explicit one never falls back. The best that can run
            it if None; `fastattn.explain` tells which that is.

    Returns:
        ``out`` ``[B, H, L_q, D_v]`` in q's dtype; with `return_lse` also ``lse`` ``[B, H, L_q]``, natural
        logarithm, float32 (float64 for float64 inputs), differentiable. A row with nothing to attend to
        has out 0, lse -inf and gradients 0.

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
    """
    q, k, v = _autocast(q, k, v)
    problem = _check(q, k, v, as_mask(mask), bias, dropout)
    chosen = _choose(q, k, v, backend)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    seed = _as_seed(seed, dropout, q.device)
    # Dynamo takes no tensor twice as an input of an autograd function.
    if k is q:
        k = k.view_as(k)
    if v is q or v is k:
        v = v.view_as(v)

    if chosen == "reference":
        out, lse = reference.attention(q, k, v, problem, bias, float(scale), float(dropout), seed)
    else:
        out, lse = library.Attention.apply(
            q,
            k,
            v,
            problem.dense,
            problem.lengths,
            bias,
            seed,
            problem.diagonal,
            float(scale),
            float(dropout),
            chosen,
        )
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Explanation:
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
    q, k, v = _autocast(q, k, v)
    _check(q, k, v, as_mask(mask), bias, dropout)
    _check_seed(seed, q.device)
    reasons = {name: _unsupported(name, q, k, v) for name in _backends.NAMES}
    if backend is not None:
        _check_name(backend)
        chosen = None if reasons[backend] else backend
        taken = f"backend={backend!r} was asked for"
    else:
        chosen = next((name for name in _backends.NAMES if not reasons[name]), None)
        taken = f"{chosen} comes first"
    why = {name: found or [taken] for name, found in reasons.items() if name != chosen}
    return Explanation(chosen, why, _backends.cpu_isa() if chosen == "cpu" else None)


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    device = q.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        # As torch's own autocast: only floating tensors, and not float64.
        q, k, v = (
            x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v)
        )
    return q, k, v


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bias: Tensor | None, dropout: float) -> Mask:
    """Raise for what no backend takes; return the mask with its tensors in full rank."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions [batch, heads, length, head_dim], got {list(x.shape)}"
            )
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
    batch, heads, q_length, head_dim = q.shape
    kv_heads, k_length = k.shape[1], k.shape[2]
    if k.shape[0] != batch or v.shape[0] != batch:
        raise ValueError(f"batch: expected q's {batch}, got {k.shape[0]} in k and {v.shape[0]} in v")
    if v.shape[1] != kv_heads or v.shape[2] != k_length:
        raise ValueError(f"v: expected k's heads and length {[kv_heads, k_length]}, got {list(v.shape[1:3])}")
    if k.shape[3] != head_dim:
        raise ValueError(f"k: expected q's head_dim {head_dim}, got {k.shape[3]}")
    for name, dim in (("q and k", head_dim), ("v", v.shape[3])):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim of {name}: expected 1 to {MAX_HEAD_DIM}, got {dim}")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"heads: expected k's {kv_heads} to divide q's {heads}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")

    full = (batch, heads, q_length, k_length)
    dense = mask.dense
    if dense is not None:
        dense = dense[(None,) * (4 - dense.dim())] if dense.dim() < 4 else dense
        _check_broadcast("mask", dense, full, q.device)
    if mask.lengths is not None:
        if mask.lengths.shape[0] != batch:
            raise ValueError(
                f"key_padding(lengths): expected {batch} lengths (batch), got {mask.lengths.shape[0]}"
            )
        if mask.lengths.device != q.device:
            raise ValueError(f"key_padding(lengths): expected device {q.device}, got {mask.lengths.device}")
        _check_lengths(mask.lengths, k_length)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.dtype not in _DTYPES:
            got = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
            raise TypeError(
                f"bias: expected float32, bfloat16, float16 or float64, got {got} "
                "(a bool tensor is passed as mask=)"
            )
        if bias.dim() != 4:
            raise ValueError(
                f"bias: expected 4 dimensions broadcastable to {list(full)}, got {list(bias.shape)}"
            )
        _check_broadcast("bias", bias, full, q.device)
    return Mask(mask.diagonal, mask.lengths, dense)


def _check_lengths(lengths: Tensor, k_length: int) -> None:
    """Raise for lengths out of range where reading them is free: plain tensors in CPU memory."""
    if torch.compiler.is_compiling() or type(lengths) is not Tensor or lengths.device.type != "cpu":
        return
    if torch._C._functorch.is_batchedtensor(lengths):
        return
    given = lengths.tolist()
    if any(not 0 <= n <= k_length for n in given):
        raise ValueError(f"key_padding(lengths): expected values from 0 to {k_length} (L_k), got {given}")


def _check_broadcast(name: str, x: Tensor, full: tuple[int, ...], device: torch.device) -> None:
    if x.dim() != 4 or any(have != 1 and have != want for have, want in zip(x.shape, full, strict=True)):
        raise ValueError(f"{name}: expected a shape broadcastable to {list(full)}, got {list(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: expected q's device {device}, got {x.device}")


def _check_seed(seed: int | Tensor | None, device: torch.device) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed: expected an int64 tensor [1] on {device}, "
                f"got {seed.dtype} {list(seed.shape)} on {seed.device}"
            )
    elif seed is not None:
        if isinstance(seed, float):
            raise TypeError(f"seed: expected an int or an int64 tensor, got {seed}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed: expected an int in [0, 2^63), got {seed}")


def _as_seed(seed: int | Tensor | None, dropout: float, device: torch.device) -> Tensor | None:
    _check_seed(seed, device)
    if dropout == 0:
        return None
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _check_name(backend: str) -> None:
    if backend not in _backends.NAMES:
        raise ValueError(f"backend: expected one of {list(_backends.NAMES)}, got {backend!r}")


def _unsupported(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Every reason why `backend` can't do this; the inputs have passed `_check`."""
    reasons = []
    if backend == "cpu":
        if q.device.type != "cpu":
            reasons.append(f"expected tensors on cpu, got {q.device}")
        if q.dtype == torch.float64:
            reasons.append("expected float32, bfloat16 or float16, got torch.float64")
        if not reasons:
            reasons += _backends.unavailable(backend)
    return reasons


def _choose(q: Tensor, k: Tensor, v: Tensor, backend: str | None) -> str:
    if backend is not None:
        _check_name(backend)
        reasons = _unsupported(backend, q, k, v)
        if reasons:
            raise NotImplementedError(f"backend={backend!r} can't run this: {'; '.join(reasons)}")
        return backend
    return next(name for name in _backends.NAMES if not _unsupported(name, q, k, v))
