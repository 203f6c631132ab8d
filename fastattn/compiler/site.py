"""One naive attention in a graph, taken apart; and the numbers that are written in graphs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, fx

from fastattn.compiler.axes import Axes, Layout, NoMatch
from fastattn.compiler.graph import call_of, fixed_number, is_tensor, is_written


class Term(NamedTuple):
    """A tensor that joins the scores.

    Attributes:
        node: broadcast against a tensor of that layout.
        layout: of the scores there.
        number: what it is multiplied by before it is added; or what takes the scores' place where it masks.
        keeps: of a mask, whether True keeps.
    """

    node: fx.Node
    layout: Layout
    number: float = 1.0
    keeps: bool = False


@dataclass
class Site:
    """One naive attention in a graph.

    Attributes:
        softmax: its node.
        nodes: all that its scores and probabilities go through, in the graph's order; the last is `out`.
        out: the product with the values.
        axes: of all layouts.
        q, k, v: nodes, with their layouts.
        batch: the axes that are neither queries, keys nor head_dims.
        rows, keys, inner, width: the axes of queries, keys, head_dim and the values' head_dim.
        scale: factor on q kᵀ.
        factors: tensors, or symbolic numbers, that multiply the scores first of all.
        softcap: 0 for none.
        added: what is added to the scores.
        fills: what masks them.
        zeros: what sets probabilities to 0 behind the softmax.
        dropout: probability.
        causal: whether a query sees no key behind its own, both counted from the first.
        weights: numbers and tensors that multiply the probabilities.
        layout: of `out`.
    """

    softmax: fx.Node
    nodes: list[fx.Node]
    out: fx.Node
    axes: Axes
    q: tuple[fx.Node, Layout]
    k: tuple[fx.Node, Layout]
    v: tuple[fx.Node, Layout]
    layout: Layout
    inner: int
    width: int
    rows: int = -1
    keys: int = -1
    batch: tuple[int, ...] = ()
    scale: float = 1.0
    softcap: float = 0.0
    dropout: float = 0.0
    factors: list[Term] = field(default_factory=list)
    symbols: list[tuple[fx.Node, bool]] = field(default_factory=list)
    added: list[Term] = field(default_factory=list)
    fills: list[Term] = field(default_factory=list)
    zeros: list[Term] = field(default_factory=list)
    weights: list[Term] = field(default_factory=list)
    weight: float = 1.0
    causal: bool = False


def fixed_probability(p: Any) -> float:
    """A dropout probability; a symbolic one is pinned to its value by a guard."""
    number = fixed_number(p)
    if number is None or not 0 <= number < 1:
        raise NoMatch(f"dropout with p={p}")
    return number


def constant_of(x: Any) -> float | None:
    """The number that a tensor of one element, or a number, is written as in the graph."""
    number = fixed_number(x)
    if number is not None:
        return number
    if not is_tensor(x) or is_written(x):
        return None
    call = call_of(x)
    if call is None:
        return _attribute(x)
    if call.name in ("to", "expand", "reshape", "contiguous", "detach") and is_tensor(call.args[0]):
        return constant_of(call.args[0])
    if call.name in ("full", "full_like", "new_full"):
        fill = call.kwargs.get("fill_value", call.args[-1])
        return fixed_number(fill)
    if call.name in ("tensor", "scalar_tensor", "as_tensor"):
        return fixed_number(call.args[0])
    if call.name in ("zeros", "zeros_like", "new_zeros"):
        return 0.0
    return None


def _attribute(node: fx.Node) -> float | None:
    """A constant of one element that the tracer has put into the graph's module."""
    owner = node.graph.owning_module
    if node.op != "get_attr" or owner is None or not str(node.target).startswith("_tensor_constant"):
        return None
    value = getattr(owner, str(node.target), None)
    if isinstance(value, Tensor) and value.numel() == 1 and not hasattr(value, "fake_mode"):
        return float(value)
    return None
