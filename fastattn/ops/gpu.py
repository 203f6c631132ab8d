"""What every Triton kernel's launch needs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def power_of_two(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; `triton.cdiv` takes 10 us."""
    return -(-a // b)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it `device`."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def precision(dtype: torch.dtype) -> str:
    """How float32 products are taken: in tensor float 32 only where torch's own are."""
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
