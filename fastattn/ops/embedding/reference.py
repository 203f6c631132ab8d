"""The embedding as its equation, in eager PyTorch: any device, any dtype, autograd by torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops.philox import drop_threshold, dropout_keep


def embedding(
    ids: Tensor,
    weight: Tensor,
    position_weight: Tensor | None,
    positions: Tensor | None,
    seed: Tensor | None,
    skip: int,
    dropout: float,
) -> Tensor:
    """``dropout(weight[ids] + position_weight[positions])``; arguments as in `library.py`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    out = F.embedding(ids, weight, None if skip < 0 else skip).to(wide)
    if position_weight is not None and positions is not None and len(ids):
        places = F.embedding(positions, position_weight).to(wide)
        out = (out.unflatten(0, (-1, len(positions))) + places).flatten(0, 1)
    if seed is not None:
        keep = dropout_keep(seed, dropout, (1, 1, *out.shape))[0, 0]
        out = out * keep * (65536 / (65536 - drop_threshold(dropout)))
    return out.to(weight.dtype)
