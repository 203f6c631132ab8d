"""The activations of an MLP by name, and their ids in the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return torch.relu(x).square()


# In the order of their ids, csrc/common/activation.h.
FUNCTIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
    "relu": F.relu,
    "relu2": _relu_squared,
}
NAMES: Final = tuple(FUNCTIONS)


def activation_id(name: str) -> int:
    """Its id.

    Raises:
        ValueError: there is no such activation.
    """
    if name not in FUNCTIONS:
        raise ValueError(f"activation: expected one of {list(NAMES)}, got {name!r}")
    return NAMES.index(name)
