"""The MLP as its equation, in eager PyTorch: any device, any dtype, autograd by torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastattn.ops.activations import FUNCTIONS
from fastattn.ops.philox import drop_threshold, dropout_keep


def mlp(
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
    recompute: bool,
) -> Tensor:
    """``residual + dropout(f(x w1ᵀ + b1) w2ᵀ + b2)`` of x ``[rows, in_features]``; see `fastattn.mlp`."""
    f = FUNCTIONS[activation]

    def hidden(x: Tensor) -> Tensor:
        u = F.linear(x, w1, b1)
        return f(u) if gate is None else f(F.linear(x, gate, gate_bias)) * u

    h = checkpoint(hidden, x, use_reentrant=False) if recompute and x.requires_grad else hidden(x)
    out = F.linear(h, w2, b2)
    if seed is not None:
        keep = dropout_keep(seed, dropout, (1, 1, out.shape[0], out.shape[1]))[0, 0]
        out = out * keep * (65536 / (65536 - drop_threshold(dropout)))
    return out if residual is None else residual + out
