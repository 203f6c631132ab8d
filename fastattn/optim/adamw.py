"""`torch.optim.AdamW` whose step clips the gradients in the same pass over memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fastattn.ops import choice
from fastattn.ops.adamw import adamw_step, total_norm
from fastattn.ops.adamw.api import alike, is_dense

# What copies and pickles keep beside what torch's keep, and what they have where it is not there.
_OWN: Final = {"max_norm": None, "grad_norm": None, "path": "", "_step_supports_amp_scaling": False}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _Group(NamedTuple):
    """The tensors of a parameter group that have a gradient."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    def by_dtype(self) -> Iterator[_Group]:
        dtypes = dict.fromkeys(p.dtype for p in self.params)
        for dtype in dtypes:
            own = [i for i, p in enumerate(self.params) if p.dtype == dtype]
            yield _Group(*([tensors[i] for i in own] for tensors in self))


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with clipping by the global norm: state, schedulers and results are torch's.

    `step` reads the gradients once for their norm, and clips them as it updates;
    `torch.nn.utils.clip_grad_norm_` reads and writes them once more. Here they stay as they are. What our
    kernels do not do (amsgrad, complex or float64 parameters, several devices, differentiable or capturable
    steps, a learning rate on a GPU) torch's own optimizer does behind `clip_grad_norm_`, and `path` says so.

    A norm that is infinite or NaN is not an error, and `grad_norm` tells of it. On CPU with `max_norm` such a
    step is skipped: parameters and state stay. On a GPU, where skipping would have to wait for the norm,
    parameters become NaN, as behind `clip_grad_norm_`; a `torch.amp.GradScaler` skips the step there too.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused:
            as in `torch.optim.AdamW`; foreach and fused matter where torch's own path is taken.
        max_norm: gradients whose norm over all parameters is above it are scaled down to it; None: none are.

    Attributes:
        grad_norm: of the last step, before clipping: a float32 scalar; None without `max_norm`.
        path: what ran the last step: ``"cpu"``, ``"triton"``, or ``"torch: "`` and why.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019 (arXiv 1711.05101); Pascanu et
    al., "On the difficulty of training recurrent neural networks", 2013 (arXiv 1211.5063).

    Example:
        >>> import torch, fastattn
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = fastattn.optim.AdamW(model.parameters(), lr=1e-3, max_norm=1.0)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm
        tensor(2.8284)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_norm: float | None = None,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm: expected a number above 0 or None, got {max_norm}")
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        # A GradScaler then unscales the gradients itself, and skips a step that is not finite.
        self._step_supports_amp_scaling = False
        self.max_norm = max_norm
        self.grad_norm: Tensor | None = None
        self.path = ""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in _OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, default in _OWN.items():
            self.__dict__.setdefault(name, default)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the loss that `closure` returns, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.grad_norm = None
        if not params:
            return loss
        reason = self._reason(params)
        if reason:
            self.path = f"torch: {reason}"
            self._step_by_torch(params)
        else:
            self.path = "cpu" if params[0].device.type == "cpu" else "triton"
            self._step_by_kernels([p.grad for p in params])
        return loss

    def _reason(self, params: list[Tensor]) -> str:
        """Why our kernels do not do this step; empty where they do."""
        for group in self.param_groups:
            for option in ("amsgrad", "differentiable", "capturable"):
                if group[option]:
                    return f"{option}=True"
            if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu":
                return f"a learning rate on {group['lr'].device}"
            if group["fused"] and params[0].device.type != "cpu":
                return f"fused=True on {params[0].device}"
        for p in params:
            if p.device != params[0].device:
                return f"parameters on {params[0].device} and {p.device}"
            if p.dtype not in _DTYPES or p.grad is None or p.grad.dtype != p.dtype:
                return f"a parameter of {p.dtype}"
            if type(p.data) is not Tensor or p.grad.layout != torch.strided or not is_dense(p):
                return "a parameter or gradient that is not one dense tensor"
            for name in ("exp_avg", "exp_avg_sq"):
                x = self.state.get(p, {}).get(name)
                if x is not None and (x.dtype != p.dtype or x.device != p.device or not alike(x, p)):
                    return f"{name} of another dtype, device or strides than its parameter"
        found = choice.explanation(params[0], None)
        return "" if found.backend in ("cpu", "triton") else f"no kernels here ({found.reasons['cpu'][0]})"

    def _is_skipped(self) -> bool:
        """Whether the norm is known to be none that a step may be made with."""
        norm = self.grad_norm
        return norm is not None and norm.device.type == "cpu" and not math.isfinite(norm)

    def _step_by_torch(self, params: list[Tensor]) -> None:
        if self.max_norm is not None:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(params, self.max_norm)
            if self._is_skipped():
                return
        step: Any = torch.optim.AdamW.step
        # With the wrapper of an optimizer of torch's own class, hooks would run twice.
        getattr(step, "__wrapped__", step)(self) if getattr(step, "hooked", False) else step(self)

    def _step_by_kernels(self, grads: list[Any]) -> None:
        factor: float | Tensor = 1.0
        if self.max_norm is not None:
            dense = [g if is_dense(g) else g.contiguous() for g in grads]
            self.grad_norm = total_norm(dense)
            if self._is_skipped():
                return
            clipped = (self.max_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
            factor = float(clipped) if clipped.device.type == "cpu" else clipped
        for group in self.param_groups:
            tensors = _Group([], [], [], [], [])
            self._init_group(group, *tensors[:4], [], tensors.steps)
            if not tensors.params:
                continue
            torch._foreach_add_(tensors.steps, 1)
            # float64 where that is the default dtype; it counts to 2^24 in either.
            tensors = tensors._replace(steps=[t.float() for t in tensors.steps])
            for own in tensors.by_dtype():
                adamw_step(
                    *own,
                    lr=float(group["lr"]),
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    factor=-factor if group["maximize"] else factor,
                )
