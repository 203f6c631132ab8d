"""What the features are raced against: the best that torch has for each on a CPU, as a user would write it.

flex_attention has no backward on CPU, and jagged nested tensors no causal kernel there, so they are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from bench import rows
from bench.contest import Problem, Race

Attention = Callable[..., Tensor]
WINDOW, DOCUMENTS, BLOCK, CAP = 512, 8, 128, 30.0
# Where float64 takes longer than the race, what is checked is a shorter one.
CHECKED_AT = 1024
PRODUCTS = {"forward": 2, "backward": 5, "both": 7}


@dataclass(frozen=True)
class Feature(Problem):
    """Forward and backward with one feature, of the name of a function in `RACES`."""

    op = "attention"
    passes = ("both",)
    feature: str
    mask: str = "causal"
    length: int = 4096
    batch: int = 1
    heads: int = 12
    kv_heads: int = 12
    head_dim: int = 64

    def race(self, device: torch.device) -> Race:
        return RACES[self.feature](self, device)

    @property
    def checked(self) -> Problem:
        return replace(self, length=min(self.length, CHECKED_AT))

    def flops(self, which: str) -> int:
        n, w = self.length, min(WINDOW, self.length)
        kept = {"window": w * n - w * (w - 1) / 2, "documents": n * n / DOCUMENTS / 2, "blocks": n * n / 4}
        pairs = kept.get(self.mask, n * n / 2)
        return int(2 * PRODUCTS[which] * pairs * self.head_dim * self.heads)

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """q, k and v."""
        heads = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        shapes = {name: (self.batch, n, self.length, self.head_dim) for name, n in heads.items()}
        return {name: normal(i, device, *shape) for i, (name, shape) in enumerate(shapes.items())}


def normal(seed: int, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def ours(**options: Any) -> Attention:
    """`fastattn.attention` with options; a fourth leaf is the bias."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        found = fastattn.attention(q, k, v, **options | ({"bias": bias[0]} if bias else {}))
        assert isinstance(found, Tensor)
        return found

    return attention


