"""Dropout by position: the same elements on every backend, with the right mean and variance."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.ops.philox import drop_threshold, dropout_keep, philox
from tests.attention.cases import ROUTES, device_of, interpreted, route


def words(counter: list[int], key: list[int]) -> list[int]:
    c = tuple(torch.tensor([x]) for x in counter)
    seed = torch.tensor([key[0] | key[1] << 32 if key[1] < 2**31 else (key[0] | key[1] << 32) - 2**64])
    return [int(x) for x in philox(c, seed)]


def test_known_answers() -> None:
    """The three vectors published with Random123 for philox4x32-10."""
    assert words([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert words([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert words(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def kept_by_kernel(seed: int, dropout: float, shape: tuple[int, int, int, int], backend: str) -> torch.Tensor:
    """Which elements the kernel keeps, read off its output: v is the identity, all probabilities equal."""
    batch, heads, q_length, k_length = shape
    q = torch.zeros(batch, heads, q_length, 1)
    k = torch.zeros(batch, heads, k_length, 1)
    v = torch.eye(k_length).expand(batch, heads, k_length, k_length)
    q, k, v = (x.to(device_of(backend)) for x in (q, k, v))
    out = fastattn.attention(q, k, v, dropout=dropout, seed=seed, backend=backend).cpu()
    values = out[out != 0] * k_length * (1 - drop_threshold(dropout) / 65536)
    torch.testing.assert_close(values, torch.ones_like(values))
    return out != 0


@pytest.mark.parametrize("name", ROUTES[1:])
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7, 2**63 - 1])
def test_kernels_drop_what_the_reference_drops(name: str, seed: int) -> None:
    with route(name) as backend:
        large = (2, 2, 35, 140) if interpreted(backend) else (2, 3, 65, 300)
        for shape in [large, (1, 1, 1, 1), (1, 2, 130, 17)]:
            found = kept_by_kernel(seed, 0.3, shape, backend)
            assert torch.equal(found, dropout_keep(torch.tensor([seed]), 0.3, shape))


def test_an_element_keeps_its_fate_in_another_shape() -> None:
    """It depends on (seed, batch, head, query, key) alone."""
    large = dropout_keep(torch.tensor([5]), 0.5, (3, 4, 70, 400))
    assert torch.equal(large[:2, :3, :9, :130], dropout_keep(torch.tensor([5]), 0.5, (2, 3, 9, 130)))


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
def test_mean_and_independence(dropout: float) -> None:
    keep = dropout_keep(torch.tensor([123]), dropout, (2, 4, 256, 512)).double()
    n, p = keep.numel(), 1 - drop_threshold(dropout) / 65536
    sigma = (p * (1 - p)) ** 0.5
    assert abs(keep.mean().item() - p) < 5 * sigma / n**0.5
    centred = (keep - p) / sigma
    for dim, step in ((3, 1), (3, 8), (3, 16), (3, 128), (2, 1), (1, 1), (0, 1)):
        size = keep.shape[dim] - step
        pairs = (centred.narrow(dim, 0, size) * centred.narrow(dim, step, size)).flatten()
        assert abs(pairs.mean().item()) < 5 / pairs.numel() ** 0.5, (dim, step)


def test_the_output_is_unbiased_with_the_variance_of_dropout() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    plain = fastattn.attention(q, k, v)
    samples = torch.stack([fastattn.attention(q, k, v, dropout=0.2, seed=s) for s in range(4000)])
    probs = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1)
    variance = (probs.square() @ v.square()) * 0.2 / 0.8
    assert ((samples.mean(0) - plain).abs() < 5 * (variance / 4000).sqrt()).all()
    torch.testing.assert_close(samples.var(0), variance, rtol=0.15, atol=1e-4)


def test_seeds() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    call = lambda seed=None: fastattn.attention(q, k, v, dropout=0.5, seed=seed)  # noqa: E731
    assert torch.equal(call(3), call(3))
    assert torch.equal(call(3), call(torch.tensor([3])))
    assert not torch.equal(call(3), call(4))
    torch.manual_seed(7)
    first, second = call(), call()
    torch.manual_seed(7)
    assert torch.equal(first, call()) and not torch.equal(first, second)


def test_backward_drops_what_forward_dropped() -> None:
    """The output is linear in v, so v's gradient satisfies this only with the same mask."""
    q, k = (torch.randn(1, 2, 60, 16) for _ in range(2))
    v = torch.randn(1, 2, 60, 16, requires_grad=True)
    out = fastattn.attention(q, k, v, dropout=0.4)
    (grad,) = torch.autograd.grad((out * out.detach()).sum(), v)
    torch.testing.assert_close((grad * v).sum(), (out * out).sum())


def test_dropout_that_rounds_to_nothing_drops_nothing() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    assert torch.equal(fastattn.attention(q, k, v, dropout=1e-6, seed=1), fastattn.attention(q, k, v))
