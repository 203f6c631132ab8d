"""The tests' own ground: uninitialised memory is poisoned."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_uninitialised_memory_is_nan(dtype: torch.dtype) -> None:
    like = torch.ones(2, 3, dtype=dtype)
    for made in (
        torch.empty(2, 3, dtype=dtype),
        like.new_empty(2, 3),
        torch.empty_like(like),
        torch.empty_strided((2, 3), (1, 2), dtype=dtype),
        torch.ones(1, dtype=dtype).resize_(6)[1:],
    ):
        assert made.isnan().all()
