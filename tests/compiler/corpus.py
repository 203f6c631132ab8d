"""Graphs of real models, kept as text in `corpus/`, so that another torch or transformers shows what changed.

python -m tests.compiler.corpus    # writes them anew
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from tests.compiler.models import LENGTH, MODELS, arguments, without_dropout

FOLDER = Path(__file__).with_name("corpus")
# The model, and on which side keys are hidden.
GRAPHS = {
    "gpt2": ("gpt2", ""),
    "gpt2_padded": ("gpt2", "left"),
    "bert_padded": ("bert", "right"),
    "t5": ("t5", ""),
    "llama_padded": ("llama", "left"),
    "gemma2": ("gemma2", ""),
    "vit": ("vit", ""),
    "nano": ("nano", ""),
    "x_transformer": ("x_transformer", ""),
    "encoder_layer": ("encoder_layer", ""),
}
_DTYPES = {"f32": torch.float32, "i64": torch.int64, "b8": torch.bool}


def graph_text(model: nn.Module, given: Any) -> str:
    """The code of the one graph that dynamo makes of a model, with its inputs' shapes and without paths."""
    found: list[str] = []

    def keep(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        found.append(module.print_readable(print_output=False))
        return module.forward

    torch._dynamo.reset()
    torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(*given[0], **given[1])
    (text,) = found
    lines = [
        re.sub(r";\s+(\w+ = )+None$", "", line.partition("  # ")[0].rstrip()) for line in text.split("\n")
    ]
    body = [line[4:] for line in lines if line.strip() and not line.strip().startswith(("#", "class "))]
    # Names are as long as the modules are deep; what they are is their order and shape.
    names: dict[str, str] = {}
    whole = "\n".join(body)
    # print_readable gives inputs their short names in a line of its own for each.
    for short, name in re.findall(r"^    (\w+) = ([lLgG]_\w+)$", whole, flags=re.MULTILINE):
        whole = re.sub(rf"^    {short} = {name}\n", "", whole, flags=re.MULTILINE)
        whole = re.sub(rf"\b{short}\b", name, whole)
    for name in re.findall(r"\b[lLgG]_\w+", whole):
        names.setdefault(name, f"x{len(names)}")
    return re.sub(r"\b[lLgG]_\w+", lambda m: names[m[0]], whole) + "\n"


def made(name: str) -> str:
    """The text of a graph of `GRAPHS` as it is today."""
    model_name, padding = GRAPHS[name]
    torch.manual_seed(0)
    model = without_dropout(MODELS[model_name][0]()).train()
    return graph_text(model, arguments(model_name, LENGTH, padding))


def loaded(text: str) -> tuple[Callable[..., Any], list[Tensor]]:
    """The function of a kept text, and inputs for it."""
    place = {"torch": torch, "device": torch.device, "inf": math.inf, "math": math}
    exec(text, place)
    inputs = []
    for dtype, shape in re.findall(r'x\d+: "(\w+)\[([^\]]*)\]"', text.partition("):")[0]):
        sizes = [int(n) for n in shape.split(",") if n.strip()]
        kind = _DTYPES[dtype]
        if kind.is_floating_point:  # almost all of them are parameters
            inputs.append((torch.randn(sizes) * 0.1).requires_grad_())
        else:
            inputs.append(torch.ones(sizes, dtype=kind))

    def call(*given: Tensor) -> Any:
        return place["forward"](None, *given)  # type: ignore[operator]

    return call, inputs


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for graph in GRAPHS:
        (FOLDER / f"{graph}.txt").write_text(made(graph))
