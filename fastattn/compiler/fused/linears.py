"""A linear layer in a graph, however it is written."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, fx

from fastattn.compiler.graph import call_of, is_tensor, is_written, shape_of, value_of

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


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


def layer_of(node: Any) -> Layer | None:
    """The linear layer that a node is, of tensors that no one writes into."""
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
    return found if _fits(found) else None


def _fits(layer: Layer) -> bool:
    if not (is_tensor(layer.x) and is_tensor(layer.weight)):
        return False
    tensors = [layer.x, layer.weight]
    if layer.bias is not None:
        if not is_tensor(layer.bias) or value_of(layer.bias).dim() != 1:
            return False
        tensors.append(layer.bias)
    values = [value_of(x) for x in (*tensors, layer.node)]
    return (
        values[1].dim() == 2
        and values[0].dim() >= 1
        and len({x.dtype for x in values}) == 1
        and values[0].dtype in DTYPES
        and len({x.device for x in values}) == 1
        and not any(is_written(x) for x in (*tensors, layer.node))
        and all(type(x) is not Tensor or x.layout == torch.strided for x in values)
    )
