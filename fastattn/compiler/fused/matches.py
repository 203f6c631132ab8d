"""Where a fused operation does what a few nodes do, and what takes their place."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastattn.compiler.axes import NoMatch
from fastattn.compiler.fused import ops  # noqa: F401 - defines them
from fastattn.compiler.fused.activations import Expression, passes, starts_at
from fastattn.compiler.fused.linears import (
    DTYPES,
    NOT_PLAIN,
    Layer,
    call_of_layer,
    is_plain,
    layer_of,
    why_not,
)
from fastattn.compiler.graph import (
    Writer,
    call_of,
    erase_unused,
    fixed_number,
    is_tensor,
    is_written,
    same,
    same_shape,
    shape_of,
    value_of,
)
from fastattn.compiler.masks import plain_mode
from fastattn.compiler.op import version
from fastattn.compiler.strides import as_it_lay
from fastattn.ops.attention import explain

# Floating-point operations: below, calling an operation that is written in Python outweighs its speed.
_FEW: Final = 1 << 22
# As many, a logit of a cross entropy is counted as: an exponential forward, and one backward.
_EACH: Final = 16
_MODES: Final = (
    *("_set_grad_enabled", "_enter_inference_mode", "_exit_inference_mode"),
    *("_enter_autocast", "_exit_autocast"),
)
_NESTED: Final = ("_vmap_increment_nesting", "_grad_increment_nesting", "_jvp_increment_nesting")
_NESTED_END: Final = ("_vmap_decrement_nesting", "_grad_decrement_nesting", "_jvp_decrement_nesting")
# What the last step of an activation, or of what it gates, may be.
_ACTIVATIONS: Final = ("gelu", "silu", "relu", "mul", "pow", "square")


def mlp(node: fx.Node) -> bool:
    """``linear(activation(linear(x)))``, or the activation of one linear layer times another."""
    second = layer_of(node)
    if second is None or not _has_kernels(second.x):
        return False
    end = second.x
    while passes(end):
        end = end.all_input_nodes[0]
    call = call_of(end)
    if call is not None and call.name == "dropout":
        call = call_of(call.args[0])
    if call is None or call.name not in _ACTIVATIONS:
        return False
    if not starts_at(second.x, lambda x: layer_of(x) is not None):
        return False
    between = Expression(second.x, lambda x: layer_of(x) is not None)
    if set(second.x.users) != {node}:
        raise NoMatch("its hidden layer is used elsewhere")
    for leaf in between.leaves:
        if not set(leaf.users) <= set(between.nodes):
            raise NoMatch("what goes into its activation is used elsewhere")
    name, linear, gate = between.activation()
    first, third = layer_of(linear), None if gate is None else layer_of(gate)
    assert first is not None
    if third is not None and third.x is not first.x:
        raise NoMatch("its two first layers are of different tensors")
    if third is not None and not same(third.out_features, first.out_features):
        raise NoMatch("its gate is broadcast")
    if _products(first) + (0 if third is None else _products(third)) + _products(second) < _FEW:
        return False
    _check_modes([*between.leaves, node])
    write = Writer(node)
    new = write.call(
        torch.ops.fastattn.rewritten_mlp.default,
        first.x,
        *_weights(first),
        *_weights(second),
        *((None, None, False) if third is None else _weights(third)),
        name,
        version(),
    )
    _put(write, new, node)
    return True


def linear_cross_entropy(node: fx.Node) -> bool:
    """``cross_entropy(linear(x), target)``."""
    given = _cross_entropy(node)
    if given is None:
        return False
    logits = given["input"]
    steps = []
    while layer_of(logits) is None:
        if not (passes(logits) or _widens(logits)):
            return False
        steps.append(logits)
        logits = logits.all_input_nodes[0]
    layer = layer_of(logits)
    assert layer is not None
    if not _has_kernels(layer.x) or _products(layer) < _FEW:
        return False
    users = [*reversed(steps), node]
    for x, user in zip([logits, *reversed(steps)], users, strict=True):
        if set(x.users) != {user}:
            raise NoMatch("its logits are used elsewhere, or returned")
    _check_modes([logits, node])
    write = Writer(node)
    width = shape_of(layer.x)[-1]
    rows = layer.x if value_of(layer.x).dim() == 2 else write.call(torch.reshape, layer.x, (-1, width))
    weight, bias, turned = _weights(layer)
    new = write.call(
        torch.ops.fastattn.rewritten_linear_cross_entropy.default,
        rows,
        weight,
        bias,
        turned,
        given["target"],
        *(given[name] for name in ("ignore_index", "reduction", "label_smoothing")),
        version(),
    )
    _put(write, _in_its_dtype(write, new, node), node)
    return True


def cross_entropy(node: fx.Node) -> bool:
    """``cross_entropy(logits, target)``."""
    given = _cross_entropy(node)
    if given is None or not _has_kernels(given["input"]):
        return False
    if _hint(value_of(given["input"]).numel()) * _EACH < _FEW:
        return False
    _check_modes([node])
    write = Writer(node)
    new = write.call(
        torch.ops.fastattn.rewritten_cross_entropy.default,
        given["input"],
        given["target"],
        *(given[name] for name in ("ignore_index", "reduction", "label_smoothing")),
        version(),
    )
    _put(write, _in_its_dtype(write, new, node), node)
    return True


def dropout_add_layer_norm(node: fx.Node) -> bool:
    """``layer_norm(residual + dropout(x))``; the sum may have other users."""
    norm = _layer_norm(node)
    if norm is None:
        return False
    z, shape, weight, bias, eps = norm
    total = call_of(z)
    if total is None or total.name != "add" or total.in_place or len(shape) != 1 or is_written(z):
        return False
    a, b, alpha = total.args
    if alpha != 1 or not (is_tensor(a) and is_tensor(b)) or a is b:
        return False
    values = [value_of(x) for x in (z, a, b)]
    if len({x.dtype for x in values}) > 1 or not all(same_shape(values[0].shape, x.shape) for x in values):
        return False
    x, residual, p = b, a, 0.0
    for mine, other in ((a, b), (b, a)):
        drop = call_of(mine)
        if drop is None or drop.name != "dropout" or drop.in_place or set(mine.users) != {z}:
            continue
        p_given = fixed_number(drop.args[1])
        if p_given is None or not isinstance(drop.args[2], bool) or p_given >= 1:
            continue
        x, residual, p = drop.args[0], other, p_given if drop.args[2] else 0.0
        break
    if is_written(x) or is_written(residual):
        return False
    if not is_plain(z, x, residual):
        raise NoMatch(NOT_PLAIN)
    place = {x: i for i, x in enumerate(z.graph.nodes)}
    if any(y is not None and place[y] > place[z] for y in (weight, bias)):
        return False
    _check_modes([x, z, node])
    write = Writer(z)
    both = write.call(
        torch.ops.fastattn.rewritten_dropout_add_layer_norm.default,
        x,
        residual,
        weight,
        bias,
        p,
        eps,
        version(),
    )
    out, total_of = (write.call(operator.getitem, both, i) for i in range(2))
    out, total_of = _alike(write, out, node), _alike(write, total_of, z)
    node.replace_all_uses_with(out)
    z.replace_all_uses_with(total_of)
    erase_unused([node, z])
    return True


def linear(node: fx.Node) -> bool:
    """A linear layer on a CPU, where the product is measured; a GPU's own library keeps its own."""
    layer = call_of_layer(node)
    if layer is None or value_of(node).device.type != "cpu" or not _has_kernels(layer.x):
        return False
    reason = why_not(layer)
    if reason is not None:
        raise NoMatch(reason)
    if _products(layer) < _FEW:
        return False
    _check_modes([node])
    write = Writer(node)
    _put(
        write,
        write.call(torch.ops.fastattn.rewritten_linear.default, layer.x, *_weights(layer), version()),
        node,
    )
    return True


