"""Every feature of `attention` by name, on any device: to be tested alone, joined, or by a vendored copy.

>>> from fastattn.testing import FEATURES, Sizes, assert_within_budget, attention_errors, options_of
>>> sizes = Sizes(q_length=5, k_length=7)
>>> for name in ("window", "alibi"):
...     assert_within_budget(attention_errors(*sizes.tensors(), **options_of([name], sizes)))
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch import Generator, Tensor

import fastattn
from fastattn.ops.attention.biases import as_bias


class Sizes(NamedTuple):
    """Of one problem.

    Attributes:
        batch: B.
        heads: H.
        kv_heads: H_kv, which divides H.
        q_length: L_q.
        k_length: L_k.
        dim: D.
        v_dim: D_v.
    """

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    q_length: int = 70
    k_length: int = 150
    dim: int = 24
    v_dim: int = 17

    def tensors(
        self, dtype: torch.dtype = torch.float32, seed: int = 1, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of these sizes, normal: the same numbers on every device, rounded to `dtype`.

        Example:
            >>> [list(x.shape) for x in Sizes(1, 4, 2, 5, 7, 8, 6).tensors()]
            [[1, 4, 5, 8], [1, 2, 7, 8], [1, 2, 7, 6]]
        """
        g = Generator().manual_seed(seed)
        q = torch.randn(self.batch, self.heads, self.q_length, self.dim, generator=g)
        k = torch.randn(self.batch, self.kv_heads, self.k_length, self.dim, generator=g)
        v = torch.randn(self.batch, self.kv_heads, self.k_length, self.v_dim, generator=g)
        return q.to(device, dtype), k.to(device, dtype), v.to(device, dtype)


# Arguments of `attention`.
Options = dict[str, Any]
Feature = Callable[[Sizes, Generator], Options]


