"""One call of each operation, small or of a size worth timing, by nothing but the public interface.

So that any version of the package can run them: `bench.baseline` counts what they do, `bench.against` times
two versions. An operation that a version has not is not among its calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastattn


@dataclass
class Call:
    """An operation and its inputs.

    Attributes:
        function: of `leaves`.
        leaves: what gradients are of.
        trains: whether there are any; else `both` runs forward alone.
    """

    function: Callable[..., Tensor]
    leaves: list[Tensor]
    trains: bool = True
    _dout: Tensor | None = None
    _dtype: torch.dtype | None = None  # that what reaches the results is rounded to

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.function(*self.leaves)

    def both(self) -> list[Tensor]:
        out = self.function(*self.leaves)
        if not self.trains:
            return [out]
        if self._dout is None:
            draws = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
            rounded = draws.to(self._dtype or out.dtype).to(out.dtype)
            self._dout = rounded if out.dim() else torch.ones_like(out)
        return list(torch.autograd.grad(out, self.leaves, self._dout))

    def exact(self) -> Call:
        """The same in float64; of a call that has not run yet."""
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in self.leaves]
        return Call(self.function, wide, self.trains, _dtype=self.leaves[0].dtype)


def _normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_(grad) for shape in shapes]


def _qkv(size: int, heads: int = 4, kv_heads: int = 4, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = [(1, h, size, 64) for h in (heads, kv_heads, kv_heads)]
    return _normal(*shapes, dtype=dtype)


def attention(size: int, **options: Any) -> Call:
    """Attention of four heads of 64 with some of its options."""
    return Call(lambda q, k, v: fastattn.attention(q, k, v, **options), _qkv(size))


def _grouped(size: int, dtype: torch.dtype = torch.bfloat16) -> Call:
    window = fastattn.sliding_window(size // 4, 0)
    return Call(lambda q, k, v: fastattn.attention(q, k, v, mask=window), _qkv(size, 4, 2, dtype))


def _bias(size: int) -> Call:
    (bias,) = _normal((1, 4, size, size))

    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return fastattn.attention(q, k, v, mask=fastattn.causal(), bias=bias)

    return Call(biased, [*_qkv(size), bias])


def _decode(size: int) -> Call:
    cache = fastattn.KVCache(
        *_normal((4, 2, 8 * size, 64), (4, 2, 8 * size, 64), grad=False),
        lengths=torch.full((4,), 8 * size - 1, dtype=torch.int32),
    )
    q, k, v = _normal((4, 4, 1, 64), (4, 2, 1, 64), (4, 2, 1, 64), grad=False)
    return Call(lambda q, k, v: fastattn.attention_with_kv_cache(q, cache, k, v), [q, k, v], trains=False)


def _rotary(size: int) -> Call:
    angle = torch.arange(float(size))[:, None] * 1e4 ** -torch.linspace(0, 1, 32)
    cos, sin = angle.cos(), angle.sin()
    return Call(lambda x: fastattn.rotary(x, cos, sin), _normal((1, 4, size, 64)))


def _linear(size: int) -> Call:
    return Call(fastattn.linear, _normal((size, 192), (256, 192), (256,)))


def _mlp(size: int) -> Call:
    shapes = ((size, 128), (512, 128), (512,), (128, 512), (128,))
    return Call(lambda x, w1, b1, w2, b2: fastattn.mlp(x, w1, b1, w2, b2, "gelu_tanh"), _normal(*shapes))


def _target(size: int, classes: int) -> Tensor:
    return torch.randint(classes, (size,), generator=torch.Generator().manual_seed(1))


def _cross_entropy(size: int) -> Call:
    target = _target(size, 2003)
    return Call(lambda x: fastattn.cross_entropy(x, target), _normal((size, 2003)))


def _linear_cross_entropy(size: int) -> Call:
    target = _target(size, 2003)
    return Call(lambda x, w: fastattn.linear_cross_entropy(x, w, target), _normal((size, 64), (2003, 64)))


def _layer_norm(size: int) -> Call:
    shapes = ((size, 768), (768,), (768,))
    return Call(lambda x, w, b: fastattn.layer_norm(x, 768, w, b), _normal(*shapes))


def _rms_norm(size: int) -> Call:
    return Call(lambda x, w: fastattn.rms_norm(x, 768, w), _normal((size, 768), (768,)))


def _embedding(size: int) -> Call:
    ids = _target(size, 1009)
    return Call(lambda w, p: fastattn.embedding(ids, w, p), _normal((1009, 128), (size, 128)))


def _adamw(size: int) -> Call:
    weight, grad = _normal((size, 768), (size, 768), grad=False)
    optimizers: dict[torch.dtype, torch.optim.Optimizer] = {}

    def step(weight: Tensor, grad: Tensor) -> Tensor:
        if weight.dtype not in optimizers:
            optimizers[weight.dtype] = fastattn.optim.AdamW([weight], lr=1e-2, max_norm=1.0)
        weight.grad = grad
        optimizers[weight.dtype].step()
        return weight

    return Call(step, [weight, grad], trains=False)


# By name, whose first word is the operation: the public function it needs, and the call of a size.
CALLS: dict[str, tuple[str, Callable[[int], Call]]] = {
    "attention causal": ("attention", lambda n: attention(n, mask=fastattn.causal())),
    "attention full": ("attention", attention),
    "attention dropout": ("attention", lambda n: attention(n, mask=fastattn.causal(), dropout=0.1, seed=7)),
    "attention window grouped bfloat16": ("attention", _grouped),
    "attention bias": ("attention", _bias),
    "attention alibi": (
        "attention",
        lambda n: attention(
            n, mask=fastattn.causal(), bias=fastattn.alibi(torch.tensor([0.5, 0.25, 0.1, 0.05]))
        ),
    ),
    "decode grouped": ("attention_with_kv_cache", _decode),
    "rotary": ("rotary", _rotary),
    "linear": ("linear", _linear),
    "mlp gelu": ("mlp", _mlp),
    "cross_entropy": ("cross_entropy", _cross_entropy),
    "linear_cross_entropy": ("linear_cross_entropy", _linear_cross_entropy),
    "layer_norm": ("layer_norm", _layer_norm),
    "rms_norm": ("rms_norm", _rms_norm),
    "embedding": ("embedding", _embedding),
    "adamw": ("optim", _adamw),
}


def here() -> list[str]:
    """The names of the calls that the package at hand has the function for."""
    return [name for name, (function, _) in CALLS.items() if hasattr(fastattn, function)]


def make(name: str, size: int) -> Call:
    """A call by its name.

    Args:
        name: one of `here`.
        size: the length, or the number of rows.
    """
    return CALLS[name][1](size)
