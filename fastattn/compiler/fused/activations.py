"""Which activation an elementwise expression is, shown by its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx

from fastattn.compiler.axes import NoMatch
from fastattn.compiler.graph import call_of, fixed_number, is_written, same, same_shape, shape_of, value_of
from fastattn.compiler.masks import plain_mode
from fastattn.ops.activations import FUNCTIONS

_ELEMENTWISE: Final = frozenset(
    (
        *("add", "sub", "mul", "div", "pow", "square", "neg", "reciprocal", "sqrt", "rsqrt", "exp"),
        *("tanh", "sigmoid", "erf", "gelu", "silu", "relu", "rsub"),
    )
)
# What else makes a place between linear layers worth a word on why it is left; where such a step changes what
# it is given, if anywhere, no sample of its values tells.
_ALIKE: Final = _ELEMENTWISE | {
    *("dropout", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "where", "abs", "softplus"),
    *("elu", "celu", "selu", "leaky_relu", "relu6", "hardswish", "hardtanh", "mish", "logsigmoid"),
}
_MOST: Final = 24
# Two of these functions that agree at all places in float64, with their derivatives, are one.
_RELATIVE, _ABSOLUTE = 1e-7, 1e-10


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
        if len(self.leaves) == 1:
            name = _named(lambda x: self._values({self.leaves[0]: x}))
            if name is not None:
                return name, self.leaves[0], None
        elif len(self.leaves) == 2:
            for gate, linear in (self.leaves, self.leaves[::-1]):
                if not self._multiplies(linear):
                    continue
                name = _named(lambda x, g=gate, y=linear: self._values({g: x, y: torch.ones_like(x)}))  # type: ignore[misc]
                if name is not None:
                    return name, linear, gate
        raise NoMatch("no activation that is known is between its linear layers")

    def _multiplies(self, leaf: fx.Node) -> bool:
        """Whether a leaf comes to the end through views and one product, with something of its shape."""
        node, products = leaf, 0
        while node is not self.end:
            users = list(node.users)
            if len(users) != 1:
                return False
            before, node = node, users[0]
            if passes(node):
                continue
            call = call_of(node)
            if call is None or call.name != "mul" or len(node.all_input_nodes) != 2:
                return False
            if not all(same_shape(shape_of(x), shape_of(before)) for x in node.all_input_nodes):
                return False
            products += 1
        return products == 1

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


def _named(f: Callable[[Tensor], Tensor]) -> str | None:
    """Which of the known activations a function is, by its values and derivatives."""
    found = _with_derivative(f)
    for name, known in FUNCTIONS.items():
        wanted = _with_derivative(known)
        if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=_RELATIVE, atol=_ABSOLUTE):
            return name
    return None


def _with_derivative(f: Callable[[Tensor], Tensor]) -> Tensor:
    with plain_mode(), torch.inference_mode(False), torch.enable_grad():
        far = torch.logspace(-6, 30, 361, dtype=torch.float64)
        near = torch.linspace(-9, 9, 257, dtype=torch.float64)
        x = torch.cat((near, far, -far, torch.zeros_like(far[:1]))).requires_grad_()
        y = f(x)
        return torch.stack((y, *torch.autograd.grad(y.sum(), x))).detach()


def starts_at(end: fx.Node, is_leaf: Callable[[fx.Node], bool]) -> bool:
    """Whether nothing but elementwise steps lies between a node and leaves, of which there are some."""
    waiting, seen, found = [end], {end}, False
    while waiting:
        node = waiting.pop()
        if is_leaf(node):
            found = True
            continue
        call = call_of(node)
        if call is None or len(seen) > 4 * _MOST or not (call.name in _ALIKE or passes(node)):
            return False
        inputs = {x for x in node.all_input_nodes if isinstance(value_of(x), Tensor)} - seen
        seen |= inputs
        waiting += inputs
    return found


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
