"""Attention by the C++ kernels: lays the tensors out for them. Speaks to `csrc/attention/attention.cpp`.

`problem` is what the schemas in `library.py` share: mask, lengths, bias, seed, diagonal, scale, dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import _backends
from fastattn.ops.attention.library import new_heads_last
from fastattn.ops.attention.philox import drop_threshold


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


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *problem: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastattn::attention_backward` on CPU."""
    dq, dk, dv = (new_heads_last(x, *x.shape) for x in (q, k, v))
    saved = _saved(dout, dlse, q, k, v, out, lse)
    torch.ops.fastattn_cpu.attention_backward(*saved, *_problem(*problem), dq, dk, dv)
    return dq, dk, dv


def bias_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *problem: Any,
) -> Tensor:
    """`fastattn::attention_bias_backward` on CPU."""
    bias: Tensor = problem[2]
    dbias = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
    saved = _saved(dout, dlse, q, k, v, out, lse)
    torch.ops.fastattn_cpu.attention_bias_backward(*saved, *_problem(*problem), dbias)
    return dbias.to(bias.dtype)


def _saved(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor | None, ...]:
    _backends.require("cpu")
    dlse = None if dlse is None else dlse.contiguous()
    q, k, v, out, dout = (_unit_last(x) for x in (q, k, v, out, dout))
    return dout, dlse, q, k, v, out, lse.contiguous()


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
