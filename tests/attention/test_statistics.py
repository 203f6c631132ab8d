"""Statistics of the probabilities, and the probabilities themselves, against the matrix written down."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops.attention import statistics, weights
from fastattn.ops.attention.biases import as_bias
from fastattn.ops.attention.masks import as_mask
from fastattn.ops.attention.statistics import attention_statistics
from fastattn.ops.attention.weights import attention_weights

BATCH, HEADS, LENGTH, DIM = 2, 4, 13, 6
ROWS = [12, 0, 5]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cases() -> dict[str, dict[str, Any]]:
    """Options of `attention_statistics`; leaves are made of the tensors in them."""
    cu = torch.tensor([0, 3, 3, 9, 12])
    blocks = torch.tensor(
        [[True, False, True, False], [False, True, True, False], [True] * 4, [False, True] * 2]
    )
    keep = random(1, HEADS, LENGTH, LENGTH, seed=7) > 0
    keep[:, 1, 4] = False
    return {
        "plain": {},
        "causal": {"mask": fastattn.causal()},
        "window": {"mask": fastattn.sliding_window(3, 1)},
        "prefix": {"mask": fastattn.causal() | fastattn.prefix(torch.tensor([2, 5]))},
        "chunked": {"mask": fastattn.causal() & fastattn.chunked(4)},
        "documents": {
            "mask": fastattn.documents(cu) & fastattn.causal(),
            "bias": fastattn.alibi(random(HEADS)),
        },
        "position-ids": {
            "mask": fastattn.documents(position_ids=torch.stack([torch.arange(13), torch.arange(13) % 5])),
            "bias": fastattn.alibi(random(BATCH, HEADS)),
        },
        "padding": {"mask": fastattn.key_padding(torch.tensor([13, 4]))},
        "blocks": {"mask": fastattn.block_sparse(blocks, 4) & fastattn.causal()},
        "dense": {"mask": keep, "bias": random(BATCH, 1, LENGTH, LENGTH)},
        "row-of-dense": {"mask": keep[:, :, :1], "bias": random(1, HEADS, 1, LENGTH)},
        "softcap-sinks": {"softcap": 0.7, "sinks": random(HEADS), "mask": keep},
        "sinks-off": {"sinks": torch.tensor([0.5, float("-inf"), 0.0, float("-inf")]).double()},
        "relative": {
            "bias": fastattn.relative_position(random(8, HEADS), max_distance=10) + random(1, 1, 1, LENGTH)
        },
        "shard": {
            "mask": fastattn.causal(),
            "q_start": 7,
            "k_start": 2,
            "bias": fastattn.alibi(random(HEADS)),
        },
        "shards": {
            "mask": fastattn.sliding_window(4, 0),
            "q_start": torch.tensor([5, 9]),
            "k_start": 3,
            "scale": 2.0,
        },
    }


def probabilities(q: Tensor, k: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The matrix ``[B, H, L_q, L_k]`` in float64, and the probability of the sink."""
    options = dict(options)
    mask, bias, cap = as_mask(options.get("mask")), as_bias(options.get("bias")), options.get("softcap")
    place = {
        "q_length": q.shape[2],
        "k_length": k.shape[2],
        **{n: options.get(n) for n in ("q_start", "k_start")},
    }
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * options.get("scale", DIM**-0.5)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    added = bias.to_dense(**place, documents=mask.documents if bias.compact else None)
    scores = scores if added is None else scores + added
    keep = mask.to_dense(**place, batch=q.shape[0])
    if keep is None:
        keep = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    scores = scores.masked_fill(~keep, -1e30)
    sinks = options.get("sinks")
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*q.shape[:3], 1)), -1)
    probs = torch.softmax(scores, -1)
    return probs[..., : k.shape[2]].masked_fill(~keep, 0.0), None if sinks is None else probs[..., -1]


