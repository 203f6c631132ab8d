"""`layer_norm`, `rms_norm` and both behind dropout and a residual: checks what they get. Speaks to people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from fastattn.ops import choice
from fastattn.ops.layer_norm import library, reference

# A program of the triton backend holds a row in registers.
_MOST_COLUMNS: Final = 65536
# Elements: for fewer, calling an operation that is written in Python takes longer than there is to be won.
# torch has a kernel for a layer norm, and as good as none for an RMS norm.
_FEW: Final = {"layer_norm": 1 << 20, "rms_norm": 1 << 17}


def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Layer norm over the last dimensions, as `torch.nn.functional.layer_norm`: mean and variance in float32.

    Args:
        x: ``[..., *normalized_shape]``; float32, bfloat16, float16, or float64 for the reference.
        normalized_shape: the last dimensions, which are normalised together; an int for one.
        weight: `normalized_shape`, of x's dtype or float32; ones if None.
        bias: likewise; zeros if None.
        eps: added to the variance.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"`` (torch's own); the best that can if None.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: not tensors.
        ValueError: shapes, dtypes or devices that do not fit; what was expected and given.
        NotImplementedError: the backend asked for can't run this.

    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016 (arXiv 1607.06450).

    Example:
        >>> import torch, fastattn
        >>> fastattn.layer_norm(torch.tensor([[1.0, 3.0], [2.0, 10.0]]), 2).round(decimals=3)
        tensor([[-1.,  1.],
                [-1.,  1.]])
    """
    choice.check_tensors(x=x, weight=weight, bias=bias)
    return _Norm(x, _shape(normalized_shape), weight, bias, eps).alone(backend)


