"""The error budget of any operation: ours against plain PyTorch in the same dtype, both against float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.testing.budget import Errors, distance, size


def operation_errors(
    ours: Callable[..., Any], plain: Callable[..., Any], inputs: Mapping[str, Tensor | None]
) -> list[Errors]:
    """Errors of an operation, of each output and of the gradient of each input.

    Args:
        ours: called as ``ours(**inputs)``; gives a tensor or a sequence of them.
        plain: the same in plain PyTorch, for any dtype.
        inputs: by name; floating ones have gradients, with `plain` in float64 for the exact results.

    Returns:
        An `Errors` for ``out`` (``out1``, … for further outputs) and for ``d`` and the name of each input.
    """
    names = [name for name, x in inputs.items() if x is not None and x.is_floating_point()]

    def results(function: Callable[..., Any], double: bool) -> list[Tensor]:
        leaves = {
            name: x
            if x is None or not x.is_floating_point()
            else x.detach().to(torch.float64 if double else x.dtype).requires_grad_()
            for name, x in inputs.items()
        }
        found = function(**leaves)
        outs: Sequence[Tensor] = [found] if isinstance(found, Tensor) else list(found)
        loss = torch.zeros((), dtype=torch.float64, device=outs[0].device)
        for i, out in enumerate(outs):
            generator = torch.Generator(out.device).manual_seed(i)
            # The same numbers reach every dtype: rounded to the one under test.
            dtype = next(x.dtype for name in names if (x := inputs[name]) is not None)
            reaching = torch.randn(out.shape, generator=generator, device=out.device).to(dtype)
            loss = loss + (out.double() * reaching.double()).sum()
        loss.backward()
        grads = []
        for name in names:
            leaf = leaves[name]
            assert leaf is not None
            grads.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        return [*(out.detach() for out in outs), *grads]

    mine, theirs, exact = results(ours, False), results(plain, False), results(plain, True)
    count = len(exact) - len(names)
    labels = [f"out{i or ''}" for i in range(count)] + ["d" + name for name in names]
    return [
        Errors(label, distance(a, c), distance(b, c), size(c), a.dtype, 0.0)
        for label, a, b, c in zip(labels, mine, theirs, exact, strict=True)
    ]
