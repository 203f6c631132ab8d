"""`memory_efficient_attention` and its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.integrations.xformers.structure import structure, tensor_of
from fastattn.ops.attention import attention, attention_backward, merge_attention
from fastattn.ops.attention import explain as explain_attention
from fastattn.ops.choice import Explanation


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Drop-in for ``xformers.ops.memory_efficient_attention``, with gradients for everything, on CPU as well.

    Args:
        query: ``[B, M_q, H, K]``, ``[B, M_q, K]`` (one head), or ``[B, M_q, G, H, K]``: H heads in each of G
            groups. float32, bfloat16, float16 or float64 (the reference backend).
        key: ``[B, M_k, H, K]``, ``[B, M_k, K]`` or ``[B, M_k, G, H, K]``. Where it is expanded over H, as is
            value, and neither needs a gradient, a group's keys are read once.
        value: ``[B, M_k, H, K_v]``, ``[B, M_k, K_v]`` or ``[B, M_k, G, H, K_v]``.
        attn_bias: a floating tensor ``[B, H, M_q, M_k]`` (``[B, M_q, M_k]``, ``[B, G, H, M_q, M_k]``), added
            to the scores, with a gradient; or an object of one of the classes in `attn_bias`, or of xformers'
            own of these names; or None.
        p: probability in [0, 1) with which a probability is zeroed, always applied.
        scale: factor on the scores; ``1 / sqrt(K)`` if None.
        op: None; `explain` tells what runs.
        output_dtype: of the result; wider than query's, the whole computation has it. query's if None.
        deterministic: taken, for it always is.

    Returns:
        ``[B, M_q, H, K_v]``, with query's dimensions, in `output_dtype`. A row with no key to attend to is 0.

    Raises:
        ValueError: shapes that do not fit, with the expected and the given.
        TypeError: dtypes that do not fit.
        NotImplementedError: an `op`; an attn_bias of another class, by name.

    Source: the signature and meaning are xformers 0.0.35's.

    Example:
        >>> import torch
        >>> from fastattn.integrations import xformers as xops
        >>> q, k, v = (torch.randn(1, 5, 2, 8) for _ in range(3))
        >>> xops.memory_efficient_attention(q, k, v, attn_bias=xops.LowerTriangularMask()).shape
        torch.Size([1, 5, 2, 8])
    """
    call = _call(query, key, value, attn_bias, p, scale, op, output_dtype)
    return call.run()[0]


def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """`memory_efficient_attention` without gradients.

    Args, Returns, Raises: as `memory_efficient_attention`.
    """
    with torch.no_grad():
        return _call(query, key, value, attn_bias, p, scale, op, output_dtype).run()[0]


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The result and what `memory_efficient_attention_backward` needs of it.

    Args: as `memory_efficient_attention`, with p 0.

    Returns:
        the result, and the log-sum-exp of each row's scores: natural logarithm, float32, ``[B, H, M_q]``
        (``[B, 1, M_q]`` for three dimensions, ``[B, G, H, M_q]`` for five), of packed sequences as well.

    Raises:
        NotImplementedError: p is not 0: it is not known to the backward.
        ValueError, TypeError: as `memory_efficient_attention`.
    """
    _no_dropout(p)
    with torch.no_grad():
        return _call(query, key, value, attn_bias, p, scale, op, output_dtype).run()


def memory_efficient_attention_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for query, key and value.

    Args:
        grad: the gradient that reaches `output`, of its shape.
        output, lse: what `memory_efficient_attention_forward_requires_grad` returned.
        query, key, value, attn_bias, p, scale, op: what it was given.

    Returns:
        three tensors of the shapes of query, key and value.

    Raises:
        NotImplementedError: p is not 0; an `op`.
        ValueError: shapes that do not fit; an lse of packed sequences padded to one length each.
    """
    _no_dropout(p)
    call = _call(query, key, value, attn_bias, p, scale, op, None, grouped=False)
    for name, x in (("grad", grad), ("output", output)):
        if x.dim() != query.dim():
            raise ValueError(f"{name}: expected query's {query.dim()} dimensions, got {list(x.shape)}")
    wanted = _lse_shape(query)
    if lse.shape != wanted:
        raise ValueError(f"lse: expected {list(wanted)}, got {list(lse.shape)}")
    flat = lse.flatten(1, 2) if query.dim() == 5 else lse
    grads = attention_backward(
        _heads_first(grad),
        *call.tensors,
        _heads_first(output),
        flat,
        mask=call.mask,
        bias=call.bias,
        scale=scale,
    )
    shapes = (query.shape, key.shape, value.shape)
    dq, dk, dv = (x.transpose(1, 2).reshape(shape) for x, shape in zip(grads, shapes, strict=True))
    return dq, dk, dv


