"""The pass where compilers can be given it: a dynamo backend of its own, and a pass for Inductor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from fastattn.compiler import op
from fastattn.compiler.fused import replace_fused
from fastattn.compiler.report import note
from fastattn.compiler.rewrite import replace_attention


def rewrite(module: fx.GraphModule) -> None:
    """The pass: attention first, whose graph must be as its author wrote it, then what else is fused."""
    note([*replace_attention(module), *replace_fused(module)])


def backend(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    then: str | Callable[..., Any] = "inductor",
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fastattn")``: the pass, and then Inductor with all its options.

    Args:
        module: the graph that dynamo captured.
        example_inputs: its inputs.
        mode: as in `torch.compile`.
        options: as in `torch.compile`; ``{"then": backend}`` among them names another backend to go on with.
        then: that backend.

    Returns:
        The compiled graph.

    Raises:
        ValueError: mode or options with a backend that takes none.
    """
    given = dict(options or {})
    then = given.pop("then", then)
    rewrite(module)
    if then == "inductor":
        inductor = torch._TorchCompileInductorWrapper(mode, given, None)
        compiled: Callable[..., Any] = inductor(module, example_inputs)
        return compiled
    if mode is not None or given:
        raise ValueError(
            f"backend='fastattn': expected no mode and no options for {then!r}, got {mode}, {given}"
        )
    if isinstance(then, str):
        from torch._dynamo import lookup_backend  # noqa: PLC0415

        then = lookup_backend(then)
    found: Callable[..., Any] = then(module, list(example_inputs))
    return found


class AttentionPass(CustomGraphPass):
    """What `attention_pass` returns."""

    def __call__(self, graph: fx.Graph) -> None:
        owner = graph.owning_module
        if owner is not None:
            rewrite(owner)

    def uuid(self) -> str:
        return f"fastattn-{op.version()}"


def attention_pass() -> AttentionPass:
    """The pass for people who keep ``backend="inductor"``.

    Returns:
        What Inductor takes as ``options={"pre_grad_custom_pass": ...}``, with a key for its caches. Where
        Inductor finds the whole graph in its cache it does not run the pass, and `report` has nothing to
        tell.

    Example:
        >>> import torch, fastattn.compiler
        >>> options = {"pre_grad_custom_pass": fastattn.compiler.attention_pass()}
        >>> compiled = torch.compile(torch.nn.Linear(2, 2), options=options)
    """
    return AttentionPass()
