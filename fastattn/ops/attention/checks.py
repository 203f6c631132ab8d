"""What no backend takes raises here, with what was expected and what was given."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.ops.attention.biases import Bias
from fastattn.ops.attention.constraints import (
    Band,
    Blocks,
    Dense,
    Documents,
    Lengths,
    Prefix,
    whole_number,
)
from fastattn.ops.attention.masks import Mask

MAX_HEAD_DIM = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, dtypes and devices of q, k and v."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(
                f"{name}: expected 4 dimensions [batch, heads, length, head_dim], got {list(x.shape)}"
            )
        if x.dtype not in DTYPES:
            hint = " (fastattn.attention_float8 takes it)" if x.dtype == torch.float8_e4m3fn else ""
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}{hint}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
    batch, heads, _, head_dim = q.shape
    kv_heads, k_length = k.shape[1], k.shape[2]
    if k.shape[0] != batch or v.shape[0] != batch:
        raise ValueError(f"batch: expected q's {batch}, got {k.shape[0]} in k and {v.shape[0]} in v")
    if v.shape[1] != kv_heads or v.shape[2] != k_length:
        raise ValueError(f"v: expected k's heads and length {[kv_heads, k_length]}, got {list(v.shape[1:3])}")
    if k.shape[3] != head_dim:
        raise ValueError(f"k: expected q's head_dim {head_dim}, got {k.shape[3]}")
    for name, dim in (("q and k", head_dim), ("v", v.shape[3])):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim of {name}: expected 1 to {MAX_HEAD_DIM}, got {dim}")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"heads: expected k's {kv_heads} to divide q's {heads}")


def check_options(
    q: Tensor,
    k: Tensor,
    mask: Mask,
    bias: Bias,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
    q_start: int | Tensor | None,
    k_start: int | None,
) -> None:
    """Everything else, against q and k that have passed `check_inputs`."""
    _check_number("dropout", dropout)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    if softcap is not None:
        _check_number("softcap", softcap)
        if not 0 < softcap < math.inf:
            raise ValueError(f"softcap: expected a finite number above 0, or None, got {softcap}")
    _check_starts(q, q_start, k_start, dropout)
    if sinks is not None:
        if not isinstance(sinks, Tensor) or sinks.dtype not in DTYPES:
            got = sinks.dtype if isinstance(sinks, Tensor) else type(sinks).__name__
            raise TypeError(f"sinks: expected a floating tensor, got {got}")
        if sinks.shape != (q.shape[1],) or sinks.device != q.device:
            raise ValueError(
                f"sinks: expected {[q.shape[1]]} (heads) on {q.device}, "
                f"got {list(sinks.shape)} on {sinks.device}"
            )
    _check_mask(q, k, mask, explicit=q_start is not None or k_start is not None)
    _check_bias(q, k, bias)


def _check_starts(q: Tensor, q_start: int | Tensor | None, k_start: int | None, dropout: float) -> None:
    if isinstance(q_start, Tensor):
        if q_start.is_floating_point() or q_start.dtype == torch.bool:
            raise TypeError(f"q_start: expected an int or an integer tensor [B], got {q_start.dtype}")
        if q_start.shape != (q.shape[0],) or q_start.device != q.device:
            raise ValueError(
                f"q_start: expected {[q.shape[0]]} (batch) on {q.device}, "
                f"got {list(q_start.shape)} on {q_start.device}"
            )
        if dropout > 0:
            raise NotImplementedError("q_start: expected an int with dropout, which goes by it, got a tensor")
    elif q_start is not None:
        _check_start("q_start", q_start, ", or an integer tensor [B]")
    if isinstance(k_start, Tensor):
        raise TypeError("k_start: expected an int, got a tensor (q_start may be one: [B])")
    if k_start is not None:
        _check_start("k_start", k_start)


def _check_start(name: str, start: int, hint: str = "") -> None:
    if whole_number(name, start, 0, hint) >= 2**31:
        raise ValueError(f"{name}: expected a position below 2^31, got {start}")


def _check_number(name: str, x: object) -> None:
    if not isinstance(x, (int, float)) and not hasattr(x, "__float__"):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")


def _check_mask(q: Tensor, k: Tensor, mask: Mask, explicit: bool) -> None:
    batch, heads, q_length, _ = q.shape
    k_length = k.shape[2]
    for clause in mask.clauses:
        for constraint in clause:
            if isinstance(constraint, Band):
                continue
            name = _NAMES.get(type(constraint), "mask")
            for x in constraint.tensors():
                if x.device != q.device:
                    raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")
            if isinstance(constraint, Dense):
                dense = constraint.keep
                dense = dense[(None,) * (4 - dense.dim())] if dense.dim() < 4 else dense
                check_broadcast("mask", dense, (batch, heads, q_length, k_length))
            elif isinstance(constraint, Lengths):
                if constraint.lengths.shape[0] != batch:
                    raise ValueError(
                        f"{name}: expected {batch} lengths (batch), got {constraint.lengths.shape[0]}"
                    )
                given = _readable(constraint.lengths)
                if given is not None and any(not 0 <= n <= k_length for n in given):
                    raise ValueError(f"{name}: expected values from 0 to {k_length} (L_k), got {given}")
            elif isinstance(constraint, Prefix):
                if isinstance(constraint.count, Tensor) and constraint.count.shape[0] not in (1, batch):
                    raise ValueError(
                        f"{name}: expected {batch} numbers (batch), got {constraint.count.shape[0]}"
                    )
            elif isinstance(constraint, Blocks):
                wanted = (-(-q_length // constraint.q_size), -(-k_length // constraint.k_size))
                check_broadcast(name, constraint.blocks, (batch, heads, *wanted), exact=2)
            elif isinstance(constraint, Documents):
                if explicit:
                    raise ValueError(
                        "q_start, k_start: expected None with documents(...), whose positions count from "
                        "each document's start"
                    )
                _check_documents(constraint, batch, q_length, k_length)


_NAMES = {
    Lengths: "key_padding(lengths)",
    Prefix: "prefix(n)",
    Blocks: "block_sparse(blocks)",
    Documents: "documents",
}


def _check_documents(documents: Documents, batch: int, q_length: int, k_length: int) -> None:
    ids = documents.position_ids
    if ids is not None:
        if ids.shape[0] not in (1, batch) or ids.shape[1] != q_length or q_length != k_length:
            raise ValueError(
                f"documents(position_ids=): expected [{batch} or 1, L] with L = L_q = L_k, "
                f"got {list(ids.shape)} with L_q = {q_length} and L_k = {k_length}"
            )
        return
    for name, cu, length in (
        ("cu_seqlens", documents.cu_seqlens, q_length),
        ("cu_seqlens_k", documents.cu_seqlens_k, k_length),
    ):
        assert cu is not None
        given = _readable(cu)
        if given is not None and (given[0] != 0 or given != sorted(given) or given[-1] > length):
            raise ValueError(
                f"documents({name}): expected bounds that do not decrease, from 0 to at most {length}, "
                f"got {given}"
            )


def _readable(x: Tensor) -> list[int] | None:
    """Its values where reading them is free: plain tensors in CPU memory."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return None
    values: list[int] = x.tolist()
    return values