def memory_efficient_attention_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: torch.dtype | None = None,
    _allow_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys, for `merge_attentions`.

    Args: as `memory_efficient_attention`, with p 0; `output_dtype` is float32, or float64 for float64 inputs,
        if None.

    Returns:
        the result and its log-sum-exp, as `memory_efficient_attention_forward_requires_grad`, with gradients.

    Raises:
        NotImplementedError: p is not 0; an `op`.
        ValueError, TypeError: as `memory_efficient_attention`.
    """
    _no_dropout(p)
    if output_dtype is None:
        output_dtype = torch.promote_types(query.dtype, torch.float32)
    return _call(query, key, value, attn_bias, p, scale, op, output_dtype).run()


def merge_attentions(
    attn_split: Tensor | Sequence[Tensor],
    lse_split: Tensor | Sequence[Tensor],
    write_lse: bool = True,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention over all keys, from its results over parts of them.

    Args:
        attn_split: N results ``[B, M, H, K]`` or ``[B, M, G, H, K]``, as a sequence or stacked.
        lse_split: their N log-sum-exps ``[B, H, M]`` or ``[B, G, H, M]``, as a sequence or stacked.
        write_lse: whether to return the log-sum-exp over all keys.
        output_dtype: of the result; that of `attn_split` if None.

    Returns:
        the result, with gradients, and the log-sum-exp or None.

    Raises:
        ValueError: parts whose number or shapes do not fit.

    Source: `fastattn.merge_attention`.

    Example:
        >>> import torch
        >>> from fastattn.integrations import xformers as xops
        >>> q, k, v = (torch.randn(1, 6, 2, 8) for _ in range(3))
        >>> parts = [
        ...     xops.memory_efficient_attention_partial(q, k[:, keys], v[:, keys])
        ...     for keys in (slice(0, 2), slice(2, 6))
        ... ]
        >>> out, lse = xops.merge_attentions(*zip(*parts))
        >>> torch.allclose(out, xops.memory_efficient_attention(q, k, v), atol=1e-6)
        True
    """
    outs, lses = tuple(attn_split), tuple(lse_split)
    for out, lse in zip(outs, lses, strict=False):
        if out.dim() not in (4, 5) or out.dim() != lse.dim() + 1:
            raise ValueError(
                "attn_split, lse_split: expected [B, M, H, K] and [B, H, M], or [B, M, G, H, K] and "
                f"[B, G, H, M], got {list(out.shape)} and {list(lse.shape)}"
            )
    _check_output_dtype(output_dtype)
    if output_dtype is not None and outs:
        wide = torch.promote_types(output_dtype, outs[0].dtype)
        outs = tuple(out.to(wide) for out in outs)
    out, lse = merge_attention([x.movedim(1, -2) for x in outs], lses)
    out = out.movedim(-2, 1)
    return out if output_dtype is None else out.to(output_dtype), lse if write_lse else None


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: torch.dtype | None = None,
) -> Explanation:
    """Which backend `memory_efficient_attention` would run with the same arguments, and why not the others.

    Args: those of `memory_efficient_attention`. Nothing is computed.

    Returns:
        see `fastattn.explain`.

    Raises: as `memory_efficient_attention` does.

    Example:
        >>> import torch
        >>> query = torch.randn(1, 5, 2, 8, dtype=torch.float64)
        >>> explain(query, query, query).backend
        'reference'
    """
    call = _call(query, key, value, attn_bias, p, scale, op, output_dtype)
    return explain_attention(*call.tensors, **call.options())


def _check_output_dtype(output_dtype: torch.dtype | None) -> None:
    if output_dtype is not None and not output_dtype.is_floating_point:
        raise TypeError(f"output_dtype: expected a floating dtype or None, got {output_dtype}")