def _blocks(s: Sizes, g: Generator, batch: int, heads: int, size: int | tuple[int, int]) -> fastattn.Mask:
    q_size, k_size = (size, size) if isinstance(size, int) else size
    rows, columns = -(-s.q_length // q_size), -(-s.k_length // k_size)
    return fastattn.block_sparse(torch.rand(batch, heads, rows, columns, generator=g) < 0.4, size)


def _keep(g: Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=g) < 0.6


def _bounds(length: int, *parts: float) -> Tensor:
    """Cumulative lengths; two of the documents may be one, and those behind the last part belong to none."""
    return torch.tensor([0, *(int(part * length) for part in parts)], dtype=torch.int32)


def _position_ids(s: Sizes, batch: int) -> Tensor:
    rows = []
    for b in range(batch):
        ends = sorted(
            {min(max(end, 1), s.q_length) for end in (s.q_length // 5 + b, s.q_length // 2, s.q_length)}
        )
        rows.append(torch.cat([torch.arange(b - a) for a, b in zip([0, *ends], ends, strict=False)]))
    return torch.stack(rows)


def _dense(*which: str) -> Feature:
    """A bias that has the named dimensions; the others are 1."""

    def bias(s: Sizes, g: Generator) -> Options:
        full = {"B": s.batch, "H": s.heads, "Q": s.q_length, "K": s.k_length}
        return {"bias": torch.randn([full[x] if x in which else 1 for x in full], generator=g)}

    return bias


MASKS: Final[dict[str, Feature]] = {
    "causal": lambda s, g: {"mask": fastattn.causal()},
    "causal-top-left": lambda s, g: {"mask": fastattn.causal("top_left")},
    "window": lambda s, g: {"mask": fastattn.sliding_window(9, 0)},
    "window-both-sides": lambda s, g: {"mask": fastattn.sliding_window(13, 6, align="top_left")},
    "window-right": lambda s, g: {"mask": fastattn.sliding_window(None, 11)},
    "both-corners": lambda s, g: {
        "mask": fastattn.causal() & fastattn.sliding_window(40, 30, align="top_left")
    },
    "prefix": lambda s, g: {"mask": fastattn.causal() | fastattn.prefix(s.k_length // 3)},
    "prefix-of-each": lambda s, g: {
        "mask": fastattn.causal() | fastattn.prefix(torch.arange(s.batch) * s.k_length // 4)
    },
    "first-keys-and-window": lambda s, g: {
        "mask": fastattn.sliding_window(8, 0) | fastattn.causal() & fastattn.prefix(3)
    },
    "chunked": lambda s, g: {"mask": fastattn.causal() & fastattn.chunked(23)},
    "documents": lambda s, g: {
        "mask": fastattn.documents(_bounds(min(s.q_length, s.k_length), 0.2, 0.2, 0.7, 1))
    },
    "documents-causal": lambda s, g: {
        "mask": fastattn.documents(_bounds(s.q_length, 0.1, 0.6, 0.9), _bounds(s.k_length, 0.3, 0.5, 1))
        & fastattn.causal()
    },
    "position-ids": lambda s, g: {
        "mask": fastattn.documents(position_ids=_position_ids(s, s.batch)) & fastattn.causal()
    },
    "key-padding": lambda s, g: {
        "mask": fastattn.key_padding(torch.arange(s.batch) * s.k_length // max(s.batch - 1, 1))
    },
    "block-sparse": lambda s, g: {"mask": _blocks(s, g, 1, 1, (20, 32))},
    "block-sparse-causal": lambda s, g: {"mask": _blocks(s, g, s.batch, s.heads, 16) & fastattn.causal()},
    "blocks-or-blocks": lambda s, g: {"mask": _blocks(s, g, 1, s.heads, 48) | _blocks(s, g, s.batch, 1, 16)},
    "far-windows": lambda s, g: {
        "mask": fastattn.sliding_window(sys.maxsize, 3) & fastattn.chunked(sys.maxsize)
    },
    "window-and-prefix": lambda s, g: {"mask": fastattn.sliding_window(3, 0) & fastattn.prefix(2)},
    "two-block-sizes": lambda s, g: {"mask": _blocks(s, g, 1, s.heads, 33) & _blocks(s, g, s.batch, 1, 64)},
    "dense-mask": lambda s, g: {"mask": _keep(g, s.batch, s.heads, s.q_length, s.k_length)},
    "dense-mask-of-keys": lambda s, g: {"mask": _keep(g, s.batch, 1, 1, s.k_length)},
    "dense-mask-2d": lambda s, g: {"mask": _keep(g, s.q_length, s.k_length)},
    "blocks-or-window": lambda s, g: {"mask": _blocks(s, g, 1, s.heads, 40) | fastattn.sliding_window(5, 5)},
    "either-of-three": lambda s, g: {
        "mask": fastattn.sliding_window(4, 0)
        | fastattn.chunked(31) & fastattn.causal()
        | fastattn.key_padding(torch.full((s.batch,), min(7, s.k_length)))
    },
}
BIASES: Final[dict[str, Feature]] = {
    "bias-BHQK": _dense("B", "H", "Q", "K"),
    "bias-1HQK": _dense("H", "Q", "K"),
    "bias-B1QK": _dense("B", "Q", "K"),
    "bias-11QK": _dense("Q", "K"),
    "bias-BH1K": _dense("B", "H", "K"),
    "bias-B11K": _dense("B", "K"),
    "bias-1HQ1": _dense("H", "Q"),
    "bias-1111": _dense(),
    "alibi": lambda s, g: {"bias": fastattn.alibi(torch.rand(s.heads, generator=g))},
    "alibi-of-each": lambda s, g: {"bias": fastattn.alibi(torch.rand(s.batch, s.heads, generator=g))},
    "relative-position": lambda s, g: {
        "bias": fastattn.relative_position(torch.randn(12, s.heads, generator=g), max_distance=50)
    },
    "relative-position-decoder": lambda s, g: {
        "bias": fastattn.relative_position(
            torch.randn(6, s.heads, generator=g), bidirectional=False, max_distance=20
        )
    },
    "bias-of-infinities-and-alibi": lambda s, g: {
        "bias": torch.randn(s.batch, 1, s.q_length, s.k_length, generator=g).masked_fill(
            ~_keep(g, s.batch, 1, s.q_length, s.k_length), float("-inf")
        )
        + fastattn.alibi(torch.rand(s.heads, generator=g))
    },
    "half-bias-and-slopes": lambda s, g: {
        "bias": torch.randn(1, s.heads, 1, s.k_length, generator=g).bfloat16()
        + fastattn.alibi(torch.rand(s.batch, s.heads, generator=g).half())
    },
    "sum-of-biases": lambda s, g: {
        "bias": fastattn.alibi(torch.rand(s.heads, generator=g))
        + torch.randn(1, 1, 1, s.k_length, generator=g)
        + fastattn.relative_position(torch.randn(8, s.heads, generator=g), max_distance=30)
    },
}
OTHERS: Final[dict[str, Feature]] = {
    "softcap": lambda s, g: {"softcap": 1.5},
    "sinks": lambda s, g: {"sinks": torch.randn(s.heads, generator=g)},
    "half-sinks": lambda s, g: {"sinks": torch.randn(s.heads, generator=g).bfloat16()},
    "dropout": lambda s, g: {"dropout": 0.3, "seed": 11},
    "scale": lambda s, g: {"scale": -0.4},
    "starts": lambda s, g: {"q_start": 37, "k_start": 5},
    "starts-of-each": lambda s, g: {"q_start": torch.arange(s.batch) * 40 + 3},
}
FEATURES: Final[dict[str, Feature]] = MASKS | BIASES | OTHERS

_OF_DOCUMENTS: Final = {"documents", "documents-causal", "position-ids"}
_OF_STARTS: Final = {"starts", "starts-of-each"}


def go_together(names: Sequence[str]) -> bool:
    """Whether `attention` takes all of these at once.

    Args:
        names: keys of `FEATURES`.

    Example:
        >>> go_together(["window", "alibi"]), go_together(["documents", "starts"])
        (True, False)
    """
    some = set(names)
    starts = some & _OF_STARTS
    if len(some & _OF_DOCUMENTS) + len(starts) > 1:
        return False
    return not {"dropout", "starts-of-each"} <= some


def sizes_for(names: Sequence[str], sizes: Sizes) -> Sizes:
    """`sizes`, with as many keys as queries where a feature is for these alone: position ids.

    Args:
        names: keys of `FEATURES`.
        sizes: of the problem.

    Example:
        >>> sizes_for(["position-ids"], Sizes(q_length=5, k_length=7)).k_length
        5
    """
    return sizes._replace(k_length=sizes.q_length) if "position-ids" in names else sizes


def options_of(
    names: Sequence[str], sizes: Sizes, seed: int = 2, device: torch.device | str = "cpu"
) -> Options:
    """The features joined: masks by ``&``, biases by ``+``.

    Args:
        names: keys of `FEATURES` that `go_together`.
        sizes: of the problem.
        seed: of the numbers drawn, which are the same on every device.
        device: where the tensors are to be.

    Returns:
        Keyword arguments of `fastattn.attention`.

    Raises:
        KeyError: no such feature.

    Example:
        >>> sorted(options_of(["window", "alibi", "dropout"], Sizes()))
        ['bias', 'dropout', 'mask', 'seed']
    """
    g = Generator().manual_seed(seed)
    given = [FEATURES[name](sizes, g) for name in names]
    joined: Options = {}
    for options in given:
        joined.update(options)
    masks = [fastattn.Mask() & options["mask"] for options in given if "mask" in options]
    biases = [options["bias"] for options in given if "bias" in options]
    if masks:
        joined["mask"] = functools.reduce(operator.and_, masks).to(device)
    if biases:
        bias = as_bias(functools.reduce(operator.add, biases))
        compact = tuple(part.of(part.parameter.to(device)) for part in bias.compact)
        joined["bias"] = replace(
            bias, dense=None if bias.dense is None else bias.dense.to(device), compact=compact
        )
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in joined.items()}