def qk(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return random(BATCH, HEADS, LENGTH, DIM, seed=1).to(dtype), random(BATCH, 2, LENGTH, DIM, seed=2).to(
        dtype
    )


@pytest.fixture(params=["one block", "blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once, and in blocks of two (the last has one)."""
    if request.param == "blocks":
        monkeypatch.setattr(statistics, "_BLOCK", 2 * BATCH * HEADS * LENGTH)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("name", cases())
def test_against_the_matrix(name: str) -> None:
    q, k = qk()
    options = cases()[name]
    probs, sink = probabilities(q, k, options)
    found = attention_statistics(q, k, ["entropy", "column_sums", "row_max"], top_k=3, rows=ROWS, **options)
    torch.testing.assert_close(found.column_sums, probs.sum(2))
    torch.testing.assert_close(found.row_max, probs.amax(-1))
    outcomes = probs if sink is None else torch.cat((probs, sink[..., None]), -1)
    torch.testing.assert_close(found.entropy, torch.special.entr(outcomes).sum(-1))
    torch.testing.assert_close(found.probabilities, probs[:, :, ROWS])
    values, indices = probs.topk(3)
    torch.testing.assert_close(found.top_k_values, values)
    assert torch.equal(found.top_k_indices, indices.masked_fill(values == 0, -1))


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("name", cases())
def test_gradients(name: str) -> None:
    """Of every input, through all of the statistics."""
    results = []
    for matrix in (True, False):
        options = cases()[name]
        leaves = [x.requires_grad_() for x in qk()]
        bias = as_bias(options.get("bias"))
        leaves += [
            x.requires_grad_()
            for x in (bias.dense, *(part.parameter for part in bias.compact))
            if x is not None
        ]
        if "sinks" in options:
            leaves.append(options["sinks"].requires_grad_())
        if matrix:
            probs, sink = probabilities(*leaves[:2], options)
            outcomes = probs if sink is None else torch.cat((probs, sink[..., None]), -1)
            logs = outcomes.masked_fill(outcomes == 0, 1.0).log()
            parts = [
                probs.sum(2),
                probs.amax(-1),
                -(outcomes * logs).sum(-1),
                probs.topk(3)[0],
                probs[:, :, ROWS],
            ]
        else:
            fields = ["column_sums", "row_max", "entropy"]
            found = attention_statistics(*leaves[:2], fields, top_k=3, rows=ROWS, **options)
            parts = [x for x in found if x is not None and x.is_floating_point()]
        loss = sum((x * torch.arange(x.numel()).view(x.shape).cos()).sum() for x in parts)
        results.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_one_query_asked_for_twice() -> None:
    q, k = (x[:, :, :length].requires_grad_() for x, length in zip(qk(), (1, LENGTH), strict=True))
    bias = random(BATCH, 1, 1, LENGTH, seed=5).requires_grad_()
    options = {"mask": fastattn.sliding_window(7, 0), "bias": bias}
    found = attention_statistics(q, k, rows=[0, 0], **options).probabilities
    once = attention_statistics(q, k, rows=[0], **options).probabilities
    assert found is not None and once is not None
    torch.testing.assert_close(found, once.expand(-1, -1, 2, -1))
    weight = random(*found.shape, seed=9)
    twice = torch.autograd.grad((found * weight).sum(), (q, k, bias))
    summed = torch.autograd.grad((once * weight.sum(2, keepdim=True)).sum(), (q, k, bias))
    for a, b in zip(twice, summed, strict=True):
        torch.testing.assert_close(a, b)


def test_only_what_is_asked_for() -> None:
    q, k = qk()
    found = attention_statistics(q, k, "entropy")
    assert found.entropy is not None and [x for x in found if x is not None] == [found.entropy]
    found = attention_statistics(q, k, top_k=1)
    assert [name for name, x in found._asdict().items() if x is not None] == ["top_k_values", "top_k_indices"]
    found = attention_statistics(q, k, rows=torch.tensor([3]))
    assert [name for name, x in found._asdict().items() if x is not None] == ["probabilities"]
    assert not found.probabilities.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    """float32 inside and out; nothing is rounded to half, under autocast neither."""
    q, k = qk(dtype)
    probs, _ = probabilities(q.double(), k.double(), {})
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = attention_statistics(q, k, ["column_sums", "entropy"], rows=ROWS)
        assert {x.dtype for x in found if x is not None} == {torch.float32}
        torch.testing.assert_close(found.column_sums, probs.sum(2).float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.probabilities, probs[:, :, ROWS].float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("q_length", "k_length"), [(0, 5), (5, 0), (0, 0)])
def test_empty(q_length: int, k_length: int) -> None:
    q, k = torch.randn(2, 4, q_length, 3), torch.randn(2, 2, k_length, 3)
    found = attention_statistics(q, k, ["column_sums", "row_max", "entropy"], rows=[], sinks=torch.zeros(4))
    assert found.column_sums.shape == (2, 4, k_length) and (found.column_sums == 0).all()
    assert found.row_max.shape == (2, 4, q_length) and (found.row_max == 0).all()
    assert found.entropy.shape == (2, 4, q_length) and found.entropy.isfinite().all()
    assert found.probabilities.shape == (2, 4, 0, k_length)


def test_errors() -> None:
    q, k = torch.randn(1, 2, 5, 3), torch.randn(1, 2, 7, 3)
    with pytest.raises(ValueError, match=r"expected fields, top_k or rows, got none"):
        attention_statistics(q, k)
    with pytest.raises(ValueError, match=r"fields: expected any of .*, got \['max'\]"):
        attention_statistics(q, k, ["max"])
    with pytest.raises(ValueError, match=r"top_k: expected 1 to 7 \(L_k\), got 8"):
        attention_statistics(q, k, top_k=8)
    for rows in ([5], [-1]):
        with pytest.raises(ValueError, match=r"rows: expected 0 to 4 \(L_q - 1\), got"):
            attention_statistics(q, k, rows=rows)
    with pytest.raises(TypeError, match=r"rows: expected integers, got torch.float32"):
        attention_statistics(q, k, rows=[1.0])
    with pytest.raises(ValueError, match=r"rows: expected one dimension, got \[1, 1\]"):
        attention_statistics(q, k, rows=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"k: expected q's head_dim 3, got 4"):
        attention_statistics(q, torch.randn(1, 2, 7, 4), "entropy")
    with pytest.raises(ValueError, match=r"sinks: expected \[2\]"):
        attention_statistics(q, k, "entropy", sinks=torch.zeros(3))


PEAK = """
import sys, torch, fastattn
from bench.memory import peak_growth
from fastattn.ops.attention.statistics import attention_statistics
def step(length):
    q, k = (torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(2))
    found = attention_statistics(q, k, ["column_sums", "entropy", "row_max"], top_k=4, mask=fastattn.causal())
    (found.column_sums.square().sum() + found.entropy.sum() + found.top_k_values.sum()).backward()
step(64)
print(peak_growth(lambda: step(int(sys.argv[1]))) / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_not_quadratic() -> None:
    """At 4,096 the two heads' matrices are 128 MiB each time one is made, and backward would make ten."""
    done = subprocess.run([sys.executable, "-c", PEAK, "4096"], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 192


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", cases())
def test_weights_of_every_option(name: str, average: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`attention_weights` of the lse that `attention` returned; averaged, a head at a time."""
    monkeypatch.setattr(weights, "_TOGETHER", 1)
    results = []
    for matrix in (True, False):
        options = cases()[name]
        leaves = [x.requires_grad_() for x in qk()]
        bias = as_bias(options.get("bias"))
        leaves += [
            x.requires_grad_()
            for x in (bias.dense, *(part.parameter for part in bias.compact))
            if x is not None
        ]
        q, k = leaves[:2]
        if matrix:
            found = probabilities(q, k, options)[0]
            found = found.mean(1) if average else found
        else:
            lse = fastattn.attention(q, k, k, return_lse=True, backend="reference", **options)[1]
            options.pop("sinks", None)
            found = attention_weights(q, k, lse, average=average, **options)
        loss = (found * torch.arange(found.numel()).view(found.shape).cos()).sum()
        results.append([found.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
