"""The same bits for any number of threads, from any thread and after a fork; and memory linear in length."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import fastattn
from fastattn.testing import present_isas

pytestmark = pytest.mark.skipif(not present_isas(), reason="the C++ library is not here")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(batch: int, heads: tuple[int, int], length: int, seed: int = 0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads[0], length, 16, generator=g, requires_grad=True)
    k, v = (torch.randn(batch, heads[1], length, 16, generator=g, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, 1, length, length, generator=g, requires_grad=True)
    out, lse = fastattn.attention(
        q, k, v, bias=bias, mask=fastattn.causal(), dropout=0.1, seed=5, return_lse=True, backend="cpu"
    )
    (out.square().sum() + lse.sum()).backward()
    return [out.detach(), lse.detach(), q.grad, k.grad, v.grad, bias.grad]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("batch", "heads", "length"), [(1, (1, 1), 1500), (2, (4, 2), 300)])
def test_bitwise_the_same_for_any_number_of_threads(batch: int, heads: tuple[int, int], length: int) -> None:
    torch.set_num_threads(1)
    want = run(batch, heads, length)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        for _ in range(3):
            assert same(run(batch, heads, length), want), count


@pytest.mark.parametrize("of_each", [False, True])
def test_gradients_of_slopes_and_tables_for_any_number_of_threads(of_each: bool) -> None:
    """torch's own sum of 32,768 numbers or more to one is split between its threads."""
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 1, length, 4, generator=g) for length in (2, 41000))
    slopes, table = torch.rand(1, generator=g), torch.randn(8, 1, generator=g)
    starts = torch.tensor([40000, 7]) if of_each else 40998
    results = []
    for count in (1, 2, 4, 2):
        torch.set_num_threads(count)
        leaves = [x.detach().requires_grad_() for x in (slopes, table)]
        bias = fastattn.alibi(leaves[0] * 1e-4) + fastattn.relative_position(leaves[1], max_distance=30000)
        out = fastattn.attention(q, k, k, bias=bias, q_start=starts, backend="cpu")
        results.append(list(torch.autograd.grad((out * torch.arange(4)).sum(), leaves)))
    for other in results[1:]:
        assert same(results[0], other)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, 2, 100, 16, generator=g) for _ in range(3))
    whole, whole_lse = fastattn.attention(q, k, v, mask=fastattn.causal(), return_lse=True)
    for i in range(5):
        one, lse = fastattn.attention(
            q[i : i + 1], k[i : i + 1], v[i : i + 1], mask=fastattn.causal(), return_lse=True
        )
        assert torch.equal(one[0], whole[i]) and torch.equal(lse[0], whole_lse[i])


def test_concurrent_calls() -> None:
    torch.set_num_threads(2)
    want = [run(1, (2, 1), 200, seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: run(1, (2, 1), 200, i % 4), range(24)))
    assert all(same(x, want[i % 4]) for i, x in enumerate(found))


def _child(queue) -> None:
    torch.set_num_threads(1)
    queue.put([x.numpy() for x in run(1, (2, 1), 100)])


def test_after_fork() -> None:
    torch.set_num_threads(2)
    want = run(1, (2, 1), 100)  # the parent's pool has started
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    found = [torch.from_numpy(x) for x in queue.get()]
    child.join(30)
    assert child.exitcode == 0
    assert same(found, want)


PEAK = """
import pathlib, re, sys, torch, fastattn
torch.set_num_threads(2)
length = int(sys.argv[1])
def step(length):
    q, k, v = (torch.randn(1, 2, length, 64, requires_grad=True) for _ in range(3))
    fastattn.attention(q, k, v, mask=fastattn.causal(), dropout=0.1, backend="cpu").sum().backward()
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
step(64)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
before = peak()
step(length)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_linear_in_length() -> None:
    """At 12,288 a head's L x L floats are 576 MiB; everything O(L) that is needed stays below 100."""

    def grown(length: int) -> float:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(length)], capture_output=True, text=True, check=True
        )
        return int(done.stdout) / 1024

    short, long = grown(6144), grown(12288)
    assert 20 < long < 100, long
    assert long < 2.6 * short, (short, long)
