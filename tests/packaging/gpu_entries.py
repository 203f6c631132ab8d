"""What the GPU kernels are compiled for ahead of time, and a process that compiles it.

python tests/packaging/gpu_entries.py            # names on stdin, one JSON line each on stdout
python tests/packaging/gpu_entries.py baseline   # write what the kernels are now to gpu_static.json
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BASELINE = Path(__file__).with_name("gpu_static.json")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# What changes the code of a kernel, each with the causal mask unless it is a mask itself.
FEATURES = {
    "dropout": ("dropout", "causal"),
    "softcap": ("softcap", "causal"),
    "bias": ("bias-1HQK", "causal"),
    "alibi": ("alibi", "causal"),
    "documents": ("documents-causal",),
    "blocks": ("block-sparse-causal",),
    "dense-mask": ("dense-mask",),
    "window": ("window",),
    "sinks": ("sinks", "causal"),
    "union": ("blocks-or-window",),
}


class Entry(NamedTuple):
    """One call of the host code: the kernel of this name, and those that are launched with it."""

    kernel: str
    target: str
    dim: int
    dtype: str = "bfloat16"
    feature: str = "causal"
    kv_heads: int = 4
    v_dim: int = 0

    @property
    def name(self) -> str:
        words = [
            self.kernel,
            self.feature,
            self.dtype,
            f"d{self.dim}" + (f"-{self.v_dim}" if self.v_dim else ""),
        ]
        return " ".join([*words, *["gqa"] * (self.kv_heads != 4), self.target])


def entries() -> Iterator[Entry]:
    for target in TARGETS:
        for dim in (64, 128, 256):
            yield Entry("forward", target, dim)
            yield Entry("dkdv", target, dim)
        yield Entry("decode", target, 128, kv_heads=1)
    for feature in FEATURES:
        yield Entry("forward", "sm_90", 64, feature=feature)
        yield Entry("dkdv", "sm_90", 64, feature=feature)
    for target in ("sm_80", "sm_100", "gfx942"):
        for feature in ("dropout", "alibi", "dense-mask"):
            yield Entry("forward", target, 64, feature=feature)
    for target in ("sm_80", "sm_90"):
        yield Entry("bias", target, 64, feature="bias")
        yield Entry("relative", target, 64, feature="alibi")
        for dtype in ("float16", "float32"):
            yield Entry("forward", target, 64, dtype)
            yield Entry("dkdv", target, 64, dtype)
        yield Entry("decode", target, 64)
        yield Entry("forward", target, 80, v_dim=96)
        yield Entry("dkdv", target, 80, v_dim=96)
        yield Entry("forward", target, 512)
    yield Entry("dkdv", "sm_90", 512)
    for target in ("sm_80", "sm_90"):
        yield Entry("dkdv", target, 64, kv_heads=1)


ENTRIES = {entry.name: entry for entry in entries()}


def compiled(entry: Entry) -> list[dict[str, Any]]:
    """The facts of each kernel that the entry's call launches."""
    import torch

    from fastattn.testing.cases import Sizes, options_of
    from fastattn.testing.compiled import compile_kernels
    from fastattn.tune.calls import call

    length = 1 if entry.kernel == "decode" else 512
    sizes = Sizes(2, 4, entry.kv_heads, length, 512, entry.dim, entry.v_dim or entry.dim)
    names = FEATURES.get(entry.feature, ("causal",))
    launch = call(
        entry.kernel, sizes, getattr(torch, entry.dtype), options_of(names, sizes), torch.device("cpu")
    )
    return [kernel._asdict() for kernel in compile_kernels(entry.target, launch)]


def sizes_of(kernels: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Registers and instructions of each kernel, the largest where several are compiled of one function."""
    found: dict[str, list[int]] = {}
    for kernel in kernels:
        before = found.get(kernel["name"], [0, 0])
        found[kernel["name"]] = [
            max(before[0], kernel["registers"]),
            max(before[1], kernel["instructions"]),
        ]
    return found


def baseline() -> dict[str, dict[str, dict[str, list[int]]]]:
    """By version of Triton, entry and kernel: registers and instructions."""
    found: dict[str, dict[str, dict[str, list[int]]]] = json.loads(BASELINE.read_text())
    return found


def _write_baseline() -> None:
    import triton

    numbers = {}
    for name, entry in ENTRIES.items():
        numbers[name] = sizes_of(compiled(entry))
        print(name, numbers[name], flush=True)
    versions = baseline() if BASELINE.exists() else {}
    versions[triton.__version__] = numbers
    BASELINE.write_text(_as_text(versions))


def _as_text(versions: dict[str, dict[str, dict[str, list[int]]]]) -> str:
    """JSON with a line for each entry."""
    blocks = []
    for version, numbers in sorted(versions.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(numbers[name])}" for name in sorted(numbers))
        blocks.append(f" {json.dumps(version)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    os.environ.pop("TRITON_INTERPRET", None)
    if sys.argv[1:] == ["baseline"]:
        _write_baseline()
        return
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"kernels": compiled(ENTRIES[line.strip()])}
        except Exception as error:  # it is the test's to judge
            while error.__cause__ is not None and isinstance(error.__cause__, Exception):
                error = error.__cause__
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
