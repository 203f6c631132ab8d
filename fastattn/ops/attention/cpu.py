"""Attention by the C++ kernels: lays the tensors out for them. Speaks to `csrc/attention/attention.cpp`.

`problem` is what the schemas in `library.py` share: the fields of `Problem`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import _backends
from fastattn.ops.attention.library import new_gradients, new_heads_last
from fastattn.ops.philox import drop_threshold


def forward(q: Tensor, k: Tensor, v: Tensor, *problem: Any) -> tuple[Tensor, Tensor]:
    """`fastattn::attention_forward` on CPU."""
    _backends.require("cpu")
    batch, heads, length, _ = q.shape
    out = new_heads_last(q, batch, heads, length, v.shape[3])
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    torch.ops.fastattn_cpu.attention_forward(
        _unit_last(q), _unit_last(k), _unit_last(v), *_problem(*problem), out, lse
    )
    return out, lse


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    *problem: Any,
) -> tuple[Tensor, Tensor]:
    """Few queries against a cache, split over its keys.

    Args:
        q: ``[B, H, L_q, D]``.
        k: ``[pages, H_kv, page_size, D]`` in q's dtype, int8 or float8_e4m3fn.
        v: ``[pages, H_kv, page_size, D_v]`` in k's dtype.
        block_table: int32 ``[B, n]``, the pages of each sequence in order; page b is sequence b if None.
            Entries for keys that no query sees are not read.
        k_scale: float32 ``[B, H_kv]``, factor on what k stores.
        v_scale: float32 ``[B, H_kv]``, factor on what v stores.
        problem: with ``L_k = n · page_size``.
    """
    _backends.require("cpu")
    batch, heads, length, _ = q.shape
    out = new_heads_last(q, batch, heads, length, v.shape[3])
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    if block_table is not None:
        block_table = block_table.contiguous()
    torch.ops.fastattn_cpu.attention_decode(
        _unit_last(q),
        _unit_last(k),
        _unit_last(v),
        block_table,
        k_scale,
        v_scale,
        *_problem(*problem),
        out,
        lse,
    )
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *problem: Any,
) -> tuple[Tensor, ...]:
    """`fastattn::attention_backward` on CPU."""
    _backends.require("cpu")
    *given, wanted = problem
    grads = new_gradients(q, k, v, lse, given, wanted)
    dlse = None if dlse is None else dlse.contiguous()
    q, k, v, out, dout = (_unit_last(x) for x in (q, k, v, out, dout))
    torch.ops.fastattn_cpu.attention_backward(
        dout, dlse, q, k, v, out, lse.contiguous(), *_problem(*given), wanted, *grads
    )
    return grads


def _unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _problem(*problem: Any) -> tuple[object, ...]:
    """The trailing arguments of the C++ ops: tensors as they take them, dropout in 65,536ths."""
    mask, blocks, ranges, bias, relative, origin, sinks, seed, *options, dropout = problem
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.to(torch.float32)
    blocks, ranges, relative, origin, sinks = (
        x if x is None else x.contiguous() for x in (blocks, ranges, relative, origin, sinks)
    )
    tensors = (mask, blocks, ranges, bias, relative, origin, sinks, seed)
    return (*tensors, *options, drop_threshold(dropout), _backends.cpu_isa_id())
