"""What the ops cost, for `torch.utils.flop_counter`: told to it when it is imported, by whoever needs it.

It imports triton where that is installed, a fifth of a second that `import fastattn` does not take.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

import torch

_COUNTER: Final = "torch.utils.flop_counter"


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


_FORMULAS: Final = {
    "attention_forward": _forward,
    "attention_float8": _forward,
    "attention_backward": _backward,
    "attention_decode": _decode,
}


def register(*ops: str) -> None:
    """Make the formulas of these ops, which are defined, known: now, or when the counter is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], ops)
    else:
        sys.meta_path.insert(0, _WhenImported(ops))


def _register(counter: ModuleType, ops: tuple[str, ...]) -> None:
    for name in ops:
        counter.register_flop_formula(getattr(torch.ops.fastattn, name))(_FORMULAS[name])


class _WhenImported:
    """Finds the counter's module as Python does, once, and registers formulas when it has run."""

    def __init__(self, ops: tuple[str, ...]) -> None:
        self.ops = ops

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module, self.ops)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