def sdpa(**options: Any) -> Attention:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def textbook(keep: Tensor, slopes: Tensor | None = None, cap: float | None = None) -> Attention:
    """The equation, as model code has it; a fourth leaf is the bias, or ALiBi's is made of its slopes."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.transpose(-1, -2) * q.shape[3] ** -0.5
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        if bias:
            scores = scores + bias[0]
        if slopes is not None:
            place = torch.arange(q.shape[2], device=q.device, dtype=q.dtype)
            scores = scores + slopes.to(q.dtype)[:, None, None] * (place - place[:, None])
        return torch.softmax(scores.masked_fill(~keep, float("-inf")), -1) @ v

    return attention


def low(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]


def additive(keep: Tensor) -> Tensor:
    """Made beforehand, as torch makes it anew in each call of a bool mask."""
    return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, float("-inf"))


def window(case: Feature, device: torch.device) -> Race:
    """Of the last 512 keys."""
    length, size = case.length, WINDOW
    place = torch.arange(length, device=device)
    keep = low(length, device) & (place[:, None] - place < size)
    # Of a block of queries and the keys of the block before it and its own.
    i, j = torch.arange(size, device=device)[:, None], torch.arange(2 * size, device=device)
    near = (j > i) & (j <= i + size)
    first = torch.arange(length // size, device=device)[:, None, None, None] == 0
    nearby = additive(near & (~first | (j >= size)))

    def in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def two(x: Tensor) -> Tensor:
            found = F.pad(x[0], (0, 0, size, 0)).unfold(1, 2 * size, size)  # [H, blocks, D, 2 · size]
            return found.permute(1, 0, 3, 2)

        blocks = q[0].unflatten(1, (-1, size)).transpose(0, 1)  # [blocks, H, size, D]
        return sdpa(attn_mask=nearby)(blocks, two(k), two(v)).transpose(0, 1).flatten(1, 2)[None]

    functions = {
        "fastattn": ours(mask=fastattn.sliding_window(size - 1, 0)),
        "sdpa, dense mask": sdpa(attn_mask=additive(keep)),
        "sdpa, blocks of two windows": in_blocks,
    }
    return Race(case.inputs(device), functions, textbook(keep))


def bias_with_gradient(case: Feature, device: torch.device) -> Race:
    """Dense, [1, H, L, L]."""
    keep = low(case.length, device)
    functions = {
        "fastattn": ours(mask=fastattn.causal()),
        "sdpa": lambda q, k, v, b: sdpa(attn_mask=b.masked_fill(~keep, float("-inf")))(q, k, v),
        "torch": textbook(keep),
    }
    bias = normal(3, device, 1, case.heads, case.length, case.length)
    return Race(case.inputs(device) | {"bias": bias}, functions)


def alibi(case: Feature, device: torch.device) -> Race:
    length, heads, dim = case.length, case.heads, case.head_dim
    slopes = 2.0 ** (-8 / heads * torch.arange(1, heads + 1, device=device))
    dense = fastattn.alibi(slopes).to_dense(q_length=length, k_length=length)
    assert dense is not None
    dense = dense.masked_fill(~low(length, device), float("-inf"))
    # slope · key position differs from the bias by a constant in each row, and one more dimension makes it.
    more = torch.zeros(1, heads, length, 8, device=device)
    more[..., 0] = slopes[:, None] * torch.arange(length, device=device)
    ones = F.pad(torch.full((1, heads, length, 1), dim**0.5, device=device), (0, 7))

    def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = torch.cat((q, ones), -1), torch.cat((k, more), -1), F.pad(v, (0, 8))
        return sdpa(is_causal=True, scale=dim**-0.5)(*wide)[..., :dim]

    functions = {
        "fastattn": ours(mask=fastattn.causal(), bias=fastattn.alibi(slopes)),
        "sdpa, dense mask": sdpa(attn_mask=dense),
    }
    # Large scores cancel in it, so that it is over the error budget, and is timed nevertheless.
    beside = {"sdpa, a dimension more": folded}
    return Race(case.inputs(device), functions, textbook(low(length, device), slopes), beside=beside)


def softcap(case: Feature, device: torch.device) -> Race:
    functions = {
        "fastattn": ours(mask=fastattn.causal(), softcap=CAP),
        "torch": textbook(low(case.length, device), cap=CAP),
    }
    return Race(case.inputs(device), functions)


def documents(case: Feature, device: torch.device) -> Race:
    """Eight of one length, packed."""
    size = case.length // DOCUMENTS
    bounds = torch.arange(DOCUMENTS + 1, device=device) * size
    which = torch.arange(case.length, device=device) // size
    keep = low(case.length, device) & (which[:, None] == which)

    def one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(size, 2) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(is_causal=True)(*part) for part in parts], 2)

    functions = {
        "fastattn": ours(mask=fastattn.documents(bounds) & fastattn.causal()),
        "sdpa, dense mask": sdpa(attn_mask=additive(keep)),
        "sdpa, a call a document": one_by_one,
    }
    return Race(case.inputs(device), functions, textbook(keep))


def grouped(case: Feature, device: torch.device) -> Race:
    """12 heads of queries, 3 of keys."""
    functions = {
        "fastattn": ours(mask=fastattn.causal()),
        "sdpa, enable_gqa": sdpa(is_causal=True, enable_gqa=True),
    }
    return Race(case.inputs(device), functions, textbook(low(case.length, device)))


def block_sparse(case: Feature, device: torch.device) -> Race:
    """Blocks of 128 x 128, a quarter of them, as many in every row of blocks; not causal."""
    blocks = some_blocks(case.length // BLOCK, 0.25, case.heads).to(device)
    keep = dense_of(blocks)
    functions = {
        "fastattn": ours(mask=fastattn.block_sparse(blocks, BLOCK)),
        "sdpa, dense mask": sdpa(attn_mask=additive(keep)),
    }
    return Race(case.inputs(device), functions, textbook(keep), beside={"fastattn, dense": ours()})


def some_blocks(count: int, share: float, heads: int) -> Tensor:
    """bool [1, heads, count, count], with at least one block in every row."""
    g = torch.Generator().manual_seed(2)
    order = torch.rand(1, heads, count, count, generator=g).argsort(-1).argsort(-1)
    return order < max(1, round(share * count))


def dense_of(blocks: Tensor) -> Tensor:
    return blocks.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)


RACES: dict[str, Callable[[Feature, torch.device], Race]] = {
    "window": window,
    "bias with gradient": bias_with_gradient,
    "alibi": alibi,
    "softcap": softcap,
    "8 documents": documents,
    "heads 12:3": grouped,
    "block-sparse 25%": block_sparse,
}
CASES = [
    Feature("window", "window"),
    Feature("softcap"),
    Feature("heads 12:3", kv_heads=3),
    Feature("bias with gradient"),
    Feature("alibi"),
    Feature("8 documents", "documents"),
    Feature("block-sparse 25%", "blocks"),
]


@dataclass(frozen=True)
class Density(Problem):
    """Ours with a mask that keeps `kept` keys of each query, beside ours with all of them.

    Attributes:
        kind: ``window``, causal, of `kept` keys, or ``block-sparse``, of blocks of 128 x 128.
    """

    op = "attention"
    passes = ("both",)
    kind: str
    kept: int
    length: int = 16384
    batch: int = 1
    heads: int = 4
    head_dim: int = 64

    @property
    def pairs(self) -> tuple[float, float]:
        """Of query and key in one head: those kept, and all, which are the causal ones of a window."""
        n, w = self.length, self.kept
        return (w * n - w * (w - 1) / 2, n * (n + 1) / 2) if self.kind == "window" else (w * n, n * n)

    @property
    def checked(self) -> Problem:
        length = min(self.length, CHECKED_AT)
        return replace(self, length=length, kept=max(BLOCK, self.kept * length // self.length))

    def columns(self) -> dict[str, Any]:
        density = round(self.pairs[0] / self.pairs[1], 4)
        return super().columns() | {"extra": rows.extra(kind=self.kind, density=density)}

    def flops(self, which: str) -> int:
        return int(2 * PRODUCTS[which] * self.pairs[0] * self.head_dim * self.heads)

    def race(self, device: torch.device) -> Race:
        shape = (self.batch, self.heads, self.length, self.head_dim)
        leaves = {name: normal(i, device, *shape) for i, name in enumerate("qkv")}
        if self.kind == "window":
            mask, whole = fastattn.sliding_window(self.kept - 1, 0), ours(mask=fastattn.causal())
        else:
            blocks = some_blocks(self.length // BLOCK, self.kept / self.length, 1).to(device)
            mask, whole = fastattn.block_sparse(blocks, BLOCK), ours()

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keep = mask.to_dense(batch=1, q_length=self.length, k_length=self.length, device=q.device)
            assert keep is not None
            return textbook(keep)(q, k, v)

        functions = {"fastattn": ours(mask=mask)}
        return Race(leaves, functions, plain, beside={"fastattn, dense": whole}, compiled=False)


DENSITIES = [
    *(Density("window", kept) for kept in (256, 512, 1024, 2048, 4096)),
    *(Density("block-sparse", 128 * blocks) for blocks in (6, 13, 32, 64, 96)),
]
