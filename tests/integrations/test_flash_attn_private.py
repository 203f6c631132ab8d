"""The private forward and backward as ring attention in other packages calls them."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn.integrations.flash_attn as door
from fastattn.integrations.flash_attn import private
from tests.integrations import flash_attn_oracle as oracle
from tests.integrations.flash_attn_oracle import assert_close

NUMBERS = (
    "dropout_p, softmax_scale, causal, window_size_left{}, window_size_right{}, softcap{}, alibi_slopes{}"
)
BOUNDS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
BARE = NUMBERS.format("", "", "", "")
GRADIENTS = "dout, q, k, v, out, softmax_lse, dq, dk, dv"
SIGNATURES = {
    "_flash_attn_forward": f"(q, k, v, {BARE}, return_softmax)",
    "_flash_attn_backward": f"({GRADIENTS}, {BARE}, deterministic, rng_state=None)",
    "_flash_attn_varlen_forward": f"(q, k, v, {BOUNDS}, {NUMBERS.format('=-1', '=-1', '=0.0', '=None')}, "
    "return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False, "
    "num_splits=0)",
    "_flash_attn_varlen_backward": f"({GRADIENTS}, {BOUNDS}, {BARE}, deterministic, rng_state=None, "
    "zero_tensors=False)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_flash_attns(name: str) -> None:
    given = inspect.signature(getattr(private, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in given.parameters.values()]
    assert str(given.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == SIGNATURES[name]
    # What ring-flash-attention reads names and defaults with; it does not look through a decorator.
    assert inspect.isfunction(getattr(private, name))
    assert inspect.getfullargspec(getattr(private, name)).args == list(given.parameters)


def inputs(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in (q_shape, k_shape, k_shape)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("slopes", [None, (4,), (2, 4)], ids=str)
def test_dense_forward_and_backward(dropout_p: float, slopes: tuple[int, ...] | None) -> None:
    q, k, v = inputs((2, 13, 4, 8), (2, 21, 2, 8))
    alibi = None if slopes is None else torch.rand(slopes)
    numbers = (dropout_p, 0.3, True, 9, -1, 1.5, alibi)
    out, lse, pattern, rng_state = private._flash_attn_forward(q, k, v, *numbers, True)
    assert not out.requires_grad and lse.shape == (2, 4, 13)
    assert rng_state.shape == (2,) and rng_state.dtype == torch.int64
    assert pattern.shape == ((2, 4, 13, 21) if dropout_p else (0,))

    exact, right_lse, _ = oracle.attention(
        q,
        k,
        v,
        softmax_scale=0.3,
        causal=True,
        window_size=(9, -1),
        softcap=1.5,
        alibi_slopes=None if alibi is None else alibi.double(),
        dropped=pattern < 0 if dropout_p else None,
        dropout_p=dropout_p,
    )
    # ALiBi's slopes are float32, as flash-attn's are, and so are their products with the distance.
    band = {"atol": 1e-10 if alibi is None else 1e-6, "rtol": 0.0}
    torch.testing.assert_close(out, exact, **band)
    torch.testing.assert_close(lse, right_lse, **band)
    dout = torch.randn_like(out)
    into = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    softmax_d = private._flash_attn_backward(
        dout, q, k, v, out, lse, *into, *numbers, False, rng_state=rng_state
    )
    assert_close(softmax_d, (dout * out).sum(-1).transpose(1, 2))
    for found, right in zip(into, torch.autograd.grad(exact, (q, k, v), dout), strict=True):
        torch.testing.assert_close(found, right, atol=10 * band["atol"], rtol=0.0)


@pytest.mark.parametrize("slopes", [None, (4,), (3, 4)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_varlen_forward_and_backward(dropout_p: float, slopes: tuple[int, ...] | None) -> None:
    cu_q, cu_k = torch.tensor([0, 5, 5, 16]), torch.tensor([0, 9, 12, 20])
    leaves = inputs((16, 4, 8), (20, 2, 8))
    alibi = None if slopes is None else torch.rand(slopes)
    where, numbers = (cu_q, cu_k, 11, 9), (dropout_p, None, True, -1, -1, 0.0, alibi)
    torch.manual_seed(2)
    want, want_lse, _ = door.flash_attn_varlen_func(
        *leaves, *where, dropout_p, None, True, alibi_slopes=alibi, return_attn_probs=True
    )
    torch.manual_seed(2)
    out, lse, pattern, rng_state = private._flash_attn_varlen_forward(*leaves, *where, *numbers, True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert pattern.shape == ((3, 4, 11, 9) if dropout_p else (0,))
    dout = torch.randn_like(out)
    into = [torch.full_like(x, torch.nan) for x in leaves]
    softmax_d = private._flash_attn_varlen_backward(
        dout, *leaves, out, lse, *into, *where, *numbers, True, rng_state
    )
    assert_close(softmax_d, (dout * out).sum(-1).transpose(0, 1))
    for found, right in zip(into, torch.autograd.grad(want, leaves, dout), strict=True):
        assert_close(found, right)


def test_keys_that_are_skipped_and_not_used() -> None:
    """Each sequence as if it had only the keys from leftpad_k to seqused_k; the others may be NaN."""
    cu_q, cu_k = torch.tensor([0, 5, 6, 17]), torch.tensor([0, 9, 12, 24])
    leftpad, used = torch.tensor([2, 0, 3]), torch.tensor([9, 1, 10])
    q, k, v = (x.detach() for x in inputs((17, 4, 8), (24, 2, 8)))
    options = {"causal": True, "window_size_left": 4}
    for slopes in (None, torch.rand(3, 4, dtype=torch.float64)):
        out, lse, _, _ = private._flash_attn_varlen_forward(
            q,
            k,
            v,
            cu_q,
            cu_k,
            11,
            12,
            0.0,
            None,
            **options,
            alibi_slopes=slopes,
            leftpad_k=leftpad,
            seqused_k=used,
        )
        for n in range(3):
            rows = slice(int(cu_q[n]), int(cu_q[n + 1]))
            keys = slice(int(cu_k[n] + leftpad[n]), int(cu_k[n] + used[n]))
            own = None if slopes is None else slopes[n]
            exact = oracle.attention(
                q[None, rows],
                k[None, keys],
                v[None, keys],
                causal=True,
                window_size=(4, -1),
                alibi_slopes=own,
            )
            assert_close(out[None, rows], exact[0])
            assert_close(lse[None, :, rows], exact[1])


def test_pages_with_lengths_of_their_own() -> None:
    store = torch.randn(6, 4, 2, 8, dtype=torch.float64)
    table, used = torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32), torch.tensor([7, 11])
    q = torch.randn(5, 4, 8, dtype=torch.float64)
    bounds = torch.tensor([0, 3, 5]), torch.tensor([0, 12, 24]), 3, 12
    out, _, _, _ = private._flash_attn_varlen_forward(
        q, store, store, *bounds, 0.0, None, True, block_table=table, seqused_k=used
    )
    for n, rows in enumerate((slice(0, 3), slice(3, 5))):
        keys = store[table[n].long()].flatten(0, 1)[None, : int(used[n])]
        assert_close(out[None, rows], oracle.attention(q[None, rows], keys, keys, causal=True)[0])
    with pytest.raises(NotImplementedError, match="flash_attn_with_kvcache"):
        private._flash_attn_varlen_forward(
            q, store, store, *bounds, 0.0, None, True, block_table=table, leftpad_k=used
        )


def test_dropout_needs_the_forwards_state() -> None:
    q = torch.randn(1, 3, 2, 8)
    out, lse, _, _ = private._flash_attn_forward(q, q, q, 0.5, None, False, -1, -1, 0.0, None, False)
    into = [torch.empty_like(q) for _ in range(3)]
    with pytest.raises(ValueError, match="rng_state"):
        private._flash_attn_backward(q, q, q, q, out, lse, *into, 0.5, None, False, -1, -1, 0.0, None, False)


@pytest.mark.parametrize("causal", [False, True])
def test_ring_of_blocks(causal: bool) -> None:
    """Attention over keys in blocks, merged and differentiated as ring-flash-attention does it."""
    blocks, length = 3, 4
    q, k, v = inputs((2, blocks * length, 4, 8), (2, blocks * length, 4, 8))
    exact, right_lse, _ = oracle.attention(q, k, v, causal=causal)
    dout = torch.randn_like(exact)
    right = torch.autograd.grad(exact, (q, k, v), dout)
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for rank in range(blocks):
        rows = slice(rank * length, (rank + 1) * length)
        visible = [b for b in range(blocks) if not causal or b <= rank]
        out = lse = None
        for b in [rank, *(b for b in visible if b != rank)]:
            keys = slice(b * length, (b + 1) * length)
            numbers = (0.0, 8**-0.5, causal and b == rank, -1, -1, 0.0, None)
            part, part_lse, _, _ = private._flash_attn_forward(
                q[:, rows], k[:, keys], v[:, keys], *numbers, False
            )
            part_lse = part_lse.transpose(1, 2)[..., None]
            if out is None:
                out, lse = part, part_lse
            else:
                out = out - torch.sigmoid(part_lse - lse) * (out - part)
                lse = lse - F.logsigmoid(lse - part_lse)
        assert_close(out, exact[:, rows])
        lse = lse[..., 0].transpose(1, 2)
        assert_close(lse, right_lse[:, :, rows])
        for b in visible:
            keys = slice(b * length, (b + 1) * length)
            numbers = (0.0, 8**-0.5, causal and b == rank, -1, -1, 0.0, None)
            given = dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out, lse
            share = [torch.empty_like(x) for x in given[1:4]]
            private._flash_attn_backward(*given, *share, *numbers, False)
            for total, part, where in zip(found, share, (rows, keys, keys), strict=True):
                total[:, where] += part
    for a, b in zip(found, right, strict=True):
        assert_close(a, b)


def test_blocks_without_keys_merge() -> None:
    """An empty row's log-sum-exp is -inf: merged with another block's it changes nothing."""
    q = torch.randn(1, 4, 2, 8, dtype=torch.float64)
    _, lse, _, _ = private._flash_attn_forward(
        q, q[:, :2], q[:, :2], 0.0, None, True, -1, -1, 0.0, None, False
    )
    assert torch.equal(lse[0, 0, :2], torch.full((2,), -math.inf, dtype=torch.float64))
    assert torch.sigmoid(lse[0, 0, 0] - 1.0) == 0
