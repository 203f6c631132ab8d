"""Cross entropy as torch ops: schema, fake, gradient. Speaks to torch, computes nothing.

Every loss here is one of rows; what is made of them (their mean, their sum) is known here only as the `share`
that each row has in it, so that a forward pass can make the gradients while it has the logits.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fastattn.ops import flops
from fastattn.ops.once import tracked

# A softcap of 0 is none.
_OPTIONS = "int ignore_index, float label_smoothing, float softcap, float z_loss"
torch.library.define(
    "fastattn::cross_entropy_forward",
    f"(Tensor logits, Tensor target, Tensor? weight, {_OPTIONS}, str backend) -> (Tensor loss, Tensor lse)",
)
torch.library.define(
    "fastattn::cross_entropy_backward",
    "(Tensor dloss, Tensor lse, Tensor logits, Tensor target, Tensor? weight, "
    f"{_OPTIONS}, str backend) -> Tensor",
)
# The loss of each row, and for its gradient `dloss` those gradients that the bits of `wanted` name; others
# empty.
torch.library.define(
    "fastattn::linear_cross_entropy",
    f"(Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? dloss, {_OPTIONS}, int wanted, "
    "str backend) -> (Tensor loss, Tensor dx, Tensor dweight, Tensor dbias)",
)
torch.library.define(
    "fastattn::linear_kl_div",
    "(Tensor student_x, Tensor student_weight, Tensor teacher_x, Tensor teacher_weight, Tensor? dloss, "
    "float temperature, int wanted, str backend) -> (Tensor loss, Tensor dx, Tensor dweight)",
)
WANTED_X: Final = 1
WANTED_WEIGHT: Final = 2
WANTED_BIAS: Final = 4

_OPS: Final = ("cross_entropy_forward", "cross_entropy_backward", "linear_cross_entropy", "linear_kl_div")
_NO_SECOND: Final = "fastattn.{} has no second derivative on this backend; backend='reference' has every one"


def _implement(name: str, function: str) -> None:
    def run(*args: Any) -> Any:
        kernels = importlib.import_module(f"fastattn.ops.cross_entropy.{args[-1]}")
        return getattr(kernels, function)(*args[:-1])

    torch.library.impl(f"fastattn::{name}", ("cpu", "cuda"))(run)


def _map(name: str) -> None:
    """vmap calls the op for each sample in turn: products with a weight of each sample do not join."""

    def run(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        op = getattr(torch.ops.fastattn, name)
        samples = [
            op(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(map(torch.stack, zip(*samples, strict=True))), (0,) * len(samples[0])

    torch.library.register_vmap(f"fastattn::{name}", run)


for _name in _OPS:
    _implement(_name, _name.removeprefix("cross_entropy_"))
    _map(_name)


@torch.library.register_fake("fastattn::cross_entropy_forward")
def _fake_forward(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    rows = (logits.shape[0],)
    return logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("fastattn::cross_entropy_backward")
def _fake_backward(dloss: Tensor, lse: Tensor, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("fastattn::linear_cross_entropy")
def _fake_linear(x: Tensor, weight: Tensor, target: Tensor, *args: Any) -> tuple[Tensor, ...]:
    wanted = args[-2]
    return (
        x.new_empty((x.shape[0],), dtype=torch.float32),
        x.new_empty(x.shape if wanted & WANTED_X else (0,)),
        weight.new_empty(weight.shape if wanted & WANTED_WEIGHT else (0,)),
        weight.new_empty((weight.shape[0] if wanted & WANTED_BIAS else 0,)),
    )


@torch.library.register_fake("fastattn::linear_kl_div")
def _fake_kl_div(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, ...]:
    wanted = args[-2]
    return (
        x.new_empty((x.shape[0],), dtype=torch.float32),
        x.new_empty(x.shape if wanted & WANTED_X else (0,)),
        weight.new_empty(weight.shape if wanted & WANTED_WEIGHT else (0,)),
    )


class CrossEntropy(torch.autograd.Function):
    """Gradient of `fastattn::cross_entropy_forward`: the logits are kept, and read once more for theirs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.fastattn.cross_entropy_forward(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, target, weight, *ctx.options = inputs
        ctx.save_for_backward(output[1], logits, target, weight)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        dlogits = _once("cross_entropy_backward", dloss, *ctx.saved_tensors, *ctx.options)
        return dlogits, None, None, *(None for _ in ctx.options)


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> Tensor:
    """The loss of each row, differentiable by the logits, which are ``[N, V]``."""
    run = CrossEntropy.apply if tracked(logits) else torch.ops.fastattn.cross_entropy_forward
    loss: Tensor = run(logits, target, weight, *options)[0]
    return loss


class LinearLoss(torch.autograd.Function):
    """Gradient of an op that makes a linear layer's gradients along with the loss of its output's rows.

    Where the rows have a `share` in the one loss, the gradients are made in forward, for a loss whose own
    gradient is 1: backward multiplies. Where each row's loss is returned, backward runs the op again; in
    float16 too, where a loss is scaled up lest its gradients vanish, and only backward knows by how much.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        op: str, share: Tensor | None, wanted: int, options: tuple[Any, ...], *tensors: Tensor | None
    ) -> Any:
        *rest, backend = options
        run = getattr(torch.ops.fastattn, op)
        loss, *grads = run(*tensors, share if wanted else None, *rest, wanted, backend)
        if share is not None:  # what a row without a share holds is of no account, NaN included
            loss = torch.where(share == 0, 0.0, loss * share).sum()
        return (loss, *grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.op, share, ctx.wanted, ctx.options, *tensors = inputs
        ctx.count = len(tensors)
        ctx.save_for_backward(share, *tensors, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, *of_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Gradients made in forward are outputs: a second derivative comes here by them.
        if not torch.compiler.is_compiling() and any(g is not None for g in of_grads):
            raise RuntimeError(_NO_SECOND.format(ctx.op))
        grads: list[Tensor | None] = [None] * (4 + ctx.count)
        if dloss is None:
            return tuple(grads)
        saved = ctx.saved_tensors  # once: checkpointing forbids to ask twice
        share, *tensors = saved[: 1 + ctx.count]
        wanted = _wanted(ctx.needs_input_grad[4:])
        if share is not None and wanted & ~ctx.wanted == 0:
            found = _scaled(saved[1 + ctx.count :], dloss)
        else:  # what vmap maps over does not say in forward that it needs a gradient
            *rest, backend = ctx.options
            of_rows = dloss if share is None else dloss * share
            found = _once(ctx.op, *tensors, of_rows, *rest, wanted, backend)[1:]
        for (i, bit), grad in zip(_BITS.items(), found, strict=False):
            grads[4 + i] = grad if wanted & bit else None
        return tuple(grads)


# The bits of `wanted`, by the place of the tensor that the gradient is of.
_BITS: Final = {0: WANTED_X, 1: WANTED_WEIGHT, 3: WANTED_BIAS}


def _wanted(needed: Sequence[bool]) -> int:
    return sum(bit for i, bit in _BITS.items() if i < len(needed) and needed[i])


def linear_loss(op: str, share: Tensor | None, options: tuple[Any, ...], *tensors: Tensor | None) -> Tensor:
    """The rows' losses, each times its share and summed, or as they are where `share` is None.

    Args:
        op: behind ``fastattn::``.
        share: float32 ``[N]``.
        options: of the op, between `dloss` and `wanted`; the backend last.
        tensors: the op's first arguments.
    """
    if not tracked(*tensors):
        return LinearLoss.forward(op, share, 0, options, *tensors)[0]  # type: ignore[no-any-return]
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors]
    early = share is not None and tensors[0].dtype != torch.float16  # type: ignore[union-attr]
    wanted = _wanted(needed) if early else 0
    loss: Tensor = LinearLoss.apply(op, share, wanted, options, *tensors)[0]
    return loss


def _scaled(grads: Sequence[Tensor], dloss: Tensor) -> Sequence[Tensor]:
    """The gradients times that of the loss; in place where nobody else will ask for them."""
    alone = not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_legacy_batchedtensor(dloss)  # is_grads_batched
    )
    if not alone or torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph():
        return [x * dloss for x in grads]
    if type(dloss) is Tensor and dloss.device.type == "cpu" and float(dloss) == 1:
        return [x.detach() for x in grads]
    return [x.detach().mul_(dloss) for x in grads]


class _Once(torch.autograd.Function):
    """An op that has no derivative: taking one raises, where it would be 0 unnoticed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, *args: Any) -> Any:
        return getattr(torch.ops.fastattn, op)(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_NO_SECOND.format(ctx.op.removesuffix("_backward")))


def _once(op: str, *args: Any) -> Any:
    """The op's results, which refuse to be differentiated; compiled graphs do so by themselves."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.fastattn, op)(*args)
    return _Once.apply(op, *args)


def _products(wanted: int) -> int:
    return 1 + bool(wanted & WANTED_X) + bool(wanted & WANTED_WEIGHT)


def _linear_flops(
    x: Any, weight: Any, target: Any, bias: Any, dloss: Any, *args: Any, out_shape: Any = None, **_: Any
) -> int:
    return int(2 * x[0] * x[1] * weight[0] * _products(args[-2]))


def _kl_div_flops(
    x: Any, weight: Any, teacher_x: Any, teacher_weight: Any, *args: Any, out_shape: Any = None, **_: Any
) -> int:
    return int(2 * x[0] * weight[0] * (x[1] * _products(args[-2]) + teacher_x[1]))


flops.register({"linear_cross_entropy": _linear_flops, "linear_kl_div": _kl_div_flops})
