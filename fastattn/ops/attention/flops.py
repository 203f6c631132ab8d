"""Floating-point operations of attention's ops, by the shapes of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final


def _rectangle(passes: int, q_shape: Sequence[int], k_shape: Sequence[int], v_shape: Sequence[int]) -> int:
    # The convention of torch's own formulas: the full L_q x L_k rectangle, whatever the mask.
    batch, heads, q_length, qk_dim = q_shape
    return passes * 2 * batch * heads * q_length * k_shape[2] * (qk_dim + v_shape[3]) // 2


def _forward(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _rectangle(2, q, k, v)


def _backward(
    dout: Any, dlse: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    wanted = args[-1]
    # The bits of `library.WANTED`: of q, k and v, and of either bias.
    return _rectangle((5 if wanted & 8 else 0) + (2 if wanted & 3 else 0), q, k, v)


def _decode(
    q: Any, k_cache: Any, v_cache: Any, totals: Any, left_padding: Any, block_table: Any, *args: Any, **_: Any
) -> int:
    slots = k_cache[2] if block_table is None else block_table[1] * k_cache[2]
    return _rectangle(2, q, (q[0], k_cache[1], slots, k_cache[3]), (q[0], v_cache[1], slots, v_cache[3]))


FORMULAS: Final[dict[str, Callable[..., int]]] = {
    "attention_forward": _forward,
    "attention_float8": _forward,
    "attention_backward": _backward,
}
DECODE: Final[dict[str, Callable[..., int]]] = {"attention_decode": _decode}