# In this order: what an earlier one takes in is no longer there for a later one.
MATCHES: Final[dict[str, Callable[[fx.Node], bool]]] = {
    "linear + cross entropy": linear_cross_entropy,
    "MLP": mlp,
    "cross entropy": cross_entropy,
    "dropout + add + layer norm": dropout_add_layer_norm,
    "linear": linear,
}


def _weights(layer: Layer) -> tuple[fx.Node, fx.Node | None, bool]:
    return layer.weight, layer.bias, layer.turned


def _cross_entropy(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of torch's, where ours takes them."""
    if node.op != "call_function" or node.target is not F.cross_entropy:
        return None
    bound = inspect.signature(F.cross_entropy).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    logits, target = given["input"], given["target"]
    if not (is_tensor(logits) and is_tensor(target)) or is_written(logits) or is_written(target):
        return None
    if given["weight"] is not None or given["size_average"] is not None or given["reduce"] is not None:
        raise NoMatch("it has class weights, or torch's old names of reductions")
    if not is_plain(node, logits, target):
        raise NoMatch(NOT_PLAIN)
    if value_of(logits).dtype not in DTYPES or value_of(target).dtype != torch.int64:
        raise NoMatch("expected logits of float32, bfloat16 or float16, and class indices")
    if value_of(logits).dim() != 2:
        raise NoMatch("expected logits of two dimensions")
    return given


def _layer_norm(node: fx.Node) -> tuple[fx.Node, tuple[Any, ...], Any, Any, float] | None:
    if node.op != "call_function" or node.target is not F.layer_norm:
        return None
    bound = inspect.signature(F.layer_norm).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    x, shape, weight, bias, eps = bound.arguments.values()
    tensors = [y for y in (x, weight, bias) if y is not None]
    if not all(is_tensor(y) for y in tensors):
        return None
    if any(is_written(y) for y in tensors):
        raise NoMatch("what it normalises is written into")
    if not is_plain(node, *tensors):
        raise NoMatch(NOT_PLAIN)
    if value_of(x).dtype not in DTYPES or fixed_number(eps) is None or not _has_kernels(x):
        return None
    return x, tuple(shape), weight, bias, float(fixed_number(eps) or 0.0)


def _widens(node: fx.Node) -> bool:
    """Whether a node casts a half precision tensor to float32."""
    call = call_of(node)
    if call is None or call.name != "to" or not isinstance(call.args[0], fx.Node):
        return False
    before, after = value_of(call.args[0]), value_of(node)
    return (
        isinstance(before, Tensor)
        and before.dtype in DTYPES[1:]
        and after.dtype == torch.float32
        and before.device == after.device
    )


def _check_modes(nodes: list[fx.Node]) -> None:
    """Raise where what lies between the first and the last of them changes how they are computed."""
    inside, nesting, left = False, 0, set(nodes)
    for node in nodes[0].graph.nodes:
        name = getattr(node.target, "__name__", "")
        nesting += (name in _NESTED) - (name in _NESTED_END)
        if node in left:
            inside = True
            left.remove(node)
            if nesting:
                raise NoMatch("it is inside a functorch transform")
            if not left:
                return
        elif inside and name in (*_MODES, *_NESTED, *_NESTED_END):
            raise NoMatch(f"{name} is between its parts")


def _put(write: Writer, new: fx.Node, old: fx.Node) -> None:
    """`new` in the place of `old`, where it gives the same kind of tensor."""
    old.replace_all_uses_with(_alike(write, new, old))
    erase_unused([old])


def _alike(write: Writer, new: fx.Node, old: fx.Node) -> fx.Node:
    """`new`, laid out as `old` where that is seen; raises where it is of another dtype or shape."""
    found, wanted = value_of(new), value_of(old)
    if found.dtype == wanted.dtype and same_shape(found.shape, wanted.shape):
        return as_it_lay(write, new, old)
    raise NoMatch(f"it would give {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}")


def _in_its_dtype(write: Writer, loss: fx.Node, old: fx.Node) -> fx.Node:
    """A loss, which is of float32, as torch gives it for logits of half precision."""
    dtype = value_of(old).dtype
    return loss if value_of(loss).dtype == dtype else write.call(Tensor.to, loss, dtype)


def _products(layer: Layer) -> int:
    """How many floating-point operations a linear layer takes."""
    return 2 * _hint(value_of(layer.x).numel()) * _hint(layer.out_features)


def _hint(size: Any) -> int:
    """A size; of a symbolic one its value, without a guard."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def _has_kernels(x: fx.Node) -> bool:
    """Whether this device has kernels of ours, and not eager PyTorch alone."""
    device = value_of(x).device
    if device.type not in ("cpu", "cuda"):
        return False
    with plain_mode():
        tiny = torch.zeros((1, 1, 1, 8), device=device)
        return explain(tiny, tiny, tiny).backend != "reference"
