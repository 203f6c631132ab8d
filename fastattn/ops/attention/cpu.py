"""Attention by the C++ kernels: lays the tensors out for them. Speaks to `csrc/attention/attention.cpp`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn import _backends
from fastattn.ops.attention.library import new_heads_last
from fastattn.ops.attention.philox import drop_threshold


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    diagonal: int,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """`fastattn::attention_forward` on CPU; see the schema in `library.py`."""
    _backends.require("cpu")
    batch, heads, length, _ = q.shape
    out = new_heads_last(q, batch, heads, length, v.shape[3])
    lse = q.new_empty((batch, heads, length), dtype=torch.float32)
    torch.ops.fastattn_cpu.attention_forward(
        _unit_last(q),
        _unit_last(k),
        _unit_last(v),
        *_problem(mask, lengths, bias, seed, diagonal, scale, dropout),
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
    mask: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    diagonal: int,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastattn::attention_backward` on CPU."""
    _backends.require("cpu")
    dq, dk, dv = (new_heads_last(x, *x.shape) for x in (q, k, v))
    torch.ops.fastattn_cpu.attention_backward(
        _unit_last(dout),
        None if dlse is None else dlse.contiguous(),
        _unit_last(q),
        _unit_last(k),
        _unit_last(v),
        _unit_last(out),
        lse.contiguous(),
        *_problem(mask, lengths, bias, seed, diagonal, scale, dropout),
        dq,
        dk,
        dv,
    )
    return dq, dk, dv


def bias_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    diagonal: int,
    scale: float,
    dropout: float,
) -> Tensor:
    """`fastattn::attention_bias_backward` on CPU."""
    _backends.require("cpu")
    assert bias is not None
    dbias = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
    torch.ops.fastattn_cpu.attention_bias_backward(
        _unit_last(dout),
        None if dlse is None else dlse.contiguous(),
        _unit_last(q),
        _unit_last(k),
        _unit_last(v),
        _unit_last(out),
        lse.contiguous(),
        *_problem(mask, lengths, bias, seed, diagonal, scale, dropout),
        dbias,
    )
    return dbias.to(bias.dtype)


def _unit_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _problem(
    mask: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    diagonal: int,
    scale: float,
    dropout: float,
) -> tuple[object, ...]:
    if bias is not None and bias.dtype == torch.float64:
        bias = bias.to(torch.float32)
    if lengths is not None:
        lengths = lengths.contiguous()
    return mask, lengths, bias, seed, diagonal, scale, drop_threshold(dropout), _backends.cpu_isa_id()
