"""Which activation an elementwise expression is, shown by its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx

from fastattn.compiler.axes import NoMatch
from fastattn.compiler.graph import call_of, fixed_number, is_written, same, shape_of, value_of
from fastattn.compiler.masks import plain_mode
from fastattn.ops.activations import FUNCTIONS

_ELEMENTWISE: Final = frozenset(
    (
        *("add", "sub", "mul", "div", "pow", "square", "neg", "reciprocal", "sqrt", "rsqrt", "exp", "clamp"),
        *("tanh", "sigmoid", "erf", "gelu", "silu", "relu", "maximum", "rsub", "abs", "softplus"),
    )
)
_MOST: Final = 24
# Two of these functions that agree at all of these places in float64 are one.
_PLACES: Final = 257
_TOLERANCE: Final = 1e-7


class Expression:
    """What lies between linear layers: elementwise steps from one or two of them to a hidden layer.

    Attributes:
        nodes: all steps, in the order of the graph, views included.
        leaves: what they start from.
    """

    def __init__(self, end: fx.Node, is_leaf: Callable[[fx.Node], bool]) -> None:
        self.end, self._is_leaf = end, is_leaf
        self.leaves: list[fx.Node] = []
        self.nodes: list[fx.Node] = []
        self._read(end)
        inside = set(self.nodes)
        for node in inside - {end}:
            if not set(node.users) <= inside:
                raise NoMatch("what is between its linear layers is used elsewhere")

    def _read(self, node: fx.Node) -> None:
        if node in self.leaves or node in self.nodes:
            return
        if self._is_leaf(node):
            self.leaves.append(node)
            return
        call = call_of(node)
        if call is None or call.in_place or is_written(node) or len(self.nodes) >= _MOST:
            raise NoMatch(f"no activation that is known: {node.name} is between its linear layers")
        if not (call.name in _ELEMENTWISE or passes(node)):
            raise NoMatch(f"no activation that is known: {call.name} is between its linear layers")
        for x in node.all_input_nodes[:1] if passes(node) else node.all_input_nodes:
            if isinstance(value_of(x), Tensor):
                self._read(x)
            elif fixed_number(x) is None:
                raise NoMatch("a number in its activation is not known when it is compiled")
        self.nodes.append(node)

    def activation(self) -> tuple[str, fx.Node, fx.Node | None]:
        """Its name, the linear layer it is not of where there are two, else the only one, and the gate."""
        axis = torch.linspace(-9.0, 9.0, _PLACES, dtype=torch.float64)
        if len(self.leaves) == 1:
            found = self._values({self.leaves[0]: axis})
            for name, f in FUNCTIONS.items():
                if _equal(found, f(axis)):
                    return name, self.leaves[0], None
        elif len(self.leaves) == 2:
            other = torch.linspace(-3.0, 3.0, 7, dtype=torch.float64)[:, None]
            for gate, linear in (self.leaves, self.leaves[::-1]):
                found = self._values({gate: axis.expand(7, -1), linear: other.expand(-1, _PLACES)})
                for name, f in FUNCTIONS.items():
                    if _equal(found, f(axis) * other):
                        return name, linear, gate
        raise NoMatch("no activation that is known is between its linear layers")

    def _values(self, given: dict[fx.Node, Tensor]) -> Tensor:
        env: dict[fx.Node, Any] = dict(given)

        def read(x: fx.Node) -> Any:
            return env[x] if x in env else fixed_number(x)

        with plain_mode():
            for node in self.nodes:
                if passes(node):
                    env[node] = read(node.all_input_nodes[0])
                    continue
                args, kwargs = fx.map_arg((node.args, node.kwargs), read)
                if node.op == "call_method":
                    env[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        found: Tensor = env[self.end]
        return found


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE))


def passes(node: fx.Node) -> bool:
    """Whether a node gives what it is given, its last dimension as it was: a view of the others, a dropout of
    nothing, a cast to what it is."""
    call = call_of(node)
    if call is None or call.in_place or not call.args or not isinstance(call.args[0], fx.Node):
        return False
    before, after = value_of(call.args[0]), value_of(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.dtype != after.dtype:
        return False
    if call.name == "dropout":
        return call.args[2] is False or call.args[1] == 0
    if call.name not in ("reshape", "contiguous", "to") or before.device != after.device:
        return False
    if before.dim() == 0 or after.dim() == 0:
        return False
    return same(shape_of(call.args[0])[-1], shape_of(node)[-1]) and same(before.numel(), after.numel())
