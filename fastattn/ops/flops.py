"""What the ops cost, for `torch.utils.flop_counter`: told to it when it is imported, by whoever needs it.

It imports triton where that is installed, a fifth of a second that `import fastattn` does not take.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

import torch

_COUNTER: Final = "torch.utils.flop_counter"


def register(formulas: Mapping[str, Callable[..., int]]) -> None:
    """Make the formulas of these ops, which are defined, known: now, or when the counter is imported.

    Args:
        formulas: by the op's name behind ``fastattn::``; each takes the op's arguments, shapes in the
            place of tensors, and `out_shape`, and gives floating-point operations.
    """
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], formulas)
    else:
        sys.meta_path.insert(0, _WhenImported(formulas))


def _register(counter: ModuleType, formulas: Mapping[str, Callable[..., int]]) -> None:
    for name, formula in formulas.items():
        counter.register_flop_formula(getattr(torch.ops.fastattn, name))(formula)


class _WhenImported:
    """Finds the counter's module as Python does, once, and registers formulas when it has run."""

    def __init__(self, formulas: Mapping[str, Callable[..., int]]) -> None:
        self.formulas = formulas

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module, self.formulas)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
