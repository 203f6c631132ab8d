"""Norms that drop in for torch's, and one behind dropout and a residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops.layer_norm import dropout_add_layer_norm, layer_norm, rms_norm


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm`, its parameters and its state_dict, by `fastattn.layer_norm`.

    Args: those of `torch.nn.LayerNorm`.

    Example:
        >>> import torch, fastattn
        >>> fastattn.nn.LayerNorm(8)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm`, its parameters and its state_dict, by `fastattn.rms_norm`.

    Args: those of `torch.nn.RMSNorm`.

    Example:
        >>> import torch, fastattn
        >>> fastattn.nn.RMSNorm(8)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


class DropoutAddLayerNorm(torch.nn.LayerNorm):
    """``layer_norm(residual + dropout(x))`` by `fastattn.dropout_add_layer_norm`; no dropout in eval mode.

    Its state_dict is that of the `torch.nn.LayerNorm` it takes the place of.

    Args:
        normalized_shape: of the last dimensions of x.
        dropout: probability with which an element of x is dropped.
        prenorm: return the sum too, the residual of the next layer.
        options: eps, elementwise_affine, bias, device and dtype as in `torch.nn.LayerNorm`.

    Raises:
        ValueError: a dropout outside of [0, 1), or neither weights nor a single dimension.

    Example:
        >>> import torch, fastattn
        >>> norm = fastattn.nn.DropoutAddLayerNorm(8, dropout=0.1, prenorm=True)
        >>> out, residual = norm(torch.randn(2, 5, 8), torch.randn(2, 5, 8))
        >>> out.shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        dropout: float = 0.0,
        *,
        prenorm: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(normalized_shape, **options)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        if not self.elementwise_affine and len(self.normalized_shape) > 1:
            raise ValueError(
                "normalized_shape: expected one dimension with elementwise_affine=False, "
                f"got {self.normalized_shape}"
            )
        self.dropout, self.prenorm = dropout, prenorm

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return dropout_add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            dropout=self.dropout if self.training else 0.0,
            eps=self.eps,
            prenorm=self.prenorm,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}, prenorm={self.prenorm}"
