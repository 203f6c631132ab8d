"""What the pass puts into graphs: ops that are made of fastattn's functions when they are traced.

They are composite: autograd, autocast and functorch see what they are made of, graphs and caches see their
names. Their last argument names the version of what they are made of, as in `fastattn.compiler.op`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.cross_entropy import cross_entropy, linear_cross_entropy
from fastattn.ops.layer_norm import dropout_add_layer_norm
from fastattn.ops.linear import linear
from fastattn.ops.mlp import mlp


def _define(name: str, schema: str) -> None:
    torch.library.define(f"fastattn::rewritten_{name}", schema)


_define("linear", "(Tensor x, Tensor weight, Tensor? bias, bool turned, str version) -> Tensor")
_define(
    "mlp",
    "(Tensor x, Tensor w1, Tensor? b1, bool turned1, Tensor w2, Tensor? b2, bool turned2, Tensor? gate, "
    "Tensor? gate_bias, bool turned_gate, str activation, str version) -> Tensor",
)
_define(
    "dropout_add_layer_norm",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float dropout, float eps, str version) -> "
    "(Tensor, Tensor)",
)
_define(
    "cross_entropy",
    "(Tensor logits, Tensor target, int ignore_index, str reduction, float label_smoothing, str version) -> "
    "Tensor",
)
_define(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor? bias, bool turned, Tensor target, int ignore_index, str reduction, "
    "float label_smoothing, str version) -> Tensor",
)


def _upright(weight: Tensor, turned: bool) -> Tensor:
    return weight.t() if turned else weight


@torch.library.impl("fastattn::rewritten_linear", "CompositeImplicitAutograd")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool, version: str) -> Tensor:
    return linear(x, _upright(weight, turned), bias)


@torch.library.impl("fastattn::rewritten_mlp", "CompositeImplicitAutograd")
def _mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    turned1: bool,
    w2: Tensor,
    b2: Tensor | None,
    turned2: bool,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    turned_gate: bool,
    activation: str,
    version: str,
) -> Tensor:
    third = None if gate is None else (_upright(gate, turned_gate), gate_bias)
    return mlp(x, _upright(w1, turned1), b1, _upright(w2, turned2), b2, activation, gate=third)


@torch.library.impl("fastattn::rewritten_dropout_add_layer_norm", "CompositeImplicitAutograd")
def _dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    eps: float,
    version: str,
) -> tuple[Tensor, Tensor]:
    out, z = dropout_add_layer_norm(x, residual, weight, bias, dropout=dropout, eps=eps, prenorm=True)
    return out, z


@torch.library.impl("fastattn::rewritten_cross_entropy", "CompositeImplicitAutograd")
def _cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: str, label_smoothing: float, version: str
) -> Tensor:
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return cross_entropy(logits, target, **options)  # type: ignore[arg-type]


@torch.library.impl("fastattn::rewritten_linear_cross_entropy", "CompositeImplicitAutograd")
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    turned: bool,
    target: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    version: str,
) -> Tensor:
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return linear_cross_entropy(x, _upright(weight, turned), target, bias, **options)  # type: ignore[arg-type]
