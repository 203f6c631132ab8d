"""Sequences of different lengths without padding: packed behind one another, or as jagged nested tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.ops.attention import api
from fastattn.ops.attention.masks import as_mask, documents

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    from fastattn.ops.attention.biases import Bias
    from fastattn.ops.attention.masks import Mask

    class Options(TypedDict, total=False):
        """What `fastattn.attention` takes besides q, k, v and positions."""

        mask: Mask | Tensor | None
        bias: Bias | Tensor | None
        scale: float | None
        softcap: float | None
        sinks: Tensor | None
        dropout: float
        seed: int | Tensor | None
        return_lse: bool
        backend: str | None


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of many sequences that are packed behind one another.

    Masks and compact biases act in every sequence as they would on the sequence alone.

    Args:
        q: ``[T, H, D]``, T = L_q of all sequences together.
        k: ``[T_k, H_kv, D]``.
        v: ``[T_k, H_kv, D_v]``.
        cu_seqlens_q: integer tensor ``[N + 1]``: the queries of sequence n are from ``cu_seqlens_q[n]`` to
            before ``cu_seqlens_q[n + 1]``. The longest length is not needed, and a GPU does not have to wait
            until these are known.
        cu_seqlens_k: the same of the keys; `cu_seqlens_q` if None.
        **options: mask, bias, scale, softcap, sinks, dropout, seed, return_lse and backend, as in
            `fastattn.attention` with one batch of T queries and T_k keys.

    Returns:
        ``out`` ``[T, H, D_v]``; with `return_lse` also ``lse`` ``[H, T]``, float32. Queries behind the last
        sequence have out 0 and lse -inf.

    Raises: as `fastattn.attention` does.

    Example:
        >>> import torch, fastattn
        >>> q, k, v = (torch.randn(7, 2, 8) for _ in range(3))
        >>> out = varlen_attention(q, k, v, torch.tensor([0, 3, 7]), mask=fastattn.causal())
        >>> torch.allclose(out[3], v[3])  # the first of its sequence
        True
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"varlen_attention({name}): expected a tensor, got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(
                f"varlen_attention({name}): expected [total, heads, head_dim], got {list(x.shape)}"
            )
    positions = [name for name in ("q_start", "k_start") if name in options]
    if positions:
        raise TypeError(
            f"varlen_attention: expected no {' and '.join(positions)}, positions count from the "
            "start of each sequence"
        )
    options["mask"] = as_mask(options.get("mask")) & documents(cu_seqlens_q, cu_seqlens_k)
    found = api.attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), **options)
    if isinstance(found, tuple):
        return found[0][0].transpose(0, 1), found[1][0]
    return found[0].transpose(0, 1)


def nested_attention(
    q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each sequence of jagged nested tensors.

    Args:
        q: ``[B, H, ragged, D]``, nested with layout `torch.jagged`: ``[B, ragged, H, D]`` transposed, as
            `torch.nn.functional.scaled_dot_product_attention` takes it.
        k: ``[B, H_kv, ragged, D]``.
        v: ``[B, H_kv, ragged, D_v]``, with k's lengths.
        **options: as in `varlen_attention`.

    Returns:
        ``out`` ``[B, H, ragged, D_v]``, nested with q's lengths; with `return_lse` also ``lse``
        ``[B, H, ragged]``.

    Raises:
        TypeError: not all of q, k and v are nested tensors with layout `torch.jagged`.
        ValueError: they do not have these dimensions, batches or lengths; else as `fastattn.attention` does.

    Example:
        >>> import torch
        >>> parts = [torch.randn(n, 2, 8) for n in (3, 5)]
        >>> x = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
        >>> [tuple(one.shape) for one in nested_attention(x, x, x).transpose(1, 2).unbind()]
        [(3, 2, 8), (5, 2, 8)]
    """
    nested = [_heads_last(name, x) for name, x in (("q", q), ("k", k), ("v", v))]
    cu_q, cu_k, cu_v = (x.offsets() for x in nested)
    if cu_q.shape != cu_k.shape or cu_k.shape != cu_v.shape:
        raise ValueError(
            "q, k, v: expected nested tensors of one batch, "
            f"got {cu_q.shape[0] - 1}, {cu_k.shape[0] - 1} and {cu_v.shape[0] - 1} sequences"
        )
    if cu_k is not cu_v:
        if torch.compiler.is_compiling():
            raise ValueError("k, v: expected one and the same offsets tensor under torch.compile, got two")
        if not torch.equal(cu_k, cu_v):
            raise ValueError(
                "k, v: expected sequences of the same lengths, "
                f"got offsets {cu_k.tolist()} and {cu_v.tolist()}"
            )
    q, k, v = (x.values() for x in nested)
    found = varlen_attention(q, k, v, cu_q, cu_k, **options)
    if isinstance(found, tuple):
        out, lse = found
        return _nested(out, cu_q), _nested(lse.transpose(0, 1), cu_q)
    return _nested(found, cu_q)


def _heads_last(name: str, x: Any) -> Any:
    """The nested ``[B, ragged, H, D]`` without holes between the sequences; to mypy no Tensor has offsets."""
    is_tensor = isinstance(x, Tensor)
    if not is_tensor or not x.is_nested or x.layout != torch.jagged:
        got = f"{x.layout}, nested: {x.is_nested}" if is_tensor else type(x).__name__
        raise TypeError(f"{name}: expected q, k and v nested with layout=torch.jagged, got {got}")
    if x.dim() != 4 or x._ragged_idx != 2:
        raise ValueError(
            f"{name}: expected [batch, heads, ragged, head_dim] (a nested [batch, ragged, heads, head_dim] "
            f"transposed), got {list(x.shape)}"
        )
    x = x.transpose(1, 2)
    return x.contiguous() if x.lengths() is not None else x


def _nested(x: Tensor, offsets: Tensor) -> Tensor:
    """Packed ``[T, H, ...]`` as a nested ``[B, H, ragged, ...]``."""
    return torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2)
