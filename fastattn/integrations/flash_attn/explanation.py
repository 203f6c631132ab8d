"""Which kernel a call of a flash-attn function would run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fastattn.integrations.flash_attn import calls
from fastattn.integrations.flash_attn.cache import Turn, Where, flash_attn_with_kvcache, kvcache_call
from fastattn.integrations.flash_attn.calls import Options
from fastattn.integrations.flash_attn.functions import flash_attn_func, flash_attn_varlen_func, varlen_call
from fastattn.integrations.flash_attn.packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from fastattn.ops.choice import Explanation

_DENSE = (flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func)
_VARLEN = (flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend a call of one of the seven functions would run, and why the others would not.

    Args:
        function: one of the seven, as `flash_attn_func`.
        args: its arguments.
        kwargs: its arguments.

    Returns:
        The `fastattn.Explanation` of the call of `fastattn.attention` that it is. No attention is computed,
        and nothing is appended to a cache.

    Raises:
        TypeError: another function, or arguments it does not take.
        ValueError: arguments no backend takes.

    Example:
        >>> import torch
        >>> q = torch.randn(2, 5, 4, 8, dtype=torch.float64)
        >>> explain(flash_attn_func, q, q, q, causal=True).backend
        'reference'
    """
    if not any(function is f for f in (*_DENSE, *_VARLEN, flash_attn_with_kvcache)):
        expected = [f.__name__ for f in (*_DENSE, *_VARLEN, flash_attn_with_kvcache)]
        got = f"the string {function!r}" if isinstance(function, str) else type(function).__name__
        raise TypeError(f"explain: expected one of the functions {expected} first, got {got}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    options = Options(**{name: given[name] for name in Options._fields if name in given})
    if function is flash_attn_with_kvcache:
        where = Where(**{name: given[name] for name in Where._fields})
        turn = Turn(**{name: given[name] for name in Turn._fields})
        caches = given["k_cache"], given["v_cache"]
        return kvcache_call(given["q"], *caches, given["k"], given["v"], where, turn, options).explain()
    if "qkv" in given:
        given["q"], given["k"], given["v"] = given["qkv"].unbind(-3)
    elif "kv" in given:
        given["k"], given["v"] = given["kv"].unbind(-3)
    q, k, v = given["q"], given["k"], given["v"]
    if function in _DENSE:
        return calls.dense(q, k, v, options).explain()
    for name in ("cu_seqlens", "max_seqlen"):
        if name in given:
            given[f"{name}_q"] = given[f"{name}_k"] = given[name]
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "block_table")
    rest = {name: given[name] for name in names if name in given}
    return varlen_call(q, k, v, **rest, options=options).explain()
