"""A linear layer in a graph, however it is written."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, fx

from fastattn.compiler.graph import call_of, is_tensor, is_written, same_shape, shape_of, value_of

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
NOT_PLAIN: Final = "it is of a subclass of Tensor, or not strided"


class Layer(NamedTuple):
    """``x @ weightᵀ + bias``.

    Attributes:
        node: what gives it.
        x: ``[..., in_features]``.
        weight: ``[out_features, in_features]``, or ``[in_features, out_features]`` where `turned`.
        turned: as `addmm` has it.
        bias: ``[out_features]`` or None.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    turned: bool
    bias: fx.Node | None

    @property
    def out_features(self) -> Any:
        return shape_of(self.weight)[1 if self.turned else 0]

    @property
    def in_features(self) -> Any:
        return shape_of(self.weight)[0 if self.turned else 1]


def layer_of(node: Any) -> Layer | None:
    """The linear layer that a node is, where fastattn has it."""
    found = call_of_layer(node)
    return found if found is not None and why_not(found) is None else None


def call_of_layer(node: Any) -> Layer | None:
    """The linear layer that a node is, of whatever kind of tensors."""
    call = call_of(node)
    if call is None or call.in_place:
        return None
    if call.name == "linear":
        given = dict(zip(("input", "weight", "bias"), call.args, strict=False)) | call.kwargs
        found = Layer(node, given.get("input"), given.get("weight"), False, given.get("bias"))  # type: ignore[arg-type]
    elif call.name == "addmm" and len(call.args) == 3 and not call.kwargs:
        bias, x, weight = call.args
        found = Layer(node, x, weight, True, bias)
    else:
        return None
    tensors = [x for x in (node, found.x, found.weight, found.bias) if x is not None]
    return found if all(is_tensor(x) for x in tensors) else None


def why_not(layer: Layer) -> str | None:
    """Why a linear layer is none of fastattn's; None where it is."""
    tensors = [x for x in (layer.node, layer.x, layer.weight, layer.bias) if x is not None]
    values = [value_of(x) for x in tensors]
    if not is_plain(*tensors):
        return NOT_PLAIN
    if any(is_written(x) for x in tensors):
        return "one of its tensors is written into"
    if len({x.device for x in values}) > 1:
        return "its tensors are on several devices"
    dtypes = {x.dtype for x in values}
    if len(dtypes) > 1 and torch.float32 in dtypes:
        return f"autocast, its tensors are of {', '.join(sorted(map(str, dtypes)))}; cast them in the model"
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return "expected tensors of float32, bfloat16 or float16, all alike"
    if values[1].dim() < 1 or values[2].dim() != 2:
        return "expected a weight of two dimensions"
    wanted = (layer.in_features, *(() if layer.bias is None else (layer.out_features,)))
    given = (shape_of(layer.x)[-1], *(() if layer.bias is None else shape_of(layer.bias)))
    return None if same_shape(wanted, given) else "its bias is broadcast"


def is_plain(*nodes: fx.Node) -> bool:
    """Whether nodes give strided tensors of no subclass: no DTensor, nested, sparse or quantised one."""
    from torch._subclasses import FakeTensor  # noqa: PLC0415 - brings sympy

    values = [value_of(x) for x in nodes]
    return all(
        type(x) in (Tensor, torch.nn.Parameter, FakeTensor) and x.layout == torch.strided for x in values
    )
