"""The backends that tests are run on, by name, and on which device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from fastattn import _backends
from fastattn.testing import Sizes, force_isa, present_isas

ISAS = ("scalar", "avx2", "avx512", "wide")
ROUTES = ("reference", *(f"cpu-{isa}" for isa in ISAS), "triton")


@contextmanager
def route(name: str) -> Iterator[str]:
    """The backend of a name in `ROUTES`, on its instruction set; skips where that is not present."""
    backend, _, isa = name.partition("-")
    if isa and isa not in present_isas():
        pytest.skip(f"{isa} is not present here")
    reasons = _backends.unavailable(backend)
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    with force_isa(isa) if isa else nullcontext():
        yield backend


def here() -> list[str]:
    """The names in `ROUTES` of what is present."""
    triton = [] if _backends.unavailable("triton") else ["triton"]
    return ["reference", *(f"cpu-{isa}" for isa in present_isas()), *triton]


def device_of(backend: str) -> str:
    """Where tensors for it are: on the GPU, if there is one, for `triton`."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def interpreted(backend: str) -> bool:
    """Whether it is `triton` on CPU tensors, where problems are to be small."""
    return backend == "triton" and device_of(backend) == "cpu"


# Backends whose kernels run at speed, so that problems may be of any size.
KERNELS = ("cpu", "triton") if torch.cuda.is_available() else ("cpu",)


# In the interpreter a tile takes milliseconds: two tiles of queries and three of keys, a group of heads, and
# head dims that are no power of two.
INTERPRETED_SIZES = Sizes(batch=2, heads=2, kv_heads=1, q_length=33, k_length=70, dim=24, v_dim=17)


def fitted(backend: str, sizes: Sizes) -> Sizes:
    """`sizes`, or in the interpreter at most the lengths and the heads of `INTERPRETED_SIZES`."""
    if not interpreted(backend):
        return sizes
    heads, kv_heads, q_length, k_length = INTERPRETED_SIZES[1:5]
    lengths = {"q_length": min(sizes.q_length, q_length), "k_length": min(sizes.k_length, k_length)}
    return sizes._replace(heads=heads, kv_heads=kv_heads, **lengths)
