"""What only Triton's kernels can get wrong: programs that are not apart, tiles fetched by the accelerator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import _backends
from fastattn.testing import Sizes, assert_within_budget, attention_errors, options_of, sizes_for
from tests.attention.cases import INTERPRETED_SIZES, device_of, here, interpreted
from tests.attention.programs import Launch, check, recorded

pytestmark = pytest.mark.skipif("triton" not in here(), reason="triton is not here")
in_interpreter = pytest.mark.skipif(not interpreted("triton"), reason="records what the interpreter does")

# Every kernel, with what decides where its programs read and write.
JOINED = [
    ["causal"],
    ["window", "dropout", "sinks"],
    ["dense-mask", "bias-B1QK"],
    ["block-sparse-causal", "bias-1HQ1", "softcap"],
    ["documents-causal", "alibi-of-each"],
    ["position-ids", "relative-position", "bias-BH1K"],
    ["starts-of-each", "alibi", "bias-1111"],
]


def in_a_frame(x: Tensor) -> Tensor:
    """The same in the middle of a larger tensor: its neighbours in memory are none of its elements."""
    batch, heads, length, dim = x.shape
    frame = torch.full((batch + 2, heads + 1, length + 5, dim + 3), float("nan"), dtype=x.dtype)
    inner = frame[1:-1, :-1, 2:-3, 1:-2]
    return inner.copy_(x)


@in_interpreter
@pytest.mark.parametrize("names", JOINED, ids="-".join)
def test_programs_read_and_write_their_own(names: list[str]) -> None:
    sizes = sizes_for(names, INTERPRETED_SIZES)
    inputs = [in_a_frame(x) for x in sizes.tensors()]
    with recorded() as launches:
        errors = attention_errors(*inputs, backend="triton", **options_of(names, sizes))
    assert_within_budget(errors)  # NaN, which all outputs are made of, is over any
    assert {"_forward", "_dk_dv", "_dq"} <= {launch.kernel for launch in launches}
    for launch in launches:
        check(launch)


@in_interpreter
@pytest.mark.parametrize("paged", [False, True])
def test_programs_of_a_cache_read_and_write_their_own(paged: bool) -> None:
    lengths = torch.tensor([300, 5])
    table = torch.randperm(48).view(2, 24).to(torch.int32) if paged else None
    shape = (48, 1, 16) if paged else (2, 1, 384)
    cache = fastattn.KVCache(torch.randn(*shape, 24), torch.randn(*shape, 17), lengths, table)
    q = torch.randn(2, 2, 2, 24)
    with recorded() as launches, torch.no_grad():
        found = fastattn.attention_with_kv_cache(q, cache, mask=fastattn.causal(), backend="triton")
    want = fastattn.attention_with_kv_cache(q, cache, mask=fastattn.causal(), backend="reference")
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    assert {launch.kernel for launch in launches} == {"_decode", "_merge"}
    for launch in launches:
        check(launch)


@in_interpreter
def test_what_is_recorded_tells_programs_that_are_not_apart() -> None:
    """The recording itself: kernels whose tiles overlap, that read their neighbour's, and out of bounds."""
    import tests.attention.bad_kernels as bad

    for kernel, message in (
        (bad.overlapping, "more than once"),
        (bad.reading_what_another_writes, "loads what another stores"),
        (bad.out_of_bounds, "stores outside"),
    ):
        x = torch.zeros(40)
        with recorded() as launches:
            kernel[(2,)](x[:36], 36, ROWS=16)
        with pytest.raises(AssertionError, match=message):
            check(launches[0])


@pytest.fixture
def with_tma(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles by descriptors of the tensor memory accelerator, as on sm_90, as the interpreter has them."""
    from fastattn.ops.attention.triton import launch

    monkeypatch.setattr(launch, "_has_tma", lambda arch: True)
    yield


@in_interpreter
@pytest.mark.usefixtures("with_tma")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("names", [["causal"], ["dense-mask", "dropout"], ["key-padding"]], ids="-".join)
def test_tiles_by_descriptor(names: list[str], dtype: torch.dtype) -> None:
    """A descriptor is of one head's rows: what follows them in memory is the next head's."""
    sizes = INTERPRETED_SIZES._replace(v_dim=16)
    with recorded() as launches:
        errors = attention_errors(*sizes.tensors(dtype), backend="triton", **options_of(names, sizes))
    assert_within_budget(errors)
    assert {launch.kernel for launch in launches if launch.by_descriptor} == {"_forward", "_dk_dv", "_dq"}
    for launch in launches:
        check(launch)


def test_explain_says_that_it_is_interpreted_or_on_which_architecture() -> None:
    q, k, v = Sizes(1, 2, 1, 5, 7, 8, 8).tensors(device=device_of("triton"))
    found = fastattn.explain(q, k, v, backend="triton")
    assert found.backend == "triton"
    assert found.isa == ("interpreter" if interpreted("triton") else _backends.gpu_architecture(q.device))
    assert "was asked for" in found.reasons["reference"][0]
    doubles = fastattn.explain(q.double(), k.double(), v.double(), backend="triton")
    assert doubles.backend is None and "got torch.float64" in doubles.reasons["triton"][0]
    if interpreted("triton"):
        assert fastattn.explain(q, k, v).backend != "triton"
    else:
        assert fastattn.explain(q, k, v).backend == "triton"


def test_without_the_interpreter_cpu_tensors_are_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = Sizes(1, 2, 1, 5, 7, 8, 8).tensors()
    with pytest.raises(NotImplementedError, match=r"backend='triton' .* TRITON_INTERPRET=1 .* cpu"):
        fastattn.attention(q, k, v, backend="triton")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "triton is not installed"),
        ("3.5.1", "expected triton 3.6 or newer, got 3.5.1"),
        ("2.3", "expected triton 3.6 or newer, got 2.3"),
        ("3.10.0+git1234", None),
    ],
)
def test_a_triton_that_is_absent_or_old_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str | None
) -> None:
    monkeypatch.setattr(_backends, "_triton_version", lambda: version)
    found = _backends.unavailable("triton")
    assert found == [] if reason is None else found[0].startswith(reason)
    _backends._reasons_on.cache_clear()
    q, k, v = Sizes(1, 2, 1, 5, 7, 8, 8).tensors(device=device_of("triton"))
    try:
        assert (fastattn.explain(q, k, v, backend="triton").backend is None) == (reason is not None)
    finally:
        _backends._reasons_on.cache_clear()


def launched(launches: list[Launch]) -> list[str]:
    return [launch.kernel for launch in launches]


@in_interpreter
def test_only_the_gradients_asked_for_are_computed() -> None:
    q, k, v = INTERPRETED_SIZES.tensors()
    bias = torch.randn(1, 1, 33, 70, requires_grad=True)
    with recorded() as launches:
        out = fastattn.attention(q, k, v, bias=bias, backend="triton")
    assert launched(launches) == ["_forward"]
    with recorded() as launches:
        out.sum().backward()
    assert not {"_dk_dv", "_dq"} & set(launched(launches))
