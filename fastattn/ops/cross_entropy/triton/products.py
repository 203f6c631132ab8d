"""Matrix products by torch's BLAS, with sums in float32 whatever is multiplied."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(
    a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """``out = a @ b + bias``, or ``out += a @ b``.

    Args:
        a: ``[M, K]``.
        b: ``[K, N]`` in a's dtype.
        out: ``[M, N]`` in that dtype or float32.
        bias: ``[N]``; none where accumulating.
        accumulate: add to what `out` holds.

    Returns:
        out.
    """
    if a.dtype == out.dtype:
        if accumulate:
            return torch.addmm(out, a, b, out=out)
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    if a.device.type == "cpu" or torch.version.hip is not None:  # have no product of another dtype
        product = torch.mm(a.float(), b.float()) if a.device.type == "cpu" else torch.mm(a, b)
        out.add_(product) if accumulate else out.copy_(product)
    elif accumulate:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    if bias is not None:
        out.add_(bias)
    return out
