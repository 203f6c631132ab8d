"""flash-attn's calls as calls of `fastattn.attention`: the one place where its arguments are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fastattn.integrations.flash_attn.layouts import Dense, Layout, Packed, Padded, Sequences
from fastattn.ops.attention import (
    Mask,
    alibi,
    attention,
    causal,
    documents,
    explain,
    sliding_window,
)
from fastattn.ops.choice import Explanation

# Columns of the probabilities computed at a time: the widest v that attention takes.
_COLUMNS: Final = 512


class Options(NamedTuple):
    """What flash-attn's functions have in common; their documentation says what each means."""

    dropout_p: float = 0.0
    softmax_scale: float | None = None
    causal: bool = False
    window_size: Sequence[int] | Tensor = (-1, -1)
    softcap: float | None = 0.0
    alibi_slopes: Tensor | None = None

    def mask(self, k_length: int | None = None) -> Mask:
        """What a query may attend to by its distance; the bottom right corners are aligned.

        Args:
            k_length: seqlen_k, where it is known: a side of the window that is as long is none.

        Raises:
            ValueError: `window_size` is not two numbers.
        """
        window = self.window_size.tolist() if isinstance(self.window_size, Tensor) else self.window_size
        if not isinstance(window, Sequence) or len(window) != 2:
            raise ValueError(f"window_size: expected (left, right), got {window!r}")
        left, right = (
            None if size is None or size < 0 or (k_length is not None and size >= k_length) else size
            for size in window
        )
        if self.causal:
            right = 0
        if left is None and right is None:
            return Mask()
        return causal() if left is None and right == 0 else sliding_window(left, right)

    def attention(self, q: Tensor, seed: Tensor | None = None) -> dict[str, Any]:
        """The keyword arguments of `fastattn.attention`, but for the mask; draws the seed if None is given.

        Raises:
            ValueError: `alibi_slopes` has neither one nor two dimensions.
        """
        if self.dropout_p > 0 and seed is None:
            seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
        return {
            "bias": None if self.alibi_slopes is None else alibi(self.alibi_slopes),
            "scale": self.softmax_scale,
            "softcap": self.softcap if self.softcap is not None and self.softcap > 0 else None,
            "dropout": self.dropout_p,
            "seed": seed if self.dropout_p > 0 else None,
        }


class Call(NamedTuple):
    """A call of `fastattn.attention`.

    Attributes:
        q: ``[B, H, L_q, D]``.
        k: ``[B, H_kv, L_k, D]``.
        v: ``[B, H_kv, L_k, D]``.
        options: its keyword arguments.
        layout: the way back to flash-attn's.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    layout: Layout

    def run(self) -> tuple[Tensor, Tensor]:
        """out and softmax_lse, as flash-attn lays them out."""
        out, lse = attention(self.q, self.k, self.v, return_lse=True, **self.options)
        return self.layout.from_queries(out), self.layout.from_lse(lse)

    def explain(self) -> Explanation:
        return explain(self.q, self.k, self.v, **self.options)

    def results(self, return_attn_probs: bool) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """What flash-attn's functions return: out, or (out, softmax_lse, S_dmask)."""
        out, lse = self.run()
        return (out, lse, self.probabilities()) if return_attn_probs else out

    def probabilities(self) -> Tensor:
        """S_dmask, ``[sequences, H, longest q, longest k]``: negative where dropped; empty without dropout.

        They come out of attention itself, whose output is the matrix of probabilities where v is the
        identity.
        """
        if self.options["dropout"] == 0:
            return self.q.new_empty((0,))
        position = self.layout.key_positions(self.k)[:, None, :, None]
        count = self.layout.key_count(self.k)
        without = self.options | {"dropout": 0.0, "seed": None}
        found = [self.q.new_empty((*self.q.shape[:3], 0))]
        for first in range(0, count, _COLUMNS):
            column = torch.arange(first, min(first + _COLUMNS, count), device=position.device)
            unit = (position == column).to(self.q.dtype).expand(*self.k.shape[:3], -1)
            with torch.no_grad():
                kept = attention(self.q, self.k, unit, **self.options)
                whole = attention(self.q, self.k, unit, **without)
            assert isinstance(kept, Tensor) and isinstance(whole, Tensor)
            found.append(torch.where((kept == 0) & (whole != 0), -whole, whole))
        return self.layout.by_sequence(torch.cat(found, dim=-1))


def dense(q: Tensor, k: Tensor, v: Tensor, options: Options, seed: Tensor | None = None) -> Call:
    """The call behind `flash_attn_func`."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, 4, "(batch_size, seqlen, nheads, headdim)")
    given = options.attention(q, seed) | {"mask": options.mask(k.shape[1])}
    layout = Dense()
    return Call(layout.queries(q), layout.keys(k), layout.keys(v), given, layout)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_sequences: Sequences,
    k_sequences: Sequences,
    options: Options,
    seed: Tensor | None = None,
) -> Call:
    """The call behind `flash_attn_varlen_func`."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(name, x, 3, "(total, nheads, headdim)")
    if len(q_sequences) != len(k_sequences):
        raise ValueError(
            "cu_seqlens_q, cu_seqlens_k: expected the same number of sequences, "
            f"got {len(q_sequences)} and {len(k_sequences)}"
        )
    layout: Layout
    if options.alibi_slopes is None or options.alibi_slopes.dim() == 1:
        layout, alone = Packed(q_sequences, k_sequences), _documents(q_sequences, k_sequences)
    else:
        # Slopes of each sequence's own, and a packed batch has one entry only.
        layout = Padded(q_sequences, k_sequences, (q.shape[0], k.shape[0]))
        padded = layout.keys(k)
        alone = Mask() & (layout.key_positions(padded) >= 0)[:, None, None]
    given = options.attention(q, seed) | {"mask": alone & options.mask()}
    return Call(layout.queries(q), layout.keys(k), layout.keys(v), given, layout)


def _documents(q: Sequences, k: Sequences) -> Mask:
    if k.whole:
        return documents(q.bounds, k.bounds)
    # What is skipped and what is not used at the end of each are documents of their own, without queries.
    start, end = q.bounds[:-1], q.bounds[-1:]
    cu_q = torch.cat((torch.stack((start, start, q.bounds[1:]), 1).flatten(), end))
    cu_k = torch.cat((torch.stack((k.bounds[:-1], k.first, k.end), 1).flatten(), k.bounds[-1:]))
    return documents(cu_q, cu_k)


def check_rank(name: str, x: Tensor, rank: int, layout: str) -> None:
    """Raise unless x has `rank` dimensions, those of `layout`."""
    if x.dim() != rank:
        raise ValueError(f"{name}: expected {layout}, got {list(x.shape)}")
