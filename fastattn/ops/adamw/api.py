"""AdamW over lists of tensors: checks what it is given, chooses a backend, and calls it. Speaks to people."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.ops import choice
from fastattn.ops.adamw import reference


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    factor: float | Tensor = 1.0,
    backend: str | None = None,
) -> None:
    """One step of AdamW, in place: ``p ← (1 - lr λ) p - lr m̂ / (√v̂ + eps)``; gradients are only read.

    Args:
        params: of one device and dtype (float32, bfloat16, float16; float64 for the reference).
        grads: of the parameters' shapes and dtype, any strides.
        exp_avgs: first moments m, of their shapes, strides and dtype.
        exp_avg_sqs: second moments v, likewise.
        steps: float32 scalars on CPU: which step this is of each, 1 for the first.
        lr: learning rate.
        betas: decay of m and of v.
        eps: added to the root.
        weight_decay: λ.
        factor: of every gradient: a float, or a float32 scalar where the gradients are. Clipping's.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; the best that can if None.

    Raises:
        ValueError: lists or tensors that do not fit; what was expected and given.
        NotImplementedError: the backend asked for can't run this.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019 (arXiv 1711.05101).

    Example:
        >>> import torch
        >>> p, m, v = torch.ones(3), torch.zeros(3), torch.zeros(3)
        >>> adamw_step([p], [p * 2], [m], [v], [torch.tensor(1.0)], lr=0.1, betas=(0.9, 0.999), eps=1e-8,
        ...            weight_decay=0.0)
        >>> p
        tensor([0.9000, 0.9000, 0.9000])
    """
    if not params:
        return
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _check(lists, steps)
    chosen = choice.choose(params[0], backend, _against(params))
    if chosen != "reference":
        # Of one order in memory: the kernels see elements, and no dimensions.
        grads = [
            g if alike(g, p) else torch.empty_like(p).copy_(g) for g, p in zip(grads, params, strict=True)
        ]
    step = _kernels(chosen).step
    step(params, grads, exp_avgs, exp_avg_sqs, steps, lr, betas, eps, weight_decay, factor)
    if chosen != "reference":
        # A graph that has saved a parameter refuses its backward now, as after a step of torch's.
        written = [x for xs in (params, exp_avgs, exp_avg_sqs) for x in xs if not x.is_inference()]
        torch.autograd.graph.increment_version(written)


def total_norm(tensors: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """The 2-norm of all elements of tensors of one device, the same whatever the threads.

    Args:
        tensors: of float32, bfloat16 or float16, of float64 for the reference; at least one.
        backend: as in `adamw_step`.

    Returns:
        float32 scalar; sums of runs of 32,768 elements are added up in float64 on CPU.

    Example:
        >>> import torch
        >>> total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    if not tensors:
        raise ValueError("tensors: expected one or more, got none")
    chosen = choice.choose(tensors[0], backend, _against(tensors))
    norm: Tensor = _kernels(chosen).total_norm(tensors)
    return norm


def _kernels(backend: str) -> Any:
    return reference if backend == "reference" else importlib.import_module(f"fastattn.ops.adamw.{backend}")


def _against(tensors: Sequence[Tensor]) -> tuple[choice.Against, ...]:
    if not all(is_dense(x) for x in tensors):
        reason = "expected parameters without holes in memory"
        return tuple(choice.Against(name, reason) for name in ("cpu", "triton"))
    return ()


def is_dense(x: Tensor) -> bool:
    """Whether its elements lie side by side, each once."""
    if x.is_contiguous():
        return True
    # Its dimensions in the order of their strides: is that contiguous?
    order = sorted(range(x.dim()), key=lambda i: (x.stride(i), x.shape[i] > 1), reverse=True)
    return x.permute(order).is_contiguous()


def alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in one order in memory."""
    return x.stride() == y.stride() or (x.is_contiguous() and y.is_contiguous())


def _check(lists: dict[str, Sequence[Tensor]], steps: Sequence[Tensor]) -> None:
    params = lists["params"]
    for name, tensors in (lists | {"steps": steps}).items():
        if len(tensors) != len(params):
            raise ValueError(f"{name}: expected {len(params)} tensors, as params, got {len(tensors)}")
    for name, tensors in lists.items():
        for x, p in zip(tensors, params, strict=True):
            if x.shape != p.shape or x.dtype != params[0].dtype or x.device != params[0].device:
                raise ValueError(
                    f"{name}: expected {list(p.shape)} of {params[0].dtype} on {params[0].device}, "
                    f"got {list(x.shape)} of {x.dtype} on {x.device}"
                )
            if name in ("exp_avgs", "exp_avg_sqs") and not alike(x, p):
                raise ValueError(f"{name}: expected strides {p.stride()}, as params, got {x.stride()}")
