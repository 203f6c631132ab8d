"""torch.compile with attention that is found in the graph and replaced, and a report of what was done.

`torch.compile(model, backend="fastattn")` runs the pass and goes on with Inductor; `attention_pass()` is the
pass for who keeps Inductor's name; `optimize(model)` does it all for a module in one line, and
`revert(model)` undoes it.

From the model's graph to the replaced one: `graph.py` reads every spelling of a call as one; `patterns.py`
walks from a softmax back to the product of queries and keys and forward to the one with the values, with
`axes.py` telling which axis is which; `masks.py` and `indices.py` show what masks are; `emit.py` and
`rewrite.py` put the op of `op.py` in their place. What can't be shown is left as it was, and `report()` says
why. `fused/` does the same for what else is fused: MLPs, losses, norms, linear layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastattn.compiler.report import Fusion, Record, Report, report, reset_report

if TYPE_CHECKING:
    from fastattn.compiler.backend import AttentionPass, attention_pass
    from fastattn.compiler.model import explain_model, optimize, revert
    from fastattn.compiler.rewrite import replace_attention

__all__ = [
    "AttentionPass",
    "Fusion",
    "Record",
    "Report",
    "attention_pass",
    "explain_model",
    "optimize",
    "report",
    "reset_report",
    "revert",
    "replace_attention",
]

# What brings torch's compiler with it is imported when it is asked for.
_LATER = {
    "AttentionPass": "backend",
    "attention_pass": "backend",
    "explain_model": "model",
    "optimize": "model",
    "revert": "model",
    "replace_attention": "rewrite",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib  # noqa: PLC0415

    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
