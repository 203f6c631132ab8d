"""One test for each bug there was, named for it."""

from __future__ import annotations

import torch

import fastattn


def test_masks_joined_by_or_under_compile() -> None:
    """Dynamo can't trace `not clause` of a tuple inside a generator expression."""

    def f(q: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, q, q, mask=fastattn.causal() | fastattn.prefix(prefix))

    torch._dynamo.reset()
    q, prefix = torch.randn(2, 1, 9, 4), torch.tensor([2, 5])
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, prefix), f(q, prefix))


def test_lengths_that_differ_with_the_sample_under_vmap_of_grad() -> None:
    """Their values were read where they are wrapped twice: "Cannot access data pointer of Tensor"."""

    def loss(q: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, q, q, mask=fastattn.key_padding(lengths)).square().sum()

    q, lengths = torch.randn(3, 2, 1, 9, 4), torch.tensor([[2, 5], [9, 0], [1, 1]])
    found = torch.vmap(torch.func.grad(loss))(q, lengths)
    for i in range(3):
        torch.testing.assert_close(found[i], torch.func.grad(loss)(q[i], lengths[i]))


def test_a_compact_bias_far_from_the_keys() -> None:
    """With a start of each sequence its distances were cut off where queries stand beyond L_q + L_k."""
    q, k = torch.randn(2, 3, 2, 4), torch.randn(2, 3, 5, 4)
    for starts in ([0, 3], [40, 7], [2, 90]):
        options = {"bias": fastattn.alibi(torch.tensor([0.3, 0.2, 0.1])), "q_start": torch.tensor(starts)}
        found = fastattn.attention(q, k, k, return_lse=True, **options)
        want = fastattn.attention(q, k, k, return_lse=True, backend="reference", **options)
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_the_reference_under_autocast() -> None:
    """Its float32 scores were rounded to bfloat16 by autocast, and lse was bfloat16."""
    q, k, v = (torch.randn(1, 2, 50, 32).bfloat16() for _ in range(3))
    want = fastattn.attention(q, k, v, return_lse=True, backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        found = fastattn.attention(q, k, v, return_lse=True, backend="reference")
    assert found[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