class _Call(NamedTuple):
    """A call as `fastattn.attention` takes it, and what its result looks like."""

    tensors: tuple[Tensor, Tensor, Tensor]
    mask: Any
    bias: Tensor | None
    scale: float | None
    dropout: float
    lead: torch.Size
    lse_shape: tuple[int, ...]
    dtype: torch.dtype

    def options(self) -> dict[str, Any]:
        return {"mask": self.mask, "bias": self.bias, "scale": self.scale, "dropout": self.dropout}

    def run(self) -> tuple[Tensor, Tensor]:
        found = attention(*self.tensors, **self.options(), return_lse=True)
        assert isinstance(found, tuple)
        out, lse = found
        out = out.transpose(1, 2).reshape(*self.lead, out.shape[-1])
        return out.to(self.dtype), lse.reshape(self.lse_shape)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any,
    p: float,
    scale: float | None,
    op: None,
    output_dtype: torch.dtype | None,
    grouped: bool = True,
) -> _Call:
    if op is not None:
        raise NotImplementedError(
            f"op: expected None, got {op}; explain() tells which kernel runs, "
            "and fastattn.attention(backend=) chooses one"
        )
    _check_shapes(query, key, value)
    _check_output_dtype(output_dtype)
    dtype = query.dtype if output_dtype is None else output_dtype
    wide = torch.promote_types(query.dtype, dtype)
    # Each head of a group has a gradient of its own, where there is one.
    grouped = grouped and not (torch.is_grad_enabled() and (key.requires_grad or value.requires_grad))
    if grouped and query.dim() == 5 and all(x.shape[3] == 1 or x.stride(3) == 0 for x in (key, value)):
        key, value = key[:, :, :, 0], value[:, :, :, 0]
    tensors = _heads_first(query).to(wide), _heads_first(key).to(wide), _heads_first(value).to(wide)

    q_length, k_length = query.shape[1], key.shape[1]
    mask = None
    if attn_bias is not None and not isinstance(attn_bias, Tensor):
        mask = structure(attn_bias, q_length, k_length).to(query.device)
        if mask.documents is not None and query.shape[0] != 1:
            name = type(attn_bias).__name__
            raise ValueError(f"{name}: expected sequences packed into a batch of 1, got {query.shape[0]}")
    bias = tensor_of(attn_bias)
    if bias is not None:
        bias = _check_bias(bias, query, k_length)
    lead = query.shape[:-1]
    return _Call(tensors, mask, bias, scale, p, lead, _lse_shape(query), dtype)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor) -> None:
    given = [list(x.shape) for x in (query, key, value)]
    if query.dim() not in (3, 4, 5) or any(x.dim() != query.dim() for x in (key, value)):
        raise ValueError(
            f"query, key, value: expected [B, M, K], [B, M, H, K] or [B, M, G, H, K] all three, got {given}"
        )
    alike = [(x.shape[0], *x.shape[2:-1]) for x in (query, key, value)]
    if alike[1] != alike[0] or alike[2] != alike[0] or key.shape[1] != value.shape[1]:
        raise ValueError(
            "query, key, value: expected the same batch and heads, and as many values as keys, "
            f"got {given}; expand keys and values over the heads of their group"
        )


def _check_bias(bias: Tensor, query: Tensor, k_length: int) -> Tensor:
    """The bias with four dimensions."""
    if not bias.is_floating_point():
        raise TypeError(f"attn_bias: expected a floating tensor, added to the scores, got {bias.dtype}")
    wanted = (query.shape[0], *query.shape[2:-1], query.shape[1], k_length)
    if bias.shape != wanted:
        raise ValueError(f"attn_bias: expected {list(wanted)}, got {list(bias.shape)}; expand() is free")
    if not bias.requires_grad:
        # What is expanded is kept, and read, once.
        for dim in range(bias.dim()):
            if bias.stride(dim) == 0:
                bias = bias.narrow(dim, 0, 1)
    if query.dim() == 3:
        return bias[:, None]
    if query.dim() == 5:
        groups = bias.shape[1] == bias.shape[2] == 1 or (bias.shape[1], bias.shape[2]) == query.shape[2:4]
        return (bias if groups else bias.expand(-1, *query.shape[2:4], -1, -1)).flatten(1, 2)
    return bias


def _heads_first(x: Tensor) -> Tensor:
    """``[B, M, H, K]``, without H or with groups, as ``[B, H, M, K]``."""
    if x.dim() == 3:
        return x[:, None]
    return (x.flatten(2, 3) if x.dim() == 5 else x).transpose(1, 2)


def _lse_shape(query: Tensor) -> tuple[int, ...]:
    heads = (1,) if query.dim() == 3 else tuple(query.shape[2:-1])
    return (query.shape[0], *heads, query.shape[1])


def _no_dropout(p: float) -> None:
    if p != 0:
        raise NotImplementedError(
            f"p: expected 0, got {p}; memory_efficient_attention has dropout and gradients"
        )
