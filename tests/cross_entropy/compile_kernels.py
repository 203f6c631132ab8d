"""Compile the kernels for the GPU targets in argv, none of which is here; JSON of what became of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fastattn.ops.cross_entropy.triton.rows import cross_entropy_rows, kl_div_rows
from fastattn.testing.compiled import compile_kernels

ROWS, CLASSES = 4, 50257


def calls() -> None:
    """Each kind of launch: loss alone, loss and gradient, gradient alone, all options, distillation."""
    logits = torch.zeros(ROWS, CLASSES, dtype=torch.bfloat16)
    target, rows = torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS)
    plain, options = (-100, 0.0, 0.0, 0.0), (-100, 0.1, 30.0, 1e-4)
    cross_entropy_rows(logits, target, None, None, plain, rows, rows, None)
    cross_entropy_rows(logits, target, None, rows, plain, rows, rows, logits)
    cross_entropy_rows(logits, target, None, rows, plain, None, rows, logits)
    cross_entropy_rows(logits, target, torch.ones(CLASSES), rows, options, rows, rows, logits)
    kl_div_rows(logits.float(), logits.float(), rows, 2.0, rows, logits)


def main() -> None:
    found = []
    for target in sys.argv[1:]:
        found += [kernel._asdict() for kernel in compile_kernels(target, calls)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
