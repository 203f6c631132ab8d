"""What a node of a graph says, whichever way the model's author wrote it.

Dynamo's graphs are as the code was: ``x.softmax(-1)``, ``F.softmax(x, dim=-1)`` and ``torch.softmax(x, -1)``
are three different nodes, an exported graph has a fourth. `call_of` gives all of them one name and one list
of arguments.
"""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, fx

Size = Any  # int or SymInt

# Other names of the same thing.
_SAME: Final = {
    "multiply": "mul",
    "truediv": "div",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "__matmul__": "matmul",
    "_softmax": "softmax",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "view": "reshape",
    "_unsafe_view": "reshape",
    "view_as": "reshape",
    "reshape_as": "reshape",
    "flatten": "reshape",
    "unflatten": "reshape",
    "unsqueeze": "reshape",
    "squeeze": "reshape",
    "logical_and": "and_",
    "bitwise_and": "and_",
    "__and__": "and_",
    "logical_or": "or_",
    "bitwise_or": "or_",
    "__or__": "or_",
    "logical_not": "invert",
    "bitwise_not": "invert",
    "inv": "invert",
    "greater_equal": "ge",
    "greater": "gt",
    "less_equal": "le",
    "less": "lt",
    "not_equal": "ne",
    "type": "to",
    "type_as": "to",
    "float": "to",
    "half": "to",
    "bfloat16": "to",
    "bool": "to",
    "long": "to",
    "int": "to",
    "_to_copy": "to",
    "clone": "contiguous",
    "__getitem__": "getitem",
    "__setitem__": "setitem",
}
_IN_PLACE: Final = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "iand": "and_",
    "ior": "or_",
    "ixor": "xor",
    "ipow": "pow",
    "ifloordiv": "floor_divide",
    "imod": "remainder",
    "ilshift": "lshift",
    "irshift": "rshift",
    "imatmul": "matmul",
}
_NOT_IN_PLACE: Final = ("and_", "or_", "not_", "is_")
# Where the canonical arguments stand, by the name they may also be given by.
_ARGUMENTS: Final[dict[str, tuple[str, ...]]] = {
    "softmax": ("input", "dim", "dtype"),
    "dropout": ("input", "p", "training"),
    "masked_fill": ("input", "mask", "value"),
    "where": ("condition", "input", "other"),
    "add": ("input", "other", "alpha"),
    "sub": ("input", "other", "alpha"),
    "mul": ("input", "other"),
    "div": ("input", "other", "rounding_mode"),
    "matmul": ("input", "other"),
    "bmm": ("input", "mat2"),
    "baddbmm": ("input", "batch1", "batch2", "beta", "alpha"),
    "transpose": ("input", "dim0", "dim1"),
    "movedim": ("input", "source", "destination"),
    "repeat_interleave": ("input", "repeats", "dim"),
    "tril": ("input", "diagonal"),
    "triu": ("input", "diagonal"),
    "scaled_dot_product_attention": (
        *("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
    ),
    "cumsum": ("input", "dim"),
    "diff": ("input", "n", "dim", "prepend", "append"),
}
_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "softmax": {"dtype": None},
    "dropout": {"p": 0.5, "training": True},
    "add": {"alpha": 1},
    "sub": {"alpha": 1},
    "div": {"rounding_mode": None},
    "baddbmm": {"beta": 1, "alpha": 1},
    "tril": {"diagonal": 0},
    "triu": {"diagonal": 0},
    "diff": {"n": 1, "dim": -1, "prepend": None, "append": None},
    "scaled_dot_product_attention": {
        **{"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False},
    },
}
# Two names that some overloads give to the same argument.
_ALIASES: Final = {
    "self": "input",
    "tensor": "input",
    "train": "training",
    "axis": "dim",
    "half_to_float": "dtype",
}


_WRITTEN: Final = "fastattn_written"


class Call(NamedTuple):
    """What a node calls.

    Attributes:
        name: canonical.
        args: for the names in `_ARGUMENTS` all of its arguments in that order; for others, as given.
        kwargs: of others, what was given by name.
        in_place: whether it writes into its first argument.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_place: bool


def value_of(x: Any) -> Any:
    """The fake tensor or symbolic number that the compiler has noted for a node; anything else is itself."""
    if not isinstance(x, fx.Node):
        return x
    return x.meta.get("example_value", x.meta.get("val"))


def result_of(node: fx.Node) -> Any:
    """What a node gives; of several results the first."""
    value = value_of(node)
    return value[0] if isinstance(value, (tuple, list)) else value


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    return tuple(value_of(node).shape)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes, or symbolic numbers, are the same for every input that the graph is for."""
    if type(a) is int and type(b) is int:
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # noqa: PLC0415 - brings sympy

    return bool(statically_known_true(a == b))


def same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def plain(x: Any) -> Any:
    """A symbolic number that is always the same, as an int."""
    if isinstance(x, torch.SymInt):
        known = x.node.maybe_as_int()
        return x if known is None else known
    return x


def is_tensor(x: Any) -> bool:
    return isinstance(x, fx.Node) and isinstance(value_of(x), Tensor)


def stops_gradient(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node was computed from another without a gradient, as ``torch.no_grad`` has it."""
    before, after = value_of(source), value_of(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.requires_grad and not after.requires_grad


def number_of(x: Any) -> float | None:
    """A plain number that is written in the graph."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    return None


def is_symbolic_number(x: Any) -> bool:
    return isinstance(x, fx.Node) and isinstance(value_of(x), (torch.SymFloat, torch.SymInt, float, int))


def fixed_number(x: Any) -> float | None:
    """A number written in the graph, or a symbolic one pinned to its value by a guard; None where the values
    of tensors decide it."""
    if is_symbolic_number(x):
        from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # noqa: PLC0415 - brings sympy

        number = value_of(x)
        return None if free_unbacked_symbols(number) else float(number)
    return number_of(x)


def call_of(node: Any) -> Call | None:
    """What `node` calls; None where it calls nothing of torch's."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        return _module_call(node)
    if node.target is getattr and node.args[1] in ("T", "mT"):
        return Call("transpose", (node.args[0], -2, -1), {}, False)
    name, by_method = _name(node)
    if name is None:
        return None
    in_place = _is_in_place(node, name)
    given = name
    if in_place:
        name = _IN_PLACE.get(name.strip("_"), name.rstrip("_"))
    name = _SAME.get(name, name)
    args, kwargs = tuple(node.args), {_ALIASES.get(k, k): v for k, v in node.kwargs.items()}
    if kwargs.get("out") is not None:
        return None
    if given == "softmax" and node.target is torch.nn.functional.softmax and len(args) > 2:
        args = (*args[:2], *args[3:])  # its _stacklevel
    if given == "_softmax":
        args = args[:2]
    if name == "where" and by_method and len(args) > 1:
        args = (args[1], args[0], *args[2:])
    if name in ("ge", "gt", "le", "lt", "eq", "ne", "and_", "or_") and "other" in kwargs:
        args = (*args, kwargs.pop("other"))
    kwargs.pop("_stacklevel", None)
    if not args and "input" in kwargs:
        args = (kwargs.pop("input"),)
    if name in ("permute", "expand") and len(args) == 1:
        args = (*args, kwargs.pop("dims" if name == "permute" else "size", None))
    names = _ARGUMENTS.get(name)
    if names is None:
        return Call(name, args, kwargs, in_place)
    defaults = _DEFAULTS.get(name, {})
    bound = list(args)
    for wanted in names[len(args) :]:
        if wanted in kwargs:
            bound.append(kwargs[wanted])
        elif wanted in defaults:
            bound.append(defaults[wanted])
        else:
            return None
    return Call(name, tuple(bound), {}, in_place)


def _is_in_place(node: fx.Node, name: str) -> bool:
    """Whether a call writes into its first argument: ``add_``, ``+=``, ``inplace=True``."""
    if name.startswith("__") and name.endswith("__"):
        return name[2:-2] in _IN_PLACE
    if name in _IN_PLACE or (name.endswith("_") and name not in _NOT_IN_PLACE):
        return True
    if getattr(torch.nn.functional, name, None) is not node.target:
        return False
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"] is not False
    if not isinstance(node.target, types.FunctionType):
        return False
    names = tuple(inspect.signature(node.target).parameters)
    at = names.index("inplace") if "inplace" in names else len(node.args)
    return at < len(node.args) and node.args[at] is not False


def _name(node: fx.Node) -> tuple[str | None, bool]:
    target = node.target
    if node.op == "call_method":
        return str(target), True
    if node.op != "call_function":
        return None, False
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        full = target.name() if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        space, _, name = full.partition("::")
        return (name.partition(".")[0] if space == "aten" else None), False
    name = getattr(target, "__name__", None)
    if name is None:
        return None, False
    places = (torch, torch.nn.functional, operator, torch.special, torch._C._nn)
    if any(getattr(place, name, None) is target for place in places):
        return name, False
    if isinstance(target, (types.MethodDescriptorType, types.WrapperDescriptorType)) and (
        getattr(Tensor, name, None) is target
    ):
        return name, True
    return None, False


def _module_call(node: fx.Node) -> Call | None:
    owner = node.graph.owning_module
    if owner is None or not isinstance(node.target, str) or len(node.args) != 1 or node.kwargs:
        return None
    module = owner.get_submodule(node.target)
    if isinstance(module, torch.nn.Softmax):
        return Call("softmax", (node.args[0], module.dim, None), {}, False)
    if isinstance(module, torch.nn.Dropout):
        return Call("dropout", (node.args[0], module.p, module.training), {}, module.inplace)
    return None


def location_of(node: fx.Node) -> str:
    """File and line of the model's code, and the code: ``gpt2.py:64: attn = softmax(...)``; the node's name
    where nothing was noted."""
    lines = [
        line.strip()
        for line in (node.meta.get("stack_trace") or node.stack_trace or "").splitlines()
        if line.strip()
    ]
    for at in range(len(lines) - 1, -1, -1):
        if lines[at].startswith('File "'):
            path, _, rest = lines[at][6:].partition('", line ')
            number = rest.partition(",")[0]
            code = lines[at + 1] if at + 1 < len(lines) else ""
            return f"{path}:{number}: {code}" if code else f"{path}:{number}"
    return f"node {node.name}"


def thread_writes(graph: fx.Graph) -> None:
    """Let what reads a tensor after it was written in place read what that call returned, and note writes.

    The two are the same tensor.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        call = call_of(node)
        if call is None or not call.in_place or not call.args or not isinstance(call.args[0], fx.Node):
            continue
        written = call.args[0]
        if not _is_same_tensor(value_of(written), value_of(node)):
            continue
        for user in list(written.users):
            if place[user] > place[node]:
                user.replace_input_with(written, node)
    memory = {storage_of(x) for node in graph.nodes for x in writes_of(node)}
    for node in graph.nodes:
        if storage_of(node) in memory:
            node.meta[_WRITTEN] = True


def _is_same_tensor(a: Any, b: Any) -> bool:
    """Whether two noted values are of one tensor: the same elements of the same memory."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype != b.dtype:
        return False
    memory = _memory_of(a)
    return a is b or (
        memory is not None
        and memory == _memory_of(b)
        and same_shape(a.shape, b.shape)
        and same_shape(a.stride(), b.stride())
        and same(a.storage_offset(), b.storage_offset())
    )


def is_written(node: fx.Node) -> bool:
    """Whether the memory that a node's tensor lies in is written into, anywhere in the graph."""
    return _WRITTEN in node.meta


def erase_unused(nodes: list[fx.Node]) -> None:
    """Erase those that have no users, and then what only they used.

    What writes into memory or has another effect stays, whoever uses it.
    """
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node._erased or node.users or not _is_pure(node):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        waiting += inputs


def _is_pure(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    call = call_of(node)
    if call is None or call.in_place or call.name == "setitem":
        return False
    return call.name == "dropout" or not node.is_impure()  # a mask that nobody sees need not be drawn


def writes_of(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes whose memory `node` writes into."""
    yield from (x for x in torch.utils._pytree.tree_leaves(list(_written(node))) if isinstance(x, fx.Node))


def _written(node: fx.Node) -> Iterator[Any]:
    """The arguments that `node` writes into; they may be lists of nodes."""
    call, target = call_of(node), node.target
    if call is not None and (call.in_place or call.name == "setitem"):
        yield call.args[0]
    yield node.kwargs.get("out")
    if node.op == "call_module":
        owner = node.graph.owning_module
        if owner is not None and getattr(owner.get_submodule(str(target)), "inplace", False):
            yield [*node.args, *node.kwargs.values()]
    if getattr(target, "__name__", None) == "triton_kernel_wrapper_mutation":
        yield list(node.all_input_nodes)
    overloads: list[torch._ops.OpOverload] = []
    if isinstance(target, torch._ops.OpOverload):
        overloads = [target]
    elif isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]
    for overload in overloads:
        if not overload._schema.is_mutable:
            continue
        for at, wanted in enumerate(overload._schema.arguments):
            if wanted.alias_info is not None and wanted.alias_info.is_write:
                yield node.args[at] if at < len(node.args) else node.kwargs.get(wanted.name)


def storage_of(node: fx.Node) -> int | None:
    """Which memory a node's tensor lies in."""
    return _memory_of(value_of(node))


def _memory_of(value: Any) -> int | None:
    if not isinstance(value, Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


class Writer:
    """Adds calls to a graph before one of its nodes, and notes what each of them gives."""

    def __init__(self, before: fx.Node) -> None:
        self.graph, self.before = before.graph, before
        self.nodes: list[fx.Node] = []

    def call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        """A node that calls `function`; what it gives is computed with the values noted for `args`."""
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(function, args)
        self.nodes.append(node)
        node.meta = {
            key: self.before.meta[key]
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")
            if key in self.before.meta
        }
        given = fx.map_arg(args, value_of)
        fakes = [x for x in torch.utils._pytree.tree_leaves(given) if hasattr(x, "fake_mode")]
        key = "example_value" if "example_value" in self.before.meta else "val"
        if fakes:
            with fakes[0].fake_mode:
                node.meta[key] = function(*given)
        else:
            node.meta[key] = function(*given)
        return node