def _check_bias(q: Tensor, k: Tensor, bias: Bias) -> None:
    full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    if bias.dense is not None:
        if bias.dense.dim() != 4:
            raise ValueError(
                f"bias: expected 4 dimensions broadcastable to {list(full)}, got {list(bias.dense.shape)}"
            )
        check_broadcast("bias", bias.dense, full)
        if bias.dense.device != q.device:
            raise ValueError(f"bias: expected q's device {q.device}, got {bias.dense.device}")
    for part in bias.compact:
        given, name = part.parameter, part.name
        if given.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {given.device}")
        if part.heads != 1 and part.heads != full[1]:
            raise ValueError(f"{name}: expected {full[1]} heads, got {list(given.shape)}")
        if part.batch != 1 and part.batch != full[0]:
            raise ValueError(f"{name}: expected a batch of {full[0]} or none, got {list(given.shape)}")
        if part.bottom_right != bias.compact[0].bottom_right:
            raise ValueError(f"{name}: expected the same align in all compact biases of a sum")


def check_saved(q: Tensor, v: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> None:
    """What `attention_backward` is given besides, against q and v that have passed `check_inputs`."""
    rows = (q.shape[0], q.shape[1], q.shape[2])
    of_lse = torch.promote_types(q.dtype, torch.float32)
    for name, x, shape, dtype in (
        ("dout", dout, (*rows, v.shape[3]), q.dtype),
        ("out", out, (*rows, v.shape[3]), q.dtype),
        ("lse", lse, rows, of_lse),
        ("dlse", dlse, rows, of_lse),
    ):
        if x is None and name == "dlse":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.shape != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected q's device {q.device}, got {x.device}")


def check_broadcast(name: str, x: Tensor, full: tuple[int, ...], exact: int = 0) -> None:
    """Raise unless x broadcasts to `full`; the last `exact` dimensions have to be as they are there."""
    sizes = list(zip(x.shape, full, strict=False))
    free = len(full) - exact
    fits = x.dim() == len(full) and all(
        have == want or (have == 1 and i < free) for i, (have, want) in enumerate(sizes)
    )
    if not fits:
        raise ValueError(f"{name}: expected a shape broadcastable to {list(full)}, got {list(x.shape)}")
