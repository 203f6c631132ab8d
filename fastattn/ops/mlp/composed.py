"""The MLP out of matrix products with epilogues, which a backend brings."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.ops.activations import activation_id
from fastattn.ops.linear.epilogues import ACTIVATE, GATE, GATE_SLOPE, SLOPE
from fastattn.ops.linear.gradients import column_sums, weight_gradient
from fastattn.ops.mlp.library import LAYERS


class Products(NamedTuple):
    """What a backend brings.

    Attributes:
        matmul: ``matmul(a, b, out, bias=None, accumulate=False)``.
        gemm: ``gemm(a, b, out, bias, epilogue, activation, u, gate, h, d)``, as csrc/linear/problem.h has it.
        dropout_add: ``dropout_add(x, residual, seed, dropout, out)``; out may be x.
    """

    matmul: Callable[..., Tensor]
    gemm: Callable[..., Tensor]
    dropout_add: Callable[..., Tensor]


def forward(
    by: Products,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastattn::mlp_forward`."""
    kind, shape = activation_id(activation), (x.shape[0], w1.shape[0])
    u, h = x.new_empty(shape if keep else (0,)), x.new_empty(shape)
    kept = u if keep else None
    if gate is None:
        g = x.new_empty((0,))
        by.gemm(x, w1.t(), h, bias=b1, epilogue=ACTIVATE, activation=kind, u=kept)
    else:
        g = by.matmul(x, gate.t(), x.new_empty(shape), bias=gate_bias)
        by.gemm(x, w1.t(), h, bias=b1, epilogue=GATE, activation=kind, u=kept, gate=g)
    out = by.matmul(h, w2.t(), x.new_empty((x.shape[0], w2.shape[0])), bias=b2)
    if residual is not None or seed is not None:
        by.dropout_add(out, residual, seed, dropout, out)
    return out, u, g if keep else x.new_empty((0,))


def backward(
    by: Products,
    dout: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    u: Tensor,
    g: Tensor,
    seed: Tensor | None,
    dropout: float,
    activation: str,
    wanted: int,
) -> tuple[Tensor, ...]:
    """`fastattn::mlp_backward`."""
    want_x, want_w1, want_b1, want_w2, want_b2, want_gate, want_gate_bias = (
        wanted >> i & 1 for i in range(len(LAYERS))
    )
    kind, shape = activation_id(activation), (x.shape[0], w1.shape[0])
    dx, dw1, db1, dw2, db2, dgate, dgate_bias = (x.new_empty((0,)) for _ in LAYERS)
    dout = dout.contiguous()
    if seed is not None:
        dout = by.dropout_add(dout, None, seed, dropout, torch.empty_like(dout))
    if want_b2:
        db2 = column_sums(dout)
    if not (want_x or want_w1 or want_b1 or want_w2 or want_gate or want_gate_bias):
        return dx, dw1, db1, dw2, db2, dgate, dgate_bias
    if u.dim() == 1:
        u = by.matmul(x, w1.t(), x.new_empty(shape), bias=b1)
        if gate is not None:
            g = by.matmul(x, gate.t(), x.new_empty(shape), bias=gate_bias)

    # dh = dout w2, and from it at once what reaches u and g; h again, for dw2.
    du, h = x.new_empty(shape), x.new_empty(shape) if want_w2 else None
    if gate is None:
        by.gemm(dout, w2, du, epilogue=SLOPE, activation=kind, u=u, h=h)
        dg = x.new_empty((0,))
    else:
        dg = x.new_empty(shape)
        by.gemm(dout, w2, du, epilogue=GATE_SLOPE, activation=kind, u=u, gate=g, h=h, d=dg)
    if h is not None:
        dw2 = weight_gradient(by.matmul, dout, h, w2)
    if want_w1:
        dw1 = weight_gradient(by.matmul, du, x, w1)
    if want_b1:
        db1 = column_sums(du)
    if gate is not None and want_gate:
        dgate = weight_gradient(by.matmul, dg, x, gate)
    if want_gate_bias:
        dgate_bias = column_sums(dg)
    if want_x:
        # The sum of two products is rounded once.
        dx = x.new_empty(x.shape, dtype=torch.float32 if gate is not None else x.dtype)
        by.matmul(du, w1, dx)
        if gate is not None:
            dx = by.matmul(dg, gate, dx, accumulate=True).to(x.dtype)
    return dx, dw1, db1, dw2, db2, dgate, dgate_bias
