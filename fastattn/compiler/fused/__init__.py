"""What of a model's graph, besides attention, the pass replaces by fused operations.

Each of `matches.py`'s functions looks at one node and, where something fused does what ends there, puts it in
its place: losses behind a linear layer first, then MLPs, whose linear layers are then gone, losses alone,
norms behind dropout and a residual, and what linear layers are left. A norm by itself stays: the compiler
fuses it with what is before it, and its own is as fast.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fastattn.compiler.axes import NoMatch
from fastattn.compiler.fused.matches import MATCHES
from fastattn.compiler.graph import location_of, thread_writes
from fastattn.compiler.report import Fusion


def replace_fused(module: fx.GraphModule) -> list[Fusion]:
    """Replace what fused operations do in a graph module, and in the modules it holds.

    Args:
        module: as dynamo made it: its nodes have fake values noted. Changed in place.

    Returns:
        A record for each place, whether replaced or left.
    """
    found = []
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            found += _in_graph(part)
    return found


def _in_graph(module: Any) -> list[Fusion]:
    graph, found = module.graph, []
    thread_writes(graph)
    kept = set(graph.nodes)
    for kind, match in MATCHES.items():
        for node in list(graph.nodes):
            if node._erased:
                continue
            record = Fusion(kind, location_of(node))
            try:
                if not match(node):
                    continue
                record.rewritten = True
                kept.update(graph.nodes)
            except NoMatch as error:
                record.reason = str(error)
            except Exception as error:  # the model runs as it was, whatever it holds
                record.reason = f"unexpected {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if not record.rewritten:
                for new in reversed([x for x in graph.nodes if x not in kept]):
                    graph.erase_node(new)
            found.append(record)
    if any(record.rewritten for record in found):
        graph.lint()
        module.recompile()
    return found