def rms_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimensions, as `torch.nn.functional.rms_norm`.

    Args:
        x: ``[..., *normalized_shape]``; float32, bfloat16, float16, or float64 for the reference.
        normalized_shape: the last dimensions, which are normalised together; an int for one.
        weight: `normalized_shape`, of x's dtype or float32; ones if None.
        eps: added to the mean square; float32's machine epsilon if None (float64's for float64).
        weight_offset: added to the weight: 1 for Gemma, whose weights are around 0.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"`` (torch's own); the best that can if None.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: not tensors.
        ValueError: shapes, dtypes or devices that do not fit; what was expected and given.
        NotImplementedError: the backend asked for can't run this.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv 1910.07467).

    Example:
        >>> import torch, fastattn
        >>> fastattn.rms_norm(torch.tensor([3.0, 3.0, -3.0]), 3)
        tensor([ 1.,  1., -1.])
    """
    choice.check_tensors(x=x, weight=weight)
    norm = _Norm(x, _shape(normalized_shape), weight, None, eps, rms=True, weight_offset=weight_offset)
    return norm.alone(backend)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    dropout: float = 0.0,
    eps: float = 1e-5,
    seed: int | Tensor | None = None,
    prenorm: bool = False,
    residual_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Any:
    """``layer_norm(z)`` of ``z = residual + dropout(x)``, in one pass over memory forward and one backward.

    What dropout leaves is a function of the seed, the row (counted over x's leading dimensions) and the
    column: it is computed again for the gradient instead of kept, and is the same on every backend.

    Args:
        x: ``[..., *weight.shape]``; float32, bfloat16, float16, or float64 for the reference.
        residual: x's shape, any floating dtype; None for zeros, as in a model's first layer.
        weight: of the last dimensions, of x's dtype or float32; None for the last dimension and ones.
        bias: weight's shape, of x's dtype or float32; zeros if None.
        dropout: probability in [0, 1) with which an element of x is dropped, taken in 65,536ths. Pass 0 in
            evaluation.
        eps: added to the variance.
        seed: an int in [0, 2^63) or an int64 tensor ``[1]``; drawn from torch's generator if None.
        prenorm: return z too, the residual of the next layer: x itself, and no copy, where there is neither a
            residual nor dropout.
        residual_dtype: of z: x's dtype or float32; the wider of x's and the residual's if None.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; the best that can if None.

    Returns:
        out, in x's shape and dtype; ``(out, z)`` with `prenorm`. Gradients flow through both.

    Raises:
        TypeError: not tensors, or a seed that is none.
        ValueError: shapes, dtypes, devices or options that do not fit; what was expected and given.
        NotImplementedError: the backend asked for can't run this.

    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016 (arXiv 1607.06450).

    Example:
        >>> import torch, fastattn
        >>> x, residual = torch.randn(4, 8, 16), torch.randn(4, 8, 16)
        >>> out, residual = fastattn.dropout_add_layer_norm(
        ...     x, residual, torch.ones(16), torch.zeros(16), dropout=0.1, prenorm=True
        ... )
        >>> bool(torch.isclose(out.mean(), torch.tensor(0.0), atol=1e-5))
        True
    """
    choice.check_tensors(x=x, residual=residual, weight=weight, bias=bias)
    norm = _Norm(x, _shape_of(x, weight), weight, bias, eps)
    return norm.behind(residual, dropout, seed, prenorm, residual_dtype, backend)


def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *,
    dropout: float = 0.0,
    eps: float | None = None,
    weight_offset: float = 0.0,
    seed: int | Tensor | None = None,
    prenorm: bool = False,
    residual_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Any:
    """``rms_norm(z)`` of ``z = residual + dropout(x)``, in one pass over memory forward and one backward.

    Args:
        x, residual, weight, dropout, seed, prenorm, residual_dtype, backend: as in `dropout_add_layer_norm`.
        eps, weight_offset: as in `rms_norm`.

    Returns:
        out, in x's shape and dtype; ``(out, z)`` with `prenorm`. Gradients flow through both.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `dropout_add_layer_norm`.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019 (arXiv 1910.07467).

    Example:
        >>> import torch, fastattn
        >>> x, residual = torch.randn(4, 8, 16), torch.randn(4, 8, 16)
        >>> out, z = fastattn.dropout_add_rms_norm(x, residual, torch.ones(16), prenorm=True)
        >>> torch.equal(z, residual + x)
        True
    """
    choice.check_tensors(x=x, residual=residual, weight=weight)
    norm = _Norm(x, _shape_of(x, weight), weight, None, eps, rms=True, weight_offset=weight_offset)
    return norm.behind(residual, dropout, seed, prenorm, residual_dtype, backend)


def _shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(normalized_shape, (int, torch.SymInt)):
        return (normalized_shape,)
    return tuple(normalized_shape)


def _shape_of(x: Tensor, weight: Tensor | None) -> tuple[int, ...]:
    return tuple(x.shape[-1:] if weight is None else weight.shape)


class _Norm:
    """One call: what the four functions share."""

    def __init__(
        self,
        x: Tensor,
        shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        rms: bool = False,
        weight_offset: float = 0.0,
    ) -> None:
        if not x.is_floating_point():
            raise ValueError(f"x: expected float32, bfloat16, float16 or float64, got {x.dtype}")
        if not shape or len(shape) > x.dim() or tuple(x.shape[-len(shape) :]) != shape:
            expected = ", ".join(["...", *map(str, shape)]) if shape else "..., at least one dimension"
            raise ValueError(f"x: expected [{expected}] to be normalised, got {list(x.shape)}")
        for name, one in (("weight", weight), ("bias", bias)):
            if one is None:
                continue
            if tuple(one.shape) != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(one.shape)}")
            allowed = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
            if one.dtype not in allowed or one.device != x.device:
                raise ValueError(
                    f"{name}: expected {' or '.join(str(d) for d in dict.fromkeys(allowed))} on {x.device}, "
                    f"got {one.dtype} on {one.device}"
                )
        self.x, self.columns, self.rms, self.weight_offset = x, math.prod(shape), rms, weight_offset
        self.weight = None if weight is None else weight.reshape(self.columns)
        self.bias = None if bias is None else bias.reshape(self.columns)
        wide = torch.promote_types(torch.float32, x.dtype)
        self.eps = torch.finfo(wide).eps if eps is None else eps

    def choose(self, backend: str | None, *, alone: bool) -> str:
        against = []
        if self.columns > _MOST_COLUMNS:
            reason = (
                f"expected at most {_MOST_COLUMNS} elements to be normalised together, got {self.columns}"
            )
            against.append(choice.Against("triton", reason))
        few = _FEW["rms_norm" if self.rms else "layer_norm"]
        # torch's own, in 16 bits, sums the gradients of float32 parameters in 16 bits too.
        alike = all(one is None or one.dtype == self.x.dtype for one in (self.weight, self.bias))
        # Not while compiling: a graph would be for one side of the limit.
        compiling = torch.compiler.is_compiling()
        if alone and alike and self.x.is_cpu and not compiling and self.x.numel() < few:
            reason = f"torch's own is as fast for fewer than {few} elements, unless this is asked for"
            against.append(choice.Against("cpu", reason, for_all=False))
        return choice.choose(self.x, backend, against)

    def rows(self, x: Tensor) -> Tensor:
        # The rows are counted, not inferred: nothing can be inferred where there are no columns.
        return x.reshape(x.numel() // self.columns if self.columns else 0, self.columns)

    def alone(self, backend: str | None) -> Tensor:
        chosen = self.choose(backend, alone=True)
        out, _ = self._run(self.rows(self.x), None, None, 0.0, self.x.dtype, chosen)
        return out.reshape(self.x.shape)

    def behind(
        self,
        residual: Tensor | None,
        dropout: float,
        seed: int | Tensor | None,
        prenorm: bool,
        residual_dtype: torch.dtype | None,
        backend: str | None,
    ) -> Any:
        x = self.x
        choice.check_dropout(dropout)
        if residual is not None and (
            residual.shape != x.shape or residual.device != x.device or not residual.is_floating_point()
        ):
            raise ValueError(
                f"residual: expected {list(x.shape)} of a floating dtype on {x.device}, as x, "
                f"got {list(residual.shape)} of {residual.dtype} on {residual.device}"
            )
        dtype = residual_dtype or (
            x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        )
        if dtype not in (x.dtype, torch.promote_types(torch.float32, x.dtype)):
            name = "residual" if residual_dtype is None else "residual_dtype"
            raise ValueError(f"{name}: expected {x.dtype} or torch.float32 with x {x.dtype}, got {dtype}")
        chosen = self.choose(backend, alone=False)
        seed = choice.as_seed(seed, dropout, x.device)
        rows = None if residual is None else self.rows(residual.to(dtype))
        out, z = self._run(self.rows(x), rows, seed, dropout, dtype, chosen)
        out = out.reshape(x.shape)
        return (out, z.reshape(x.shape)) if prenorm else out

    def _run(
        self,
        x: Tensor,
        residual: Tensor | None,
        seed: Tensor | None,
        dropout: float,
        sum_dtype: torch.dtype,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        norm = (self.weight, self.bias)
        if backend == "reference":
            with choice.no_autocast(x.device):
                z = reference.add(x, residual, seed, dropout, sum_dtype)
                return reference.norm(z, *norm, self.eps, self.weight_offset, self.rms, x.dtype), z
        out, z, _, _ = library.layer_norm(
            x, residual, *norm, seed, dropout, self.eps, self.weight_offset, self.rms, sum_dtype, backend
        )
        return out, x if z.dim() == 1 else z
