"""Every mask against its definition, element by element in plain Python: dense, and as the kernels get it."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops.attention.biases import Bias
from fastattn.ops.attention.problem import resolve

BATCH, HEADS = 2, 2
LENGTHS = [(7, 11), (11, 7), (9, 9), (1, 5), (5, 1)]


# Of the documents: boundaries of their queries and of their keys.
Bounds = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass
class Place:
    """One pair of query i and key j, and what positions are counted from."""

    b: int
    h: int
    i: int
    j: int
    q_length: int
    k_length: int
    q_start: int | None = None
    k_start: int | None = None
    documents: Bounds | None = None

    def same_document(self) -> bool:
        assert self.documents is not None
        q_document, k_document = document(self.documents[0], self.i), document(self.documents[1], self.j)
        return q_document is not None and q_document == k_document

    def positions(self, align: str) -> tuple[int, int]:
        """Of the query and of the key."""
        if self.documents is not None:
            of_q, of_k = self.documents
            n = document(of_q, self.i)
            assert n is not None
            shift = (of_k[n + 1] - of_k[n]) - (of_q[n + 1] - of_q[n]) if align == "bottom_right" else 0
            return self.i - of_q[n] + shift, self.j - of_k[n]
        if self.q_start is not None or self.k_start is not None:
            return (self.q_start or 0) + self.i, (self.k_start or 0) + self.j
        return self.i + (self.k_length - self.q_length if align == "bottom_right" else 0), self.j


def document(bounds: tuple[int, ...], index: int) -> int | None:
    return next((n for n in range(len(bounds) - 1) if bounds[n] <= index < bounds[n + 1]), None)


@dataclass(eq=False)
class Rule:
    """A constraint: how it is made for two lengths, and whether it keeps a pair."""

    make: Callable[[int, int], fastattn.Mask | Tensor]
    keeps: Callable[[Place], bool]
    documents: Callable[[int, int], Bounds] | None = None


def causal(align: str) -> Rule:
    def keeps(x: Place) -> bool:
        q, k = x.positions(align)
        return k <= q

    return Rule(lambda n, m: fastattn.causal(align), keeps)


def window(left: int | None, right: int | None, align: str) -> Rule:
    def keeps(x: Place) -> bool:
        q, k = x.positions(align)
        return (left is None or k >= q - left) and (right is None or k <= q + right)

    return Rule(lambda n, m: fastattn.sliding_window(left, right, align=align), keeps)


def chunked(size: int, align: str) -> Rule:
    def keeps(x: Place) -> bool:
        q, k = x.positions(align)
        return q // size == k // size

    return Rule(lambda n, m: fastattn.chunked(size, align=align), keeps)


def prefix(count: int | list[int]) -> Rule:
    given = count if isinstance(count, int) else torch.tensor(count)

    def keeps(x: Place) -> bool:
        return x.positions("top_left")[1] < (count if isinstance(count, int) else count[x.b])

    return Rule(lambda n, m: fastattn.prefix(given), keeps)


def padding() -> Rule:
    def lengths(m: int) -> list[int]:
        return [m // 3, m]

    return Rule(
        lambda n, m: fastattn.key_padding(torch.tensor(lengths(m))), lambda x: x.j < lengths(x.k_length)[x.b]
    )


def blocks(batch: int, heads: int, q_size: int, k_size: int, flat: bool = False) -> Rule:
    def layout(n: int, m: int) -> list[list[list[list[bool]]]]:
        rows, columns = -(-n // q_size), -(-m // k_size)
        return [
            [
                [[(5 * b + 3 * h + 2 * i + j) % 3 != 0 for j in range(columns)] for i in range(rows)]
                for h in range(heads)
            ]
            for b in range(batch)
        ]

    def make(n: int, m: int) -> fastattn.Mask:
        tensor = torch.tensor(layout(n, m))
        size = q_size if q_size == k_size else (q_size, k_size)
        return fastattn.block_sparse(tensor[0, 0] if flat else tensor, size)

    def keeps(x: Place) -> bool:
        here = layout(x.q_length, x.k_length)
        return here[x.b % batch][x.h % heads][x.i // q_size][x.j // k_size]

    return Rule(make, keeps)


def dense(*shape: int) -> Rule:
    """A bool tensor; 2 in its shape stands for that size, 1 for broadcasting."""

    def tensor(n: int, m: int) -> Tensor:
        full = (BATCH, HEADS, n, m)[-len(shape) :]
        size = [1 if want == 1 else have for want, have in zip(shape, full, strict=True)]
        return (torch.arange(torch.Size(size).numel()) * 7 % 5 < 3).reshape(size)

    def keeps(x: Place) -> bool:
        keep = tensor(x.q_length, x.k_length)
        keep = keep[(None,) * (4 - keep.dim())]
        index = [0 if size == 1 else at for at, size in zip((x.b, x.h, x.i, x.j), keep.shape, strict=True)]
        return bool(keep[tuple(index)])

    return Rule(tensor, keeps)


def thirds(length: int) -> tuple[int, ...]:
    """Three documents, the middle one empty for short lengths; what is behind the last is in none."""
    return 0, length // 3, length // 3 + length // 4, max(length - 1, 1)


def documents() -> Rule:
    def bounds(n: int, m: int) -> Bounds:
        return thirds(n), thirds(m)

    def make(n: int, m: int) -> fastattn.Mask:
        return fastattn.documents(*(torch.tensor(x, dtype=torch.int32) for x in bounds(n, m)))

    return Rule(make, Place.same_document, bounds)


ALIGNED = [
    rule(align)
    for align in ("bottom_right", "top_left")
    for rule in (
        causal,
        lambda align: window(2, 0, align),
        lambda align: window(0, 0, align),
        lambda align: window(3, 1, align),
        lambda align: window(None, 2, align),
        lambda align: window(1, None, align),
        lambda align: window(None, None, align),
        lambda align: chunked(3, align),
        lambda align: chunked(1, align),
        lambda align: chunked(100, align),
        lambda align: window(3, sys.maxsize, align),
        lambda align: window(sys.maxsize, 1, align),
        lambda align: chunked(sys.maxsize, align),
    )
]
ALIGNED_NAMES = [
    f"{name}-{align}"
    for align in ("bottom_right", "top_left")
    for name in (
        "causal",
        "window(2,0)",
        "window(0,0)",
        "window(3,1)",
        "window(,2)",
        "window(1,)",
        "window(,)",
        "chunked(3)",
        "chunked(1)",
        "chunked(100)",
        "window(3,max)",
        "window(max,1)",
        "chunked(max)",
    )
]
RULES = dict(zip(ALIGNED_NAMES, ALIGNED, strict=True)) | {
    "prefix(0)": prefix(0),
    "prefix(3)": prefix(3),
    "prefix([1,4])": prefix([1, 4]),
    "prefix(max)": prefix(sys.maxsize),
    "prefix([max,2])": prefix([sys.maxsize, 2]),
    "padding": padding(),
    "blocks-flat": blocks(1, 1, 4, 4, flat=True),
    "blocks-1-1": blocks(1, 1, 2, 5),
    "blocks-1-H": blocks(1, HEADS, 3, 3),
    "blocks-finer": blocks(BATCH, 1, 1, 6),
    "blocks-max": blocks(1, HEADS, sys.maxsize, 3),
    "blocks-B-1": blocks(BATCH, 1, 5, 2),
    "blocks-B-H": blocks(BATCH, HEADS, 4, 1),
    "dense-L-L": dense(2, 2),
    "dense-B-1-1-L": dense(2, 1, 1, 2),
    "dense-1-H-L-1": dense(1, 2, 2, 1),
    "dense-H-L-L": dense(2, 2, 2),
    "documents": documents(),
}


@cache
def kept(
    rule: Rule,
    q_length: int,
    k_length: int,
    q_start: int | None = None,
    k_start: int | None = None,
    packed: Bounds | None = None,
) -> Tensor:
    """Which pairs the rule keeps: bool ``[B, H, L_q, L_k]``, element by element."""
    keep = torch.zeros(BATCH, HEADS, q_length, k_length, dtype=torch.bool)
    for b, h, i, j in product(range(BATCH), range(HEADS), range(q_length), range(k_length)):
        place = Place(b, h, i, j, q_length, k_length, q_start, k_start, packed)
        keep[b, h, i, j] = (packed is None or place.same_document()) and rule.keeps(place)
    return keep


def expected(
    terms: list[list[Rule]],
    q_length: int,
    k_length: int,
    q_start: int | None = None,
    k_start: int | None = None,
) -> Tensor:
    """Any of the terms keeps a pair, by all of its rules; with documents in it positions are theirs."""
    any_of = torch.zeros(BATCH, HEADS, q_length, k_length, dtype=torch.bool)
    for term in terms:
        bounds = next((rule.documents for rule in term if rule.documents), None)
        packed = bounds(q_length, k_length) if bounds else None
        all_of = [kept(rule, q_length, k_length, q_start, k_start, packed) for rule in term]
        any_of |= torch.stack(all_of).all(0)
    return any_of


def made(terms: list[list[Rule]], q_length: int, k_length: int) -> fastattn.Mask:
    whole: fastattn.Mask | None = None
    for term in terms:
        part = fastattn.Mask()
        for rule in term:
            part = part & rule.make(q_length, k_length)
        whole = part if whole is None else whole | part
    assert whole is not None
    return whole


def resolved(mask: fastattn.Mask, q_length: int, k_length: int, q_start: Any, k_start: Any) -> Tensor:
    """The pairs that are left by what the kernels are given in place of the mask."""
    q, k = torch.empty(BATCH, HEADS, q_length, 1), torch.empty(BATCH, HEADS, k_length, 1)
    problem = resolve(q, k, mask, Bias(), None, None, q_start, k_start, 1.0, 0.0, 0.0)
    i, j = torch.arange(q_length)[:, None], torch.arange(k_length)
    diagonal = i + (k_length - q_length if problem.bottom_right else problem.q_start - problem.k_start)
    keep = torch.ones(BATCH, HEADS, q_length, k_length, dtype=torch.bool)
    if problem.left >= 0:
        keep &= j >= diagonal - problem.left
    if problem.right >= 0:
        keep &= j <= diagonal + problem.right
    if problem.ranges is not None:
        first, end = problem.ranges[..., 0, None], problem.ranges[..., 1, None]  # [B or 1, K, L_q or 1, 1]
        keep &= ((j >= first) & (j < end)).any(1, keepdim=True)
    if problem.blocks is not None:
        keep &= problem.blocks[:, :, i // problem.block_q, j // problem.block_k]
    return keep if problem.mask is None else keep & problem.mask


def check(
    terms: list[list[Rule]],
    q_length: int,
    k_length: int,
    q_start: int | None = None,
    k_start: int | None = None,
) -> None:
    mask = made(terms, q_length, k_length)
    found = mask.to_dense(batch=BATCH, q_length=q_length, k_length=k_length, q_start=q_start, k_start=k_start)
    want = expected(terms, q_length, k_length, q_start, k_start)
    if found is None:
        assert want.all()
    else:
        assert found.dtype == torch.bool and found.dim() == 4
        assert torch.equal(found.expand(want.shape), want), (found.int(), want.int())
    assert torch.equal(resolved(mask, q_length, k_length, q_start, k_start), want)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_each_mask(name: str, lengths: tuple[int, int]) -> None:
    check([[RULES[name]]], *lengths)


@pytest.mark.parametrize("lengths", LENGTHS[:3], ids=str)
def test_every_pair_joined_by_and(lengths: tuple[int, int]) -> None:
    for a, b in combinations(RULES.values(), 2):
        check([[a, b]], *lengths)


@pytest.mark.parametrize("lengths", LENGTHS[:3], ids=str)
def test_every_pair_joined_by_or(lengths: tuple[int, int]) -> None:
    for a, b in combinations(RULES.values(), 2):
        check([[a], [b]], *lengths)


DEEP = {
    "causal|prefix, documents": [["causal-bottom_right", "documents"], ["prefix(3)", "documents"]],
    "documents|causal&window": [["documents"], ["causal-top_left", "window(3,1)-top_left"]],
    "three terms": [
        ["blocks-1-H", "causal-bottom_right"],
        ["prefix([1,4])", "padding"],
        ["window(0,0)-top_left"],
    ],
    "chunks of documents": [["documents", "chunked(3)-bottom_right", "causal-bottom_right", "padding"]],
    "or of dense": [["dense-L-L", "causal-top_left"], ["dense-B-1-1-L", "blocks-B-1"]],
}


@pytest.mark.parametrize("lengths", LENGTHS[:3], ids=str)
@pytest.mark.parametrize("name", DEEP)
def test_terms_of_several(name: str, lengths: tuple[int, int]) -> None:
    check([[RULES[rule] for rule in term] for term in DEEP[name]], *lengths)


STARTED = [name for name in RULES if not name.startswith("documents")]


@pytest.mark.parametrize(
    ("q_start", "k_start"), [(0, 0), (4, 0), (0, 3), (6, 2), (3, None), (None, 2)], ids=str
)
@pytest.mark.parametrize("name", STARTED)
def test_positions_of_a_shard(name: str, q_start: int | None, k_start: int | None) -> None:
    check([[RULES[name]]], 7, 11, q_start, k_start)
    check([[RULES[name], RULES["causal-bottom_right"]], [RULES["prefix([1,4])"]]], 7, 11, q_start, k_start)


def test_a_start_for_each_sequence() -> None:
    starts = torch.tensor([2, 5])
    for rule in (
        RULES["causal-bottom_right"],
        RULES["window(3,1)-top_left"],
        RULES["chunked(3)-bottom_right"],
    ):
        found = made([[rule]], 4, 9).to_dense(batch=BATCH, q_length=4, k_length=9, q_start=starts, k_start=1)
        assert found is not None and found.shape[0] == BATCH
        for b, start in enumerate(starts.tolist()):
            want = expected([[rule]], 4, 9, start, 1)[b]
            assert torch.equal(found[b].expand(want.shape), want)


@pytest.mark.parametrize("batch", [1, 2])
def test_documents_of_position_ids(batch: int) -> None:
    """Packed rows as transformers hands them: positions start again with each document."""
    bounds = [(0, 3, 4, 9), (0, 5, 9, 9)][:batch]
    ids = torch.tensor([[i - max(x for x in row if x <= i) for i in range(9)] for row in bounds])
    for name in ("causal-bottom_right", "window(2,0)-bottom_right", "chunked(3)-top_left", "prefix(3)"):
        mask = fastattn.documents(position_ids=ids) & RULES[name].make(9, 9)
        found = mask.to_dense(batch=BATCH, q_length=9, k_length=9)
        assert found is not None
        for b, row in enumerate(bounds):
            want = kept(RULES[name], 9, 9, packed=(row, row))[b]
            assert torch.equal(found.expand(BATCH, HEADS, 9, 9)[b], want)


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        ("causal-bottom_right", "prefix(3)", "documents"),
        ("padding", "blocks-1-1", "window(3,1)-top_left"),
        ("dense-L-L", "documents", "causal-top_left"),
        ("documents", "prefix(3)", "window(3,1)-bottom_right"),
        ("documents", "padding", "chunked(3)-bottom_right"),
    ],
)
def test_and_distributes_over_or(a: str, b: str, c: str) -> None:
    """Where one of the two has documents, what both are joined with counts in each of them on its own."""
    x, y, z = (fastattn.Mask() & RULES[name].make(7, 11) for name in (a, b, c))
    sizes = {"batch": BATCH, "q_length": 7, "k_length": 11}
    full = (BATCH, HEADS, 7, 11)
    for one, other in (((x | y) & z, x & z | y & z), (z & (x | y), z & x | z & y), (x | y, y | x)):
        want = other.to_dense(**sizes).expand(full)
        assert torch.equal(one.to_dense(**sizes).expand(full), want)
        assert torch.equal(resolved(one, 7, 11, None, None), want)


def test_no_constraint() -> None:
    sizes = {"batch": 1, "q_length": 3, "k_length": 4}
    assert fastattn.Mask().to_dense(**sizes) is None
    assert (fastattn.Mask() | fastattn.causal()).to_dense(**sizes) is None
    assert torch.equal(
        (fastattn.Mask() & fastattn.causal()).to_dense(**sizes), fastattn.causal().to_dense(**sizes)
    )


def test_masks_join_tensors_on_either_side() -> None:
    keep = torch.rand(5, 5) > 0.5
    sizes = {"batch": 1, "q_length": 5, "k_length": 5}
    low = torch.ones(5, 5, dtype=torch.bool).tril()
    assert torch.equal((keep & fastattn.causal()).to_dense(**sizes)[0, 0], keep & low)
    assert torch.equal((fastattn.causal() & keep).to_dense(**sizes)[0, 0], keep & low)
    assert torch.equal((keep | fastattn.causal()).to_dense(**sizes)[0, 0], keep | low)
    assert torch.equal((fastattn.causal() | keep).to_dense(**sizes)[0, 0], keep | low)


@pytest.mark.parametrize(
    "sizes", [((4, 4), (4, 4)), ((2, 6), (4, 3)), ((8, 1), (2, 5)), ((1, 20), (3, 5))], ids=str
)
@pytest.mark.parametrize("join", [operator.and_, operator.or_])
def test_blocks_of_sizes_that_divide_stay_blocks(join: Any, sizes: tuple[tuple[int, int], ...]) -> None:
    rules = [blocks(1, HEADS, *sizes[0]), blocks(BATCH, 1, *sizes[1])]
    a, b = (rule.make(13, 17) for rule in rules)
    mask = join(a, b)
    q, k = torch.empty(BATCH, HEADS, 13, 1), torch.empty(BATCH, HEADS, 17, 1)
    problem = resolve(q, k, mask, Bias(), None, None, None, None, 1.0, 0.0, 0.0)
    assert problem.mask is None and problem.ranges is None and problem.blocks is not None
    want = join(*(kept(rule, 13, 17) for rule in rules))
    assert torch.equal(resolved(mask, 13, 17, None, None), want)
