"""One line for a whole model: compile it, with its attention replaced, tell what was done; and undo it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

import torch
from torch import nn

from fastattn.compiler.backend import backend
from fastattn.compiler.report import Report, records_into

Model = TypeVar("Model", bound=nn.Module)
# Where a compiled call keeps what was called before.
_REPLACED: Final = "fastattn_replaced"
_backends: dict[Any, Callable[..., Any]] = {}


def optimize(
    model: Model,
    *,
    verbose: bool = False,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Model:
    """Compile a model in place, with the naive attention in it replaced by fastattn's.

    The model stays the same object with the same parameters, buffers, hooks and state dict; only calling it
    runs the compiled code. `revert` undoes it.

    Args:
        model: any module; it is compiled when it is first called, and again for training, evaluation or other
            shapes, as `torch.compile` does.
        verbose: print what was done once the first call has returned.
        dynamic: as in `torch.compile`.
        fullgraph: as in `torch.compile`.
        mode: as in `torch.compile`.
        options: of Inductor, as in `torch.compile`; ``{"then": backend}`` among them goes on with another
            backend.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> import torch, fastattn
        >>> layer = torch.nn.Linear(2, 2)
        >>> fastattn.optimize(layer) is layer
        True
        >>> fastattn.compiler.revert(layer) is layer
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize(model): expected a torch.nn.Module, got {type(model).__name__}")
    before: Any = model._compiled_call_impl
    model.compile(backend=_backend(mode, options), dynamic=dynamic, fullgraph=fullgraph)
    compiled: Any = model._compiled_call_impl
    setattr(compiled, _REPLACED, getattr(before, _REPLACED, before))
    if verbose:
        _tell_once(model)
    return model


def _backend(mode: str | None, options: Mapping[str, Any] | None) -> Callable[..., Any]:
    """The same object for the same settings: dynamo takes another one for another backend, and compiles what
    models of one class share anew for each."""
    plain = (str, int, float, bool, type(None))
    key = (
        mode,
        *(
            (name, type(x), x if isinstance(x, plain) else id(x))
            for name, x in sorted((options or {}).items())
        ),
    )
    return _backends.setdefault(key, partial(backend, mode=mode, options=dict(options or {})))


def _tell_once(model: nn.Module) -> None:
    compiled: Any = model._compiled_call_impl
    found = Report()

    def call(*args: Any, **kwargs: Any) -> Any:
        with records_into(found):
            out = compiled(*args, **kwargs)
        # Whoever has compiled it anew, or reverted it, meanwhile is left alone.
        if model._compiled_call_impl is call:
            model._compiled_call_impl = compiled
        print(found)
        return out

    setattr(call, _REPLACED, getattr(compiled, _REPLACED))
    model._compiled_call_impl = call


def revert(model: Model) -> Model:
    """Undo `optimize`: calling the model runs what it ran before, its own code or its own compiled one.

    Args:
        model: one that was given to `optimize`; of one that was not, nothing changes.

    Returns:
        `model`.

    Example:
        >>> import torch, fastattn
        >>> layer = fastattn.compiler.revert(fastattn.optimize(torch.nn.Linear(2, 2)))
        >>> layer(torch.ones(1, 2)).shape
        torch.Size([1, 2])
    """
    compiled: Any = model._compiled_call_impl
    if hasattr(compiled, _REPLACED):
        model._compiled_call_impl = getattr(compiled, _REPLACED)
    return model


def explain_model(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """What the pass would do with a model, without optimizing it.

    The model is called once, by its own code, as it is (training or evaluation, dropout or none). Its buffers
    and torch's random numbers are as they were afterwards.

    Args:
        model: any module.
        args: what to call it with.
        kwargs: the same, by name.

    Returns:
        A `Report`: sites seen, rewritten and left and why, by source line, and memory for these shapes.

    Example:
        >>> import torch, fastattn.compiler
        >>> q = torch.randn(1, 2, 5, 8)
        >>> class Naive(torch.nn.Module):
        ...     def forward(self, q, k, v):
        ...         return (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        >>> fastattn.compiler.explain_model(Naive(), q, q, q).rewritten
        1
    """
    found = Report()
    buffers = [(x, x.detach().clone()) for x in model.buffers()]
    entries = [(module, dict(module._buffers)) for module in model.modules()]
    compiled = torch.compile(model.forward, backend=partial(backend, then="eager"))
    try:
        with torch.random.fork_rng(), records_into(found):
            compiled(*args, **kwargs)
    finally:
        for module, own in entries:
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for x, before in buffers:
                x.copy_(before)
    return found
