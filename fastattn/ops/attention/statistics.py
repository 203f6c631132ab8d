"""What can be said of the attention probabilities without that L_q × L_k matrix in memory; eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastattn.ops import choice
from fastattn.ops.attention.biases import Bias, as_bias
from fastattn.ops.attention.checks import check_inputs, check_options
from fastattn.ops.attention.masks import Mask, as_mask

# Probabilities in memory at a time: 4 MiB in float32, and at least one row of every head.
_BLOCK: Final = 1 << 20

Field = Literal["column_sums", "row_max", "entropy"]
_FIELDS: Final = ("column_sums", "row_max", "entropy")


class AttentionStatistics(NamedTuple):
    """What `attention_statistics` found out; None for what it was not asked for. All float32 or wider.

    Attributes:
        column_sums: ``[B, H, L_k]``, the attention each key gets from all queries together.
        row_max: ``[B, H, L_q]``, the largest probability of each query.
        entropy: ``[B, H, L_q]``, in nats, of each query's probabilities; its sink, where it has one, is one
            more outcome.
        top_k_values: ``[B, H, L_q, top_k]``, the largest probabilities of each query, in falling order.
        top_k_indices: ``[B, H, L_q, top_k]``, int64, their keys; -1 where the probability is 0.
        probabilities: ``[B, H, R, L_k]``, of the R queries asked for.
    """

    column_sums: Tensor | None
    row_max: Tensor | None
    entropy: Tensor | None
    top_k_values: Tensor | None
    top_k_indices: Tensor | None
    probabilities: Tensor | None


def attention_statistics(
    q: Tensor,
    k: Tensor,
    fields: Field | Sequence[Field] = (),
    *,
    top_k: int | None = None,
    rows: Sequence[int] | Tensor | None = None,
    mask: Mask | Tensor | None = None,
    bias: Bias | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    q_start: int | Tensor | None = None,
    k_start: int | None = None,
) -> AttentionStatistics:
    """Statistics of the probabilities that `attention` weighs the values with, by blocks of rows.

    Memory beyond what is asked for is linear in L_q + L_k: some twenty buffers of 4 MiB, or of one row of
    every head where that is more. Differentiable once; each block is computed again in backward. Dropout has
    no part in it.

    Args:
        q: ``[B, H, L_q, D]``, float32, bfloat16, float16 or float64, on any device.
        k: ``[B, H_kv, L_k, D]``, q's dtype; H_kv divides H.
        fields: any of ``"column_sums"``, ``"row_max"`` and ``"entropy"``.
        top_k: how many of each query's largest probabilities, with their keys; from 1 to L_k.
        rows: queries whose probabilities are returned whole: ints from 0 to before L_q, or an integer
            tensor ``[R]``.
        mask, bias, scale, softcap, sinks, q_start, k_start: as in `fastattn.attention`.

    Returns:
        `AttentionStatistics`. For a row with nothing to attend to every one of them is 0.

    Raises:
        ValueError: nothing asked for, a field, `top_k` or row there is not, or arguments that `attention`
            would not take.
        TypeError: dtypes that `attention` would not take, or rows that are not integers.

    Source: column sums as a measure of which keys matter: Zhang et al., "H2O", NeurIPS 2023 (arXiv
    2306.14048).

    Example:
        >>> import torch, fastattn
        >>> q, k = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8)
        >>> found = attention_statistics(q, k, ["row_max", "column_sums"], mask=fastattn.causal(), rows=[1])
        >>> found.row_max
        tensor([[[1.0000, 0.5000, 0.3333]]])
        >>> found.column_sums
        tensor([[[1.8333, 0.8333, 0.3333]]])
        >>> found.probabilities
        tensor([[[[0.5000, 0.5000, 0.0000]]]])
    """
    mask, bias = as_mask(mask), as_bias(bias)
    check_inputs(q, k, k)
    check_options(q, k, mask, bias, softcap, sinks, 0.0, q_start, k_start)
    q_length, k_length = q.shape[2], k.shape[2]
    fields = (fields,) if isinstance(fields, str) else fields
    chosen = _check(fields, top_k, rows, q_length, k_length, q.device)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    place = {"q_length": q_length, "k_length": k_length, "q_start": q_start, "k_start": k_start}
    inputs = (q, k, bias.dense, sinks, *(part.parameter for part in bias.compact))

    def of_rows(
        wanted: Sequence[str],
        index: Tensor,
        q: Tensor,
        k: Tensor,
        dense: Tensor | None,
        sinks: Tensor | None,
        *parameters: Tensor,
    ) -> list[Tensor]:
        """The `wanted` of the rows at `index`, given theirs of q and of the dense bias."""
        compact = (part.of(x) for part, x in zip(bias.compact, parameters, strict=True))
        with choice.no_autocast(q.device):
            scores = _scores(q, k, scale, softcap)
            documents = mask.documents if bias.compact else None
            added = Bias(dense, tuple(compact)).to_dense(**place, documents=documents, rows=index)  # type: ignore[arg-type]
            scores = scores if added is None else scores + added.to(scores.dtype)
            keep = mask.to_dense(batch=q.shape[0], device=q.device, rows=index, **place)  # type: ignore[arg-type]
            scores = scores if keep is None else scores.masked_fill(~keep, float("-inf"))
            return _statistics(scores, sinks, wanted, top_k)

    wanted = [name for name in _FIELDS if name in fields]
    if top_k is not None:
        wanted += ["top_k_values", "top_k_indices"]
    found: dict[str, Tensor] = {}
    step = max(1, _BLOCK // max(1, q.shape[0] * q.shape[1] * k_length))
    for names, index in ((wanted, torch.arange(q_length, device=q.device)), (["probabilities"], chosen)):
        if names and index is not None:
            added_up = tuple(name == "column_sums" for name in names)
            values = _ByRows.apply(partial(of_rows, names), index.split(step), added_up, *inputs)
            found.update(zip(names, values, strict=True))
    return AttentionStatistics(*(found.get(name) for name in AttentionStatistics._fields))


class _ByRows(torch.autograd.Function):
    """A function of rows of q and of the dense bias, block by block; each is computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[..., list[Tensor]],
        blocks: Sequence[Tensor],
        added_up: Sequence[bool],
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []
        first, total = 0, sum(len(index) for index in blocks)
        for index in blocks:
            parts = compute(index, *_rows_of(inputs, index))
            if not outputs:
                outputs = [
                    part.new_zeros(part.shape if add else (*part.shape[:2], total, *part.shape[3:]))
                    for part, add in zip(parts, added_up, strict=True)
                ]
            for out, part, add in zip(outputs, parts, added_up, strict=True):
                (out if add else out.narrow(2, first, len(index))).add_(part)
            first += len(index)
        ctx.arguments = compute, blocks, added_up
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*(out for out in outputs if not out.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        compute, blocks, added_up = ctx.arguments
        inputs = ctx.saved_tensors
        needed = [i for i, needs in enumerate(ctx.needs_input_grad[3:]) if needs]
        totals = {i: torch.zeros_like(inputs[i], dtype=_wide(inputs[i])) for i in needed}
        first = 0
        for index in blocks:
            leaves = [None if x is None else x.detach() for x in _rows_of(inputs, index)]
            wanted = [x.requires_grad_() for i in needed if (x := leaves[i]) is not None]
            with torch.enable_grad():
                parts = compute(index, *leaves)
            reached = [
                (part, grad if add else grad.narrow(2, first, len(index)))
                for part, grad, add in zip(parts, grads, added_up, strict=True)
                if grad is not None and part.requires_grad
            ]
            if reached:
                of_parts, of_grads = zip(*reached, strict=True)
                found: Sequence[Any] = torch.autograd.grad(of_parts, wanted, of_grads, allow_unused=True)
                for i, x in zip(needed, found, strict=True):
                    if x is None:
                        continue
                    if i not in _OF_ROWS:
                        totals[i] += x
                    elif inputs[i].shape[2] > 1:
                        totals[i].index_add_(2, index, x.to(totals[i].dtype))
                    else:
                        totals[i] += x.sum(2, keepdim=True)
            first += len(index)
        return (
            None,
            None,
            None,
            *(totals[i].to(x.dtype) if i in totals else None for i, x in enumerate(inputs)),
        )


# Which of the inputs have a row for each query: q and, where it is not the same for all, the dense bias.
_OF_ROWS: Final = (0, 2)


def _rows_of(inputs: Sequence[Tensor | None], index: Tensor) -> list[Tensor | None]:
    """Theirs of the inputs that have some; of q one for each even where it is one row."""
    return [
        x if x is None or i not in _OF_ROWS or (i > 0 and x.shape[2] == 1) else x.index_select(2, index)
        for i, x in enumerate(inputs)
    ]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(
    fields: Sequence[str],
    top_k: int | None,
    rows: Sequence[int] | Tensor | None,
    q_length: int,
    k_length: int,
    device: torch.device,
) -> Tensor | None:
    """Raise for what can't be asked for; the rows as a tensor."""
    unknown = [name for name in fields if name not in _FIELDS]
    if unknown:
        raise ValueError(f"fields: expected any of {list(_FIELDS)}, got {unknown}")
    if not fields and top_k is None and rows is None:
        raise ValueError("attention_statistics: expected fields, top_k or rows, got none of them")
    if top_k is not None and not 1 <= top_k <= k_length:
        raise ValueError(f"top_k: expected 1 to {k_length} (L_k), got {top_k}")
    if rows is None:
        return None
    index = torch.as_tensor(rows, device=device)
    if index.numel() and (index.is_floating_point() or index.dtype == torch.bool):
        raise TypeError(f"rows: expected integers, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"rows: expected one dimension, got {list(index.shape)}")
    # On a GPU indexing checks them, without stopping the queue.
    if device.type == "cpu" and any(not 0 <= row < q_length for row in index.tolist()):
        raise ValueError(f"rows: expected 0 to {q_length - 1} (L_q - 1), got {index.tolist()}")
    return index.long()


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``[B, H, R, L_k]`` in float32 or wider."""
    dtype = _wide(q)
    # The queries of a group behind one another: k is not repeated.
    grouped = q.to(dtype).reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    scores = torch.matmul(grouped, k.to(dtype).transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.view(*q.shape[:3], k.shape[2])


def _statistics(
    scores: Tensor, sinks: Tensor | None, wanted: Sequence[str], top_k: int | None
) -> list[Tensor]:
    """The `wanted` of whole rows of scores, in the order of the fields of `AttentionStatistics`."""
    peak = _largest(scores.detach())
    sink = None if sinks is None else sinks.to(scores.dtype)[:, None, None]
    if sink is not None:
        peak = torch.maximum(peak, sink.detach())
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    lse = peak + total.masked_fill(total == 0, 1.0).log()
    probs = weights / total.masked_fill(total == 0, 1.0)

    found: list[Tensor] = []
    for name in wanted:
        if name == "column_sums":
            found.append(probs.sum(2))
        elif name == "row_max":
            found.append(_largest(probs).squeeze(-1))
        elif name == "entropy":
            surprise = (lse - scores).masked_fill(probs == 0, 0.0)
            entropy = (probs * surprise).sum(-1)
            if sink is not None:
                # A sink of -inf has no probability: 0 · inf neither here nor in the gradients.
                surprise = (lse - sink).masked_fill(sink == float("-inf"), 0.0)
                entropy = entropy + (torch.exp(sink - lse) * surprise).squeeze(-1)
            found.append(entropy)
        elif name == "top_k_values":
            assert top_k is not None
            values, indices = probs.topk(top_k, -1)
            found += [values, indices.masked_fill(values == 0, -1)]
        elif name == "probabilities":
            found.append(probs)
    return found


def _largest(x: Tensor) -> Tensor:
    """Of each row, ``[..., 1]``; 0 where there are no columns."""
    return x.amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
