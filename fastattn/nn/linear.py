"""A linear layer that drops in for torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.linear import linear


class Linear(torch.nn.Linear):
    """`torch.nn.Linear`, its parameters and its state_dict, by `fastattn.linear`.

    Args: those of `torch.nn.Linear`.

    Example:
        >>> import torch, fastattn
        >>> fastattn.nn.Linear(8, 3)(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 3])
    """

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
