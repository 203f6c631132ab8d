"""The two layers behind attention in a transformer's block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.ops.activations import activation_id
from fastattn.ops.mlp import mlp


class MLP(nn.Module):
    """``dropout(fc2(f(fc1(x))))``, or with a gate ``dropout(fc2(f(gate(x)) · fc1(x)))``, by `fastattn.mlp`.

    Args:
        in_features: width of x.
        hidden_features: width between the layers; four times in_features if None.
        out_features: width of the result; in_features if None.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"relu"`` or ``"relu2"``.
        bias: whether the layers have biases.
        gated: whether there is a third layer, `gate`, which the activation is of: SwiGLU, GeGLU.
        dropout: probability, while training.
        recompute: as in `fastattn.mlp`.

    Example:
        >>> import torch, fastattn
        >>> fastattn.nn.MLP(8, activation="silu", gated=True)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
        gated: bool = False,
        dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        activation_id(activation)
        hidden = 4 * in_features if hidden_features is None else hidden_features
        self.activation, self.dropout, self.recompute = activation, dropout, recompute
        self.fc1 = nn.Linear(in_features, hidden, bias)
        self.gate = nn.Linear(in_features, hidden, bias) if gated else None
        self.fc2 = nn.Linear(hidden, in_features if out_features is None else out_features, bias)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, *, seed: int | torch.Tensor | None = None
    ) -> Tensor:
        """x ``[..., in_features]``, to which nothing is added, or `residual` ``[..., out_features]``."""
        return mlp(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.fc2.weight,
            self.fc2.bias,
            self.activation,
            gate=None if self.gate is None else (self.gate.weight, self.gate.bias),
            residual=residual,
            dropout=self.dropout if self.training else 0.0,
            seed=seed,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}, recompute={self.recompute}"
