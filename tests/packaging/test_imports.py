"""What importing fastattn imports, and who may import whom."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fastattn"

COLD_IMPORT = """
import json, sys, torch
before = set(sys.modules)
import fastattn
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_cold_import() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COLD_IMPORT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    new = json.loads(done.stdout)
    assert "fastattn" in new
    roots = {name.partition(".")[0] for name in new}
    assert roots - sys.stdlib_module_names <= {"fastattn", "torch"}
    heavy = ("torch._inductor", "torch._dynamo.convert_frame", "torch.distributed.tensor")
    assert not [name for name in new if name.startswith(heavy)]
    # The kernels and what trains wait until they are called for.
    late = ("fastattn.ops.attention.cpu", "fastattn.ops.attention.triton", "fastattn.gpt2", "fastattn.cli")
    late += ("fastattn.gpu_check", "fastattn.testing", "triton")
    assert not [name for name in new if name.startswith(late)]
    assert done.stderr == ""


FLOPS = """
{first}
{second}
import sys, torch
from torch.utils.flop_counter import flop_registry
for name in ("attention_forward", "attention_backward", "attention_decode"):
    assert getattr(torch.ops.fastattn, name) in flop_registry, name
assert not [finder for finder in sys.meta_path if "fastattn" in type(finder).__module__]
"""


@pytest.mark.parametrize("counter_first", [False, True])
def test_the_flop_counter_knows_the_ops_whichever_is_imported_first(counter_first: bool) -> None:
    both = ["import fastattn", "import torch.utils.flop_counter"]
    first, second = reversed(both) if counter_first else both
    code = FLOPS.format(first=first, second=second)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)


# The rooms of the package, and for each the rooms it may import from besides itself.
MATHEMATICS = {
    "ops.once",
    "ops.activations",
    "ops.choice",
    "ops.constraints",
    "ops.masks",
    "ops.biases",
    "ops.philox",
    "ops.problem",
    "ops.weights",
    "ops.statistics",
    "ops.merge",
}
SPEAKS_TO_PEOPLE = {"fastattn", "ops", "ops.api", "ops.kv_cache", "ops.varlen", "nn", *MATHEMATICS}
KERNELS_MAY = {
    "_backends",
    "ops.chunks",
    "ops.composed",
    "ops.gradients",
    "ops.epilogues",
    "ops.library",
    "ops.measured",
    "ops.targets",
    *MATHEMATICS,
}
MAY_IMPORT = {
    "_build": set(),
    "_backends": {"_build"},
    "ops.constraints": set(),
    "ops.masks": {"ops.constraints"},
    "ops.biases": {"ops.constraints", "ops.masks"},
    "ops.philox": set(),
    "ops.choice": {"_backends"},
    "ops.flops": set(),
    "ops.explain": {"ops", "ops.choice"},
    "ops.activations": set(),
    "ops.gpu": set(),
    "ops.once": set(),
    "ops.interpreter": set(),
    "ops.measured": {"_backends"},
    "ops.epilogues": set(),
    "ops.composed": {"ops.epilogues", "ops.gradients", "ops.library", *MATHEMATICS},
    "ops.gradients": {"ops.library"},
    "ops.merge": set(),
    "ops.targets": set(),
    "ops.chunks": {"ops.library"},
    "ops.problem": {"ops.constraints", "ops.masks", "ops.biases"},
    "ops.checks": {"ops.constraints", "ops.masks", "ops.biases"},
    "ops.weights": {"ops.choice", "ops.masks", "ops.biases", "ops.philox"},
    "ops.statistics": {"ops.api", "ops.checks", *MATHEMATICS},
    "ops.reference": MATHEMATICS,
    "ops.library": {"ops.flops", *MATHEMATICS},
    "ops.cpu": KERNELS_MAY,
    "ops.triton": {"ops.gpu", "ops.interpreter", *KERNELS_MAY},
    "ops.hopper": {"_backends", "ops.library", *MATHEMATICS},
    "ops.api": {
        "_backends",
        "ops.checks",
        "ops.varlen",
        "ops.library",
        "ops.measured",
        "ops.reference",
        *MATHEMATICS,
    },
    "ops.varlen": {"ops.api", *MATHEMATICS},
    "ops.float8": {"_backends", "ops.api", "ops.checks", "ops.library", "ops.reference", *MATHEMATICS},
    "ops.kv_cache": {
        "_backends",
        "ops",
        "ops.api",
        "ops.checks",
        "ops.flops",
        "ops.library",
        "ops.reference",
        *MATHEMATICS,
    },
    "ops": {"ops.api", "ops.float8", "ops.varlen", "ops.kv_cache", *MATHEMATICS},
    "nn": {"ops", "ops.api", *MATHEMATICS},
    "optim": {"ops", "ops.api", *MATHEMATICS},
    "fastattn": {
        "ops",
        "ops.choice",
        "ops.explain",
        "nn",
        "optim",
        "integrations",
        "compiler",
        "distributed",
    },
    "integrations": {*SPEAKS_TO_PEOPLE},
    "compiler": {*SPEAKS_TO_PEOPLE},
    "distributed": {*SPEAKS_TO_PEOPLE},
    "testing": {"_backends", "ops.reference", "ops.triton", *SPEAKS_TO_PEOPLE},
    "machine": {*SPEAKS_TO_PEOPLE},
    "gpu_check": {"gpt2", "integrations", "machine", "testing", *SPEAKS_TO_PEOPLE},
    "tune": {"_backends", "ops.library", "ops.triton", "testing", *SPEAKS_TO_PEOPLE},
    "gpt2": {
        "_build",
        "cli",
        "machine",
        "optim",
        "integrations",
        "compiler",
        "distributed",
        *SPEAKS_TO_PEOPLE,
    },
    "report": {"gpt2"},
    "cli": {"_backends", "_build", "gpt2", "gpu_check", "report", "tune", *SPEAKS_TO_PEOPLE},
    "__main__": {"cli"},
}
BACKENDS = {"ops.reference", "ops.cpu", "ops.triton", "ops.hopper"}


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


MODULES = dict(modules())


def room(module: str) -> str:
    """`fastattn.ops.attention.triton.forward` -> `ops.triton`; `fastattn.nn.multihead` -> `nn`."""
    parts = module.split(".")[1:]
    if not parts:
        return "fastattn"
    if parts[0] == "ops":
        if len(parts) > 2:
            return f"ops.{parts[2]}"
        # What operations share is a room of its own each; an operation's __init__ is that of all operations.
        return f"ops.{parts[1]}" if len(parts) > 1 and MODULES[module].name != "__init__.py" else "ops"
    return parts[0]


def imported(module: str, tree: ast.AST) -> Iterator[str]:
    """The modules of ours that `module` imports, wherever in it, as full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "fastattn")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: expected an absolute import"
            source = node.module or ""
            if source.partition(".")[0] == "fastattn":
                for alias in node.names:
                    inner = f"{source}.{alias.name}"
                    yield inner if inner in MODULES else source


@pytest.mark.parametrize("module", sorted(MODULES))
def test_arrows_point_one_way(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    here = room(module)
    assert here in MAY_IMPORT, f"{module}: a new room; say in this test whom it may import"
    allowed = MAY_IMPORT[here] | {here}
    wrong = sorted({name for name in imported(module, tree) if room(name) not in allowed})
    assert not wrong, f"{module} may import from {sorted(allowed)}, not {wrong}"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if room(name) == "ops.library"))
def test_backends_are_imported_lazily(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assert not [name for name in imported(module, tree) if room(name) in BACKENDS]
