"""Liger's names: the same calls, the same results as plain PyTorch's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fastattn.integrations import liger

close = torch.testing.assert_close


def test_cross_entropy() -> None:
    logits, target = torch.randn(9, 20), torch.randint(20, (9,))
    close(
        liger.liger_cross_entropy(logits, target, ignore_index=3),
        F.cross_entropy(logits, target, ignore_index=3),
    )
    found = liger.LigerCrossEntropyLoss(label_smoothing=0.1, lse_square_scale=0.5, softcap=5.0)(
        logits, target
    )
    capped = 5 * torch.tanh(logits / 5)
    z = 0.5 * capped.logsumexp(-1).square().mean()
    close(found, F.cross_entropy(capped, target, label_smoothing=0.1) + z)


def test_fused_linear_cross_entropy() -> None:
    x, weight, bias = torch.randn(9, 8), torch.randn(20, 8), torch.randn(20)
    target = torch.randint(20, (9,))
    want = F.cross_entropy(F.linear(x, weight, bias), target)
    close(liger.liger_fused_linear_cross_entropy(x, weight, target, bias), want)
    close(liger.LigerFusedLinearCrossEntropyLoss()(weight, x, target, bias), want)


def test_what_is_not_there_raises() -> None:
    x, target = torch.randn(9, 20), torch.randint(20, (9,))
    with pytest.raises(NotImplementedError, match="size_average: expected none, got False"):
        liger.liger_cross_entropy(x, target, size_average=False)
    with pytest.raises(TypeError, match="at most 6 arguments"):
        liger.LigerFusedLinearCrossEntropyLoss(None, -100, 0.0, 0.0, "mean", None, True)
    with pytest.raises(NotImplementedError, match="return_z_loss: expected none"):
        liger.liger_cross_entropy(x, target, return_z_loss=True)
    with pytest.raises(NotImplementedError, match="ce_weight"):
        liger.liger_fused_linear_cross_entropy(x, x, target, ce_weight=torch.ones(20))


def test_norms() -> None:
    x, residual, w, b = torch.randn(4, 6), torch.randn(4, 6), torch.randn(6), torch.randn(6)
    close(liger.liger_layer_norm(x, w, b, 1e-6), F.layer_norm(x, (6,), w, b, 1e-6))
    close(liger.liger_rms_norm(x, w, 1e-6, offset=1.0), F.rms_norm(x, (6,), w + 1, 1e-6))
    out, z = liger.liger_fused_add_rms_norm(x, residual, w, 1e-6)
    close(z, x + residual)
    close(out, F.rms_norm(z, (6,), w, 1e-6))
    close(liger.LigerLayerNorm(6)(x), F.layer_norm(x, (6,), eps=1e-6))
    close(liger.LigerRMSNorm(6)(x), F.rms_norm(x, (6,), eps=1e-6))
    close(liger.LigerRMSNorm(6, offset=1.0)(x), 2 * F.rms_norm(x, (6,), eps=1e-6))


@pytest.mark.parametrize("batch", [1, 2])
def test_rotary(batch: int) -> None:
    q, k = torch.randn(2, 3, 7, 8), torch.randn(2, 1, 7, 8)
    angle = torch.randn(batch, 7, 4)
    cos, sin = (torch.cat((t, t), -1) for t in (angle.cos(), angle.sin()))

    def turned(x: torch.Tensor) -> torch.Tensor:
        half = torch.cat((-x[..., 4:], x[..., :4]), -1)
        return x * cos[:, None] + half * sin[:, None]

    for found, want in zip(liger.liger_rotary_pos_emb(q, k, cos, sin), (turned(q), turned(k)), strict=True):
        close(found, want)


@pytest.mark.parametrize("kind", ["SwiGLU", "GEGLU"])
def test_mlps(kind: str) -> None:
    module = getattr(liger, f"Liger{kind}MLP")(SimpleNamespace(hidden_size=8, intermediate_size=12))
    x = torch.randn(2, 3, 8)
    gate = module.gate_proj(x)
    h = F.silu(gate) if kind == "SwiGLU" else F.gelu(gate, approximate="tanh")
    close(module(x), module.down_proj(h * module.up_proj(x)))
