"""Two and three features at once, of any sizes, on any backend: drawn, the same on every run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastattn
from fastattn.testing import (
    FEATURES,
    Sizes,
    assert_within_budget,
    attention_errors,
    go_together,
    options_of,
    present_isas,
    sizes_for,
)
from tests.attention.cases import device_of, fitted, interpreted, route

SETTINGS = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "derandomize": True,
    "database": None,
}
SIZES = st.builds(
    lambda batch, kv_heads, group, q_length, k_length, dim, v_dim: Sizes(
        batch, kv_heads * group, kv_heads, q_length, k_length, dim, v_dim
    ),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    q_length=st.integers(1, 110),
    k_length=st.integers(1, 150),
    dim=st.integers(1, 40),
    v_dim=st.integers(1, 40),
)
# The gradient of a bias that is one number cancels: its error is that of far larger sums.
JOINED = [name for name in FEATURES if name != "bias-1111"]
FEW = st.lists(st.sampled_from(JOINED), min_size=2, max_size=3, unique=True)
HERE = ["reference", *(f"cpu-{isa}" for isa in present_isas())]
# What a Triton kernel could take for something else: a tile's list for its interval, the rows of a bias for a
# document's, an index for a position.
CONFUSABLE = [
    ["dense-mask", "dropout"],
    ["block-sparse", "dropout", "window"],
    ["two-block-sizes", "causal", "sinks"],
    ["either-of-three", "bias-BHQK", "softcap"],
    ["documents-causal", "bias-1HQK"],
    ["documents-causal", "alibi-of-each", "dropout"],
    ["position-ids", "relative-position", "window"],
    ["key-padding", "relative-position", "causal-top-left"],
    ["starts-of-each", "alibi", "bias-B11K", "sinks"],
    ["starts", "dropout", "first-keys-and-window"],
    ["prefix-of-each", "block-sparse-causal", "softcap"],
    ["dense-mask-of-keys", "bias-of-infinities-and-alibi", "scale"],
    ["sum-of-biases", "chunked", "dropout"],
]


def longer(sizes: Sizes) -> Sizes:
    """More rows and keys than one, for half precision."""
    return sizes._replace(q_length=sizes.q_length + 15, k_length=sizes.k_length + 15, dim=sizes.dim + 7)


@settings(max_examples=250, **SETTINGS)
@given(
    names=FEW,
    sizes=SIZES,
    name=st.sampled_from(HERE),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
)
def test_features_joined(names: list[str], sizes: Sizes, name: str, dtype: torch.dtype) -> None:
    assume(go_together(names))
    if dtype != torch.float32:
        # Backward takes rowsum(dout · out) of the rounded out: that is all there is of a lone row with one
        # key, and much of a slope, whose gradient is one sum over all pairs (test_features.py has it in half
        # precision).
        assume(not any("alibi" in one or "slopes" in one for one in names))
        sizes = longer(sizes)
    sizes = sizes_for(names, sizes)
    with route(name) as backend:
        options = options_of(names, sizes)
        assert_within_budget(attention_errors(*sizes.tensors(dtype), backend=backend, **options))


@pytest.mark.skipif(not present_isas(), reason="the C++ library is not here")
@settings(max_examples=25, **SETTINGS)
@given(names=FEW, q_length=st.integers(200, 700), k_length=st.integers(200, 1200))
def test_features_joined_over_many_tiles(names: list[str], q_length: int, k_length: int) -> None:
    assume(go_together(names))
    sizes = sizes_for(names, Sizes(1, 2, 1, q_length, k_length, 8, 8))
    assert_within_budget(attention_errors(*sizes.tensors(), backend="cpu", **options_of(names, sizes)))


@pytest.mark.skipif(not present_isas(), reason="the C++ library is not here")
@settings(max_examples=60, **SETTINGS)
@given(names=FEW, sizes=SIZES)
def test_backends_drop_the_same(names: list[str], sizes: Sizes) -> None:
    """With dropout a wrong element would be far out of any tolerance."""
    names = [name for name in names if name not in ("dropout", "starts-of-each")]
    assume(go_together(names))
    sizes = sizes_for(names, sizes)
    q, k, v = sizes.tensors()
    options = options_of([*names, "dropout"], sizes)
    results = []
    for name in HERE:
        with route(name) as backend:
            results.append(fastattn.attention(q, k, v, backend=backend, **options))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("names", CONFUSABLE, ids="-".join)
def test_confusable_features_joined_on_triton(names: list[str]) -> None:
    with route("triton") as backend:
        sizes = sizes_for(names, fitted(backend, Sizes(q_length=100, k_length=300)))
        device = device_of(backend)
        options = options_of(names, sizes, device=device)
        assert_within_budget(attention_errors(*sizes.tensors(device=device), backend=backend, **options))


@settings(max_examples=5 if interpreted("triton") else 250, **SETTINGS)
@given(names=FEW, sizes=SIZES, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_features_joined_on_triton(names: list[str], sizes: Sizes, dtype: torch.dtype) -> None:
    assume(go_together(names))
    if dtype != torch.float32:
        assume(not any("alibi" in one or "slopes" in one for one in names))
        sizes = longer(sizes)
    with route("triton") as backend:
        sizes, device = sizes_for(names, fitted(backend, sizes)), device_of(backend)
        options = options_of(names, sizes, device=device)
        inputs = sizes.tensors(dtype, device=device)
        assert_within_budget(attention_errors(*inputs, backend=backend, **options))


@pytest.mark.parametrize("other", ["window", "documents-causal", "block-sparse", "starts"])
def test_triton_drops_what_the_reference_drops(other: str) -> None:
    with route("triton") as backend:
        sizes, device = fitted(backend, Sizes(q_length=100, k_length=300)), device_of(backend)
        q, k, v = sizes.tensors(device=device)
        options = options_of([other, "dropout"], sizes, device=device)
        found = fastattn.attention(q, k, v, backend=backend, **options)
        want = fastattn.attention(q, k, v, backend="reference", **options)
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
