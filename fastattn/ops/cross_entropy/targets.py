"""Targets that name no class."""

from __future__ import annotations

import torch
from torch import Tensor


def check_targets(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError unless every target is a class or `ignore_index`; on a GPU, a failed assertion there.

    Args:
        target: int64, any shape.
        classes: how many there are.
        ignore_index: what may stand in a target's place.
    """
    if target.device.type == "cpu":
        if target.numel() == 0:
            return
        least, most = target.aminmax()
        if int(least) >= 0 and int(most) < classes:
            return
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if target.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"target: expected 0 to {classes - 1} or {ignore_index}")
    elif bool(wrong.any()):
        got = int(target[wrong][0])
        raise IndexError(f"target: expected 0 to {classes - 1} or ignore_index={ignore_index}, got {got}")
