"""Liger Kernel's names for fastattn's fused operations: swap the import, keep the calls.

The functions are those of `liger_kernel.transformers.functional`, the classes those of
`liger_kernel.transformers`, with their arguments in their order; what fastattn has no counterpart of raises.
Where Liger needs a GPU, these run on CPUs too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn.nn import LayerNorm, RMSNorm
from fastattn.ops.cross_entropy import cross_entropy, linear_cross_entropy
from fastattn.ops.layer_norm import dropout_add_rms_norm, layer_norm, rms_norm
from fastattn.ops.mlp import mlp
from fastattn.ops.rotary import rotary

__all__ = [
    "LigerCrossEntropyLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerGEGLUMLP",
    "LigerLayerNorm",
    "LigerRMSNorm",
    "LigerSwiGLUMLP",
    "liger_cross_entropy",
    "liger_fused_add_rms_norm",
    "liger_fused_linear_cross_entropy",
    "liger_layer_norm",
    "liger_rms_norm",
    "liger_rotary_pos_emb",
]


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and not (value is False and name == "return_z_loss"):
            raise NotImplementedError(f"{name}: expected none, got {value!r}: there is no such option here")


def _by_name(names: tuple[str, ...], args: tuple[Any, ...]) -> dict[str, Any]:
    if len(args) > len(names):
        raise TypeError(f"expected at most {len(names)} arguments {list(names)}, got {len(args)}")
    return dict(zip(names, args, strict=False))


def liger_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
) -> Tensor:
    """`fastattn.cross_entropy`; `lse_square_scale` is its z_loss.

    Args:
        input: logits ``[N, V]``.
        target: int64 ``[N]``.
        weight, ignore_index, reduction, label_smoothing, softcap: as there.
        lse_square_scale: factor of the squared log-sum-exp that is added.
        size_average, reduce, return_z_loss: not there; they raise.

    Returns:
        The loss, a scalar, or ``[N]`` with reduction ``"none"``.

    Raises:
        NotImplementedError: an argument that is not there.
    """
    _refuse(size_average=size_average, reduce=reduce, return_z_loss=return_z_loss)
    return cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        z_loss=lse_square_scale,
    )


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
) -> Tensor:
    """`fastattn.linear_cross_entropy`; `lse_square_scale` is its z_loss.

    Args:
        input: ``[N, D]``.
        weight: of the head, ``[V, D]``.
        target: int64 ``[N]``.
        bias: ``[V]`` or None.
        ignore_index, label_smoothing, reduction, softcap: as there.
        lse_square_scale: factor of the squared log-sum-exp that is added.
        ce_weight, return_z_loss: not there; they raise.

    Returns:
        The loss, a scalar, or ``[N]`` with reduction ``"none"``.

    Raises:
        NotImplementedError: an argument that is not there.
    """
    _refuse(ce_weight=ce_weight, return_z_loss=return_z_loss)
    return linear_cross_entropy(
        input,
        weight,
        target,
        bias,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        z_loss=lse_square_scale,
    )


def liger_layer_norm(X: Tensor, W: Tensor, B: Tensor, eps: float) -> Tensor:
    """`fastattn.layer_norm` of X ``[..., D]`` with weight W and bias B ``[D]``."""
    return layer_norm(X, W.shape, W, B, eps)


def liger_rms_norm(X: Tensor, W: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`fastattn.rms_norm` of X ``[..., D]`` with weight ``W + offset`` ``[D]``."""
    return rms_norm(X, W.shape, W, eps, weight_offset=offset)


def liger_fused_add_rms_norm(
    X: Tensor, R: Tensor, W: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(X + R), X + R)``, by `fastattn.dropout_add_rms_norm` without dropout."""
    out, z = dropout_add_rms_norm(X, R, W, eps=eps, weight_offset=offset, prenorm=True)
    return out, z


def liger_rotary_pos_emb(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb` by `fastattn.rotary`.

    Args:
        q: ``[B, H, L, D]``.
        k: ``[B, H_kv, L, D]``.
        cos: ``[1 or B, L, D]``, each half of the last dimension the same.
        sin: likewise.
        position_ids: not used, as in Liger.
        unsqueeze_dim: 1, where the heads are.

    Returns:
        q and k, turned.

    Raises:
        NotImplementedError: another `unsqueeze_dim`.
    """
    if unsqueeze_dim != 1:
        raise NotImplementedError(f"unsqueeze_dim: expected 1, got {unsqueeze_dim}")
    half = cos.shape[-1] // 2
    length = cos.shape[1]
    # One table for each sequence: its rows are told apart by their positions.
    places = torch.arange(cos.shape[0] * length, device=q.device).view(cos.shape[0], length)
    rows = [x[..., :half].reshape(-1, half) for x in (cos, sin)]
    if cos.shape[0] == 1:
        return rotary(q, *rows), rotary(k, *rows)
    return rotary(q, *rows, positions=places), rotary(k, *rows, positions=places)


class LigerCrossEntropyLoss(nn.Module):
    """`liger_cross_entropy` with the options it is made with; called with logits and target."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        names = ("weight", "ignore_index", "lse_square_scale", "label_smoothing", "reduction", "softcap")
        self.options = _by_name(names, args) | options

    def forward(self, _input: Tensor, target: Tensor) -> Tensor:
        return liger_cross_entropy(_input, target, **self.options)


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """`liger_fused_linear_cross_entropy` with the options it is made with; called with the head's weight, x,
    target and the head's bias."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        names = ("ce_weight", "ignore_index", "lse_square_scale", "label_smoothing", "reduction", "softcap")
        self.options = _by_name(names, args) | options

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        return liger_fused_linear_cross_entropy(_input, lin_weight, target, bias, **self.options)


class LigerLayerNorm(LayerNorm):
    """`fastattn.nn.LayerNorm`, made as Liger's."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, bias: bool = True) -> None:
        super().__init__(hidden_size, eps, bias=bias)


class LigerRMSNorm(RMSNorm):
    """`fastattn.rms_norm` with ``weight + offset``, made as Liger's."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, offset: float = 0.0) -> None:
        super().__init__(hidden_size, eps)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return liger_rms_norm(x, self.weight, self.eps or 1e-6, self.offset)


class _GatedMLP(nn.Module):
    activation = ""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        w1, w2 = self.up_proj.weight, self.down_proj.weight
        return mlp(x, w1, None, w2, None, self.activation, gate=self.gate_proj.weight)


class LigerSwiGLUMLP(_GatedMLP):
    """Llama's MLP: `config` has ``hidden_size`` and ``intermediate_size``."""

    activation = "silu"


class LigerGEGLUMLP(_GatedMLP):
    """Gemma's MLP, with the tanh form of GELU: `config` has ``hidden_size`` and ``intermediate_size``."""

    activation = "gelu_tanh"
