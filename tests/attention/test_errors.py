"""Bad input: the right exception, with what was expected and what was given."""

# ruff: noqa: E501 (a table reads best with a row a line)

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn import attention
from fastattn.ops.attention.api import attention_backward
from fastattn.ops.attention.problem import resolve


def t(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


q = t(2, 4, 5, 8)
kv = t(2, 4, 7, 8)

BAD = {
    "rank": (lambda: attention(t(4, 5, 8), kv, kv), ValueError, r"q: expected 4 dimensions .* got \[4, 5, 8\]"),
    "not a tensor": (lambda: attention([1], kv, kv), TypeError, "q: expected a tensor, got list"),
    "int": (lambda: attention(q.long(), kv, kv), TypeError, "q: expected float32.*got torch.int64"),
    "mixed dtypes": (lambda: attention(q, kv.half(), kv), TypeError, "k: expected q's dtype torch.float32, got torch.float16"),
    "mixed devices": (lambda: attention(q, t(2, 4, 7, 8, device="meta"), kv), ValueError, "k: expected q's device cpu, got meta"),
    "batch": (lambda: attention(q, t(3, 4, 7, 8), kv), ValueError, "batch: expected q's 2, got 3 in k and 2 in v"),
    "k and v": (lambda: attention(q, kv, t(2, 4, 6, 8)), ValueError, r"v: expected .*\[4, 7\], got \[4, 6\]"),
    "head_dim": (lambda: attention(q, t(2, 4, 7, 9), kv), ValueError, "k: expected q's head_dim 8, got 9"),
    "head_dim 0": (lambda: attention(t(2, 4, 5, 0), t(2, 4, 7, 0), kv), ValueError, "head_dim of q and k: expected 1 to 512, got 0"),
    "head_dim 513": (lambda: attention(q, kv, t(2, 4, 7, 513)), ValueError, "head_dim of v: expected 1 to 512, got 513"),
    "heads": (lambda: attention(q, t(2, 3, 7, 8), t(2, 3, 7, 8)), ValueError, "expected k's 3 to divide q's 4"),
    "no kv heads": (lambda: attention(q, t(2, 0, 7, 8), t(2, 0, 7, 8)), ValueError, "expected k's 0 to divide q's 4"),
    "dropout 1": (lambda: attention(q, kv, kv, dropout=1.0), ValueError, r"dropout: expected .*\[0, 1\), got 1.0"),
    "dropout < 0": (lambda: attention(q, kv, kv, dropout=-0.1), ValueError, "dropout: .* got -0.1"),
    "dropout nan": (lambda: attention(q, kv, kv, dropout=float("nan")), ValueError, "dropout: .* got nan"),
    "seed": (lambda: attention(q, kv, kv, dropout=0.1, seed=-1), ValueError, "seed: expected an int in .* got -1"),
    "seed unused": (lambda: attention(q, kv, kv, seed=2**63), ValueError, "seed: expected an int in"),
    "seed dtype": (lambda: attention(q, kv, kv, dropout=0.1, seed=t(1)), ValueError, "seed: expected an int64 tensor .* got torch.float32"),
    "backend": (lambda: attention(q, kv, kv, backend="cuda"), ValueError, r"backend: expected one of \['cpu', 'triton', 'reference'\], got 'cuda'"),
    "backend can't": (lambda: attention(q.double(), kv.double(), kv.double(), backend="cpu"), NotImplementedError, "backend='cpu' can't run this: .*float64"),
    "float mask": (lambda: attention(q, kv, kv, mask=t(5, 7)), TypeError, "mask: expected a bool tensor .* bias="),
    "mask type": (lambda: attention(q, kv, kv, mask="causal"), TypeError, r"mask: expected a fastattn mask.* got str; masks are made by a call"),
    "mask shape": (lambda: attention(q, kv, kv, mask=t(5, 6, dtype=torch.bool)), ValueError, r"mask: .*\[2, 4, 5, 7\], got \[1, 1, 5, 6\]"),
    "mask rank": (lambda: attention(q, kv, kv, mask=t(1, 1, 1, 5, 7, dtype=torch.bool)), ValueError, "mask: expected a shape"),
    "mask device": (lambda: attention(q, kv, kv, mask=t(5, 7, dtype=torch.bool, device="meta")), ValueError, "mask: expected q's device"),
    "bias dtype": (lambda: attention(q, kv, kv, bias=t(1, 1, 5, 7, dtype=torch.bool)), TypeError, "bias: expected float32.* mask="),
    "bias rank": (lambda: attention(q, kv, kv, bias=t(5, 7)), ValueError, r"bias: expected 4 dimensions .* got \[5, 7\]"),
    "bias shape": (lambda: attention(q, kv, kv, bias=t(1, 3, 5, 7)), ValueError, r"bias: .* got \[1, 3, 5, 7\]"),
    "align": (lambda: fastattn.causal("left"), ValueError, "align.* got 'left'"),
    "lengths dtype": (lambda: fastattn.key_padding(t(2)), TypeError, "lengths.*got torch.float32"),
    "lengths bool": (lambda: fastattn.key_padding(t(2, dtype=torch.bool)), TypeError, "lengths.*got torch.bool"),
    "lengths rank": (lambda: fastattn.key_padding(t(2, 7, dtype=torch.long)), ValueError, r"lengths.* got \[2, 7\]"),
    "lengths over": (lambda: attention(q, kv, kv, mask=fastattn.key_padding(torch.tensor([7, 8]))), ValueError, r"values from 0 to 7 .* got \[7, 8\]"),
    "lengths below": (lambda: attention(q, kv, kv, mask=fastattn.key_padding(torch.tensor([-1, 7]))), ValueError, r"got \[-1, 7\]"),
    "lengths and lengths": (lambda: fastattn.key_padding(torch.tensor([1])) & fastattn.key_padding(torch.tensor([1, 2])), ValueError, "same batch"),
    "float seed": (lambda: attention(q, kv, kv, dropout=0.1, seed=1.7), TypeError, "seed: expected an int.* got 1.7"),
    "float8 bias": (lambda: attention(q, kv, kv, bias=t(1, 1, 5, 7).to(torch.float8_e4m3fn)), TypeError, "bias: expected float32"),
    "window float": (lambda: fastattn.sliding_window(2.5, 0), TypeError, r"sliding_window\(left=\): expected an int, or None for all, got 2.5"),
    "window str": (lambda: fastattn.sliding_window(0, "a"), TypeError, r"sliding_window\(right=\): expected an int.* got str"),
    "window below": (lambda: fastattn.sliding_window(-1, 0), ValueError, r"sliding_window\(left=\): expected 0 or more, or None for all, got -1"),
    "chunk float": (lambda: fastattn.chunked(2.5), TypeError, r"chunked\(size\): expected an int, got 2.5"),
    "prefix float": (lambda: fastattn.prefix(2.5), TypeError, r"prefix\(n\): expected an int, or an integer tensor \[B\], got 2.5"),
    "block size float": (lambda: fastattn.block_sparse(t(2, 2, dtype=torch.bool), 4.0), TypeError, r"block_sparse\(block_size\): expected an int, or two, got 4.0"),
    "three block sizes": (lambda: fastattn.block_sparse(t(2, 2, dtype=torch.bool), (4, 4, 4)), TypeError, r"block_sparse\(block_size\): expected an int or two, got \(4, 4, 4\)"),
    "block size 0": (lambda: fastattn.block_sparse(t(2, 2, dtype=torch.bool), (4, 0)), ValueError, r"block_sparse\(block_size\): expected 1 or more.* got 0"),
    "start float": (lambda: attention(q, kv, kv, q_start=1.5), TypeError, r"q_start: expected an int, or an integer tensor \[B\], got 1.5"),
    "start far": (lambda: attention(q, kv, kv, q_start=2**31), ValueError, r"q_start: expected a position below 2\^31, got 2147483648"),
    "k_start far": (lambda: attention(q, kv, kv, k_start=2**40), ValueError, r"k_start: expected a position below 2\^31"),
    "k_start bool": (lambda: attention(q, kv, kv, k_start=True), TypeError, "k_start: expected an int, got bool"),
    "softcap str": (lambda: attention(q, kv, kv, softcap="a"), TypeError, "softcap: expected a number, got str"),
    "softcap inf": (lambda: attention(q, kv, kv, softcap=float("inf")), ValueError, "softcap: expected a finite number above 0, or None, got inf"),
    "softcap nan": (lambda: attention(q, kv, kv, softcap=float("nan")), ValueError, "softcap: expected a finite .* got nan"),
    "dropout str": (lambda: attention(q, kv, kv, dropout="a"), TypeError, "dropout: expected a number, got str"),
    "str seed": (lambda: attention(q, kv, kv, dropout=0.1, seed="a"), TypeError, "seed: expected an int or an int64 tensor, got str"),
    "bool tensors": (lambda: fastattn.Mask() & t(5, 7, dtype=torch.bool) & t(5, 6, dtype=torch.bool), ValueError, r"mask & mask: expected bool tensors that broadcast, got \[5, 7\] and \[5, 6\]"),
    "blocks and blocks": (lambda: fastattn.block_sparse(t(2, 2, dtype=torch.bool), 4) & fastattn.block_sparse(t(3, 2, dtype=torch.bool), 4), ValueError, r"block_sparse\(blocks\) joined .* got \[1, 1, 2, 2\] of size \(4, 4\) and \[1, 1, 3, 2\]"),
    "few buckets": (lambda: fastattn.relative_position(t(3, 4)), ValueError, r"relative_position\(table\): expected at least 4 buckets, got \[3, 4\]"),
    "max_distance": (lambda: fastattn.relative_position(t(32, 4), max_distance=8), ValueError, r"relative_position\(max_distance=\): expected more than 8.* 32 buckets .*got 8"),
    "dout dtype": (lambda: attention_backward(q.half(), q, kv, kv, q, q[..., 0]), TypeError, "dout: expected torch.float32, got torch.float16"),
    "out dtype": (lambda: attention_backward(q, q, kv, kv, q.half(), q[..., 0]), TypeError, "out: expected torch.float32, got torch.float16"),
    "lse dtype": (lambda: attention_backward(q, q, kv, kv, q, q[..., 0].double()), TypeError, "lse: expected torch.float32, got torch.float64"),
    "dlse dtype": (lambda: attention_backward(q, q, kv, kv, q, q[..., 0], dlse=q[..., 0].half()), TypeError, "dlse: expected torch.float32, got torch.float16"),
    "dlse shape": (lambda: attention_backward(q, q, kv, kv, q, q[..., 0], dlse=t(2, 4, 4)), ValueError, r"dlse: expected \[2, 4, 5\], got \[2, 4, 4\]"),
    "lengths batch": (lambda: attention(q, kv, kv, mask=fastattn.key_padding(torch.tensor([1, 2, 3]))), ValueError, "expected 2 lengths .* got 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, exception, message = BAD[name]
    with pytest.raises(exception, match=message):
        call()


def test_explain_says_what_runs_and_why_not_the_others() -> None:
    found = fastattn.explain(q, kv, kv)
    if found.backend == "cpu":
        assert found.isa in ("scalar", "avx2", "avx512")
        why = ["expected tensors on a GPU (cuda), got cpu, where its interpreter runs if asked for"]
        assert found.reasons == {"triton": why, "reference": ["cpu comes first"]}
        assert str(found).startswith(f"backend: cpu ({found.isa})\n  not triton: expected tensors on a GPU")
    found = fastattn.explain(q.double(), kv.double(), kv.double())
    assert found.backend == "reference" and "float64" in found.reasons["cpu"][0]
    found = fastattn.explain(q, kv, kv, backend="reference")
    assert found.backend == "reference" and "was asked for" in found.reasons["cpu"][0]
    found = fastattn.explain(q.double(), kv.double(), kv.double(), backend="cpu")
    assert found.backend is None and "float64" in found.reasons["cpu"][0]
    with pytest.raises(ValueError, match="head_dim"):
        fastattn.explain(q, t(2, 4, 7, 9), kv)


def test_explain_draws_no_random_number() -> None:
    """A debugging print changed what was dropped afterwards."""
    before = torch.get_rng_state()
    fastattn.explain(q, kv, kv, dropout=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_makes_no_floats_of_integers() -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="q: expected float32"):
        attention(q.long(), kv, kv)


def test_the_raw_op_checks_sizes() -> None:
    """A dout shorter than out was read past its end."""
    if fastattn.explain(q, kv, kv).backend != "cpu":
        pytest.skip("the C++ library is not here")
    options = resolve(q, kv, fastattn.Mask(), fastattn.Bias(), None, None, None, None, 1.0, 0.0, 0.0)
    problem = (*options, "cpu")
    out, lse = torch.ops.fastattn.attention_forward(q, kv, kv, *problem)
    with pytest.raises(RuntimeError, match="dimension 2: expected 5, got 2"):
        torch.ops.fastattn.attention_backward(out[:, :, :2], None, q, kv, kv, out, lse, *problem, 8)


def test_explain_names_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = [x.to("meta").double() for x in (q, kv, kv)]
    found = fastattn.explain(*meta)
    assert [r.split(",")[0] for r in found.reasons["cpu"]] == ["expected tensors on cpu", "expected float32"]


def test_without_a_library_the_reference_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn import _backends

    gone = lambda backend: ["no compiler was found"] if backend == "cpu" else []  # noqa: E731
    monkeypatch.setattr(_backends, "unavailable", gone)
    found = fastattn.explain(q, kv, kv)
    assert found.backend == "reference" and found.reasons["cpu"] == ["no compiler was found"]
    assert attention(q, kv, kv).shape == q.shape
    with pytest.raises(NotImplementedError, match="no compiler was found"):
        attention(q, kv, kv, backend="cpu")
