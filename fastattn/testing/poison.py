"""Uninitialised memory made visible."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic as deterministic


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, `torch.empty` and its kin return NaN (the largest value for integers), so that a read shows.

    Example:
        >>> with poisoned_memory():
        ...     torch.empty(2)
        tensor([nan, nan])
    """
    was = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned_only)
        deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
