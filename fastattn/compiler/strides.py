"""Whether it can be told, behind a replaced attention, that its result lies in memory in another order."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, fx

from fastattn.compiler.graph import Writer, call_of, same, value_of

# What may be computed anew to see how its result lies. Whatever else reads a tensor may see its strides.
_FOLLOWED: Final = frozenset(
    (
        *("transpose", "permute", "movedim", "reshape", "contiguous", "expand", "getitem", "select"),
        *("to", "add", "sub", "mul", "div", "dropout", "relu", "sigmoid", "tanh", "gelu", "silu"),
        *("matmul", "bmm", "linear", "softmax", "layer_norm", "sum", "mean"),
    )
)
_SHAPE_ONLY: Final = frozenset(("size", "dim", "numel", "ndimension"))


def as_it_lay(write: Writer, new: fx.Node, old: fx.Node) -> fx.Node:
    """`new` in place of `old`, laid out as that where something behind it could tell the difference."""
    if _same_strides(value_of(new), value_of(old)) or not _is_seen(new, old):
        return new
    # A symbolic stride is known for the sizes that the graph was captured with; the order is that of all.
    strides: list[Any] = [
        n if type(n) is int else getattr(n.node, "hint", None) for n in value_of(old).stride()
    ]
    if value_of(old).is_contiguous() or None in strides:
        return write.call(Tensor.contiguous, new)
    order = sorted(range(len(strides)), key=lambda d: -strides[d])
    back = [order.index(d) for d in range(len(order))]
    laid = write.call(Tensor.contiguous, write.call(Tensor.permute, new, order))
    return write.call(Tensor.permute, laid, back)


def _same_strides(a: Any, b: Any) -> bool:
    return all(same(n, 1) or same(x, y) for n, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))


def _is_seen(new: fx.Node, old: fx.Node) -> bool:
    """Whether anything but the strides of what lies between depends on those of a result."""
    differs = {old: value_of(new)}
    waiting, node = set(old.users), old
    while waiting:
        node = node.next
        if node not in waiting:
            continue
        waiting.remove(node)
        call = call_of(node)
        if call is not None and call.name in _SHAPE_ONLY:
            continue
        if call is None or call.in_place or call.name not in _FOLLOWED:
            return True
        found = _computed(node, differs)
        if not isinstance(found, Tensor) or not isinstance(value_of(node), Tensor):
            return True
        if not _same_strides(found, value_of(node)):
            differs[node] = found
            waiting.update(node.users)
    return False


def _computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What a node gives for other values of its inputs; None where it cannot be computed."""

    def value(x: fx.Node) -> Any:
        return values.get(x, value_of(x))

    args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
    mode = getattr(next(iter(values.values())), "fake_mode", None)
    if mode is None:
        return None
    try:
        with mode:
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs) if callable(node.target) else None
    except Exception:
        return None
