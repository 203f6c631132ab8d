"""What the features are raced against: the best that torch has for each on a CPU, as a user would write it.

flex_attention has no backward on CPU, and jagged nested tensors no causal kernel there, so they are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn

HEADS, DIM = 12, 64
Attention = Callable[..., Tensor]


@dataclass
class Race:
    """One problem, ours and the others.

    Attributes:
        leaves: q, k, v, and what else gets a gradient.
        options: of `fastattn.attention`; ``bias`` is left out where it is a leaf.
        peers: the same from the same leaves by other means.
        baselines: what is compared with and computes something else: our own dense attention.
    """

    leaves: list[Tensor]
    options: dict[str, Any]
    peers: dict[str, Attention]
    baselines: dict[str, Attention] = field(default_factory=dict)

    def ours(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        options = self.options if bias is None else self.options | {"bias": bias}
        found = fastattn.attention(q, k, v, backend="cpu", **options)
        assert isinstance(found, Tensor)
        return found


def inputs(length: int, kv_heads: int = HEADS) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    heads = (HEADS, kv_heads, kv_heads)
    return [torch.randn(1, h, length, DIM, generator=g).requires_grad_() for h in heads]


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def eager(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """The equation, as model code has it."""
    scores = q @ k.transpose(-1, -2) * DIM**-0.5
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores.masked_fill(~keep, float("-inf")), -1) @ v


@cache
def compiled_eager() -> Attention:
    """The same through Inductor, which fuses all between the two matrix products."""
    compiled: Attention = torch.compile(eager, dynamic=False)
    return compiled


def low(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def window(length: int) -> Race:
    """An eighth of the length: 512 of 4,096."""
    size = length // 8
    keep = low(length) & torch.ones(length, length, dtype=torch.bool).triu(1 - size)
    # Of a block of queries and the keys of the block before it and its own.
    i, j = torch.arange(size)[:, None], torch.arange(2 * size)
    near = (j > i) & (j <= i + size)
    near = near & ((torch.arange(length // size)[:, None, None, None] > 0) | (j >= size))

    def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def two(x: Tensor) -> Tensor:
            found = F.pad(x[0], (0, 0, size, 0)).unfold(1, 2 * size, size)  # [H, blocks, D, 2 · size]
            return found.permute(1, 0, 3, 2)

        blocks = q[0].unflatten(1, (-1, size)).transpose(0, 1)  # [blocks, H, size, D]
        return sdpa(blocks, two(k), two(v), attn_mask=near).transpose(0, 1).flatten(1, 2)[None]

    peers = {
        "sdpa, dense mask": lambda q, k, v: sdpa(q, k, v, attn_mask=keep),
        "sdpa, blocks of two windows": in_blocks,
    }
    return Race(inputs(length), {"mask": fastattn.sliding_window(size - 1, 0)}, peers)


def bias_with_gradient(length: int) -> Race:
    keep = low(length)
    bias = torch.randn(1, HEADS, length, length, generator=torch.Generator().manual_seed(1)).requires_grad_()
    peers = {
        "sdpa": lambda q, k, v, b: sdpa(q, k, v, attn_mask=b.masked_fill(~keep, float("-inf"))),
        "eager": lambda q, k, v, b: eager(q, k, v, keep, b),
        "eager, compiled": lambda q, k, v, b: compiled_eager()(q, k, v, keep, b),
    }
    return Race([*inputs(length), bias], {"mask": fastattn.causal()}, peers)


def alibi(length: int) -> Race:
    slopes = 2.0 ** (-8 / HEADS * torch.arange(1, HEADS + 1))
    dense = fastattn.alibi(slopes).to_dense(q_length=length, k_length=length)
    assert dense is not None
    dense = dense.masked_fill(~low(length), float("-inf"))
    # slope · key position differs from the bias by a constant in each row, and one more dimension makes it.
    more = torch.zeros(1, HEADS, length, 8)
    more[..., 0] = slopes[:, None] * torch.arange(length)

    def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ones = F.pad(torch.full((1, HEADS, length, 1), DIM**0.5), (0, 7))
        wide = torch.cat((q, ones), -1), torch.cat((k, more), -1), F.pad(v, (0, 8))
        return sdpa(*wide, is_causal=True, scale=DIM**-0.5)[..., :DIM]

    peers = {
        "sdpa, dense mask": lambda q, k, v: sdpa(q, k, v, attn_mask=dense),
        "sdpa, a dimension more": folded,
    }
    return Race(inputs(length), {"mask": fastattn.causal(), "bias": fastattn.alibi(slopes)}, peers)


def softcap(length: int) -> Race:
    keep = low(length)
    peers = {
        "eager": lambda q, k, v: eager(q, k, v, keep, cap=30.0),
        "eager, compiled": lambda q, k, v: compiled_eager()(q, k, v, keep, cap=30.0),
    }
    return Race(inputs(length), {"mask": fastattn.causal(), "softcap": 30.0}, peers)


def documents(length: int) -> Race:
    """Eight of one length, packed."""
    cu = torch.arange(9) * (length // 8)
    which = torch.arange(length) // (length // 8)
    keep = low(length) & (which[:, None] == which)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(length // 8, 2) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(*part, is_causal=True) for part in parts], 2)

    peers = {
        "sdpa, dense mask": lambda q, k, v: sdpa(q, k, v, attn_mask=keep),
        "sdpa, a call a document": one_by_one,
    }
    return Race(inputs(length), {"mask": fastattn.documents(cu) & fastattn.causal()}, peers)


def grouped(length: int) -> Race:
    """12 heads of queries, 3 of keys."""
    peers = {"sdpa, enable_gqa": lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True)}
    return Race(inputs(length, 3), {"mask": fastattn.causal()}, peers)


def block_sparse(length: int, density: float = 0.25, heads: int = HEADS) -> Race:
    """Blocks of 128 x 128, as many in every row of blocks; not causal."""
    g = torch.Generator().manual_seed(2)
    count = length // 128
    order = torch.rand(1, heads, count, count, generator=g).argsort(-1).argsort(-1)
    blocks = order < round(density * count)
    keep = blocks.repeat_interleave(128, 2).repeat_interleave(128, 3)

    def ours_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = fastattn.attention(q, k, v, backend="cpu")
        assert isinstance(found, Tensor)
        return found

    return Race(
        [x[:, :heads].detach().requires_grad_() for x in inputs(length)],
        {"mask": fastattn.block_sparse(blocks, 128)},
        {"sdpa, dense mask": lambda q, k, v: sdpa(q, k, v, attn_mask=keep)},
        {"fastattn, dense": ours_dense},
    )


RACES: dict[str, Callable[[int], Race]] = {
    "window": window,
    "bias with gradient": bias_with_gradient,
    "alibi": alibi,
    "softcap": softcap,
    "8 documents": documents,
    "heads 12:3": grouped,
    "block-sparse 25%": block_sparse,
}
SHORT = ("window", "softcap", "heads 12:3")


def windows(length: int) -> dict[float, fastattn.Mask]:
    """Masks from narrow to causal, by the share of the causal pairs that they keep."""
    pairs = length * (length + 1) / 2
    masks = {}
    for size in (256, 512, 1024, 2048, 4096, length):
        if size <= length:
            masks[(size * length - size * (size - 1) / 2) / pairs] = fastattn.sliding_window(size - 1, 0)
    return masks


def sparse_blocks(length: int) -> dict[float, fastattn.Mask]:
    """Masks of 128 x 128 blocks by the share that they keep, to all of them."""
    count = length // 128
    order = torch.rand(1, 1, count, count, generator=torch.Generator().manual_seed(2)).argsort(-1).argsort(-1)
    kept = sorted({max(1, round(share * count)) for share in (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)})
    return {n / count: fastattn.block_sparse(order < n, 128) for n in kept}


SWEEPS: dict[str, Callable[[int], dict[float, fastattn.Mask]]] = {
    "window": windows,
    "block-sparse": sparse_blocks,
}
