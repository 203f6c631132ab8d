"""Whether a bias may be a mask: so low in places that it hides keys."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree

from fastattn.compiler.graph import Call, call_of, is_tensor, is_written, value_of

# Numbers from which on something in a bias is taken for what masks.
HIDES: Final = 1e4
# What these give is as large as scores are.
_PRODUCTS: Final = {"linear", "matmul", "mm", "bmm", "einsum", "addmm", "layer_norm", "conv1d", "conv2d"}
# Of what is moderate these need not be.
_UNBOUNDED: Final = {
    *("log", "log2", "log10", "log1p", "logit", "reciprocal", "rsqrt", "exp", "expm1", "pow", "power"),
    *("tan", "nan_to_num", "logsumexp", "cumprod", "prod", "empty", "empty_like", "new_empty"),
}
# Of these an int is a number that is computed with, and not a size or a place.
_ARITHMETIC: Final = {
    *("add", "sub", "rsub", "mul", "where", "masked_fill", "tensor", "scalar_tensor", "as_tensor"),
    *("clamp", "full", "full_like", "new_full"),
}


def may_hide(node: fx.Node) -> bool:
    """Whether a floating tensor may hide keys: unless it is computed from parameters, from products and from
    positions with none but moderate numbers."""
    waiting, seen = [node], {node}
    while waiting:
        one = waiting.pop()
        value = value_of(one)
        if not isinstance(value, Tensor):
            continue
        if is_written(one):
            return True
        if one.op in ("placeholder", "get_attr"):
            learned = value.requires_grad or isinstance(value, torch.nn.Parameter)
            if value.is_floating_point() and not learned:
                return True
            continue
        call = call_of(one)
        if call is None or call.in_place or _grows(call):
            return True
        if call.name in _PRODUCTS:
            continue
        for x in one.all_input_nodes:
            # Of a choice by a mask the numbers matter, and of what is looked up the table.
            index = call.name in ("embedding", "getitem", "index_select", "gather", "take_along_dim")
            if x in seen or (index and is_tensor(x) and not value_of(x).is_floating_point()):
                continue
            seen.add(x)
            waiting.append(x)
    return False


def _grows(call: Call) -> bool:
    if call.name in _UNBOUNDED or (call.name == "div" and is_tensor(call.args[1])):
        return True
    for x in _pytree.tree_leaves((call.args, call.kwargs)):
        number: Any = value_of(x)
        if isinstance(number, float) and not abs(number) < HIDES:
            return True
        if type(number) is int and abs(number) >= HIDES and call.name in _ARITHMETIC:
            return True
    return False
