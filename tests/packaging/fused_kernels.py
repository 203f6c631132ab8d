"""Compile the kernels of the fused operations for the GPU targets in argv; JSON of the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fastattn.ops.adamw.triton import step
from fastattn.ops.embedding.triton import embedding, gradient
from fastattn.ops.layer_norm.triton import backward, forward
from fastattn.ops.linear.epilogues import ACTIVATE, GATE_SLOPE, SLOPE
from fastattn.ops.linear.triton import gemm
from fastattn.ops.mlp.triton.dropout import dropout_add
from fastattn.ops.rotary.triton import rotary
from fastattn.testing.compiled import compile_kernels


def calls() -> None:
    """Each kind of launch."""
    ids, seed = torch.zeros(6, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        x, angles = torch.zeros(1, 5, 40, 80, dtype=dtype), torch.zeros(50, 32)
        for interleaved in (False, True):
            rotary(x, angles, angles, None, 3, interleaved, False)
        table = torch.zeros(9, 768, dtype=dtype)
        embedding(ids, table, table, ids[:3], seed, 0.1)
        gradient(table[:6], ids, 9, seed, 0.1, -1)
        tensors = [torch.zeros(5000, dtype=dtype)]
        step(tensors, tensors, tensors, tensors, [torch.ones(())], 1e-3, (0.9, 0.99), 1e-8, 0.1, 0.5)

    wide, weight = torch.zeros(128, 768).bfloat16(), torch.zeros(3072, 768).bfloat16()
    out, u, h, d = (torch.zeros(128, 3072).bfloat16() for _ in range(4))
    gemm(wide, weight.t(), out, bias=torch.zeros(3072).bfloat16(), epilogue=ACTIVATE, activation=1, u=u)
    gemm(wide, weight.t(), out, epilogue=SLOPE, activation=0, u=u, h=h)
    gemm(wide, weight.t(), out, epilogue=GATE_SLOPE, activation=2, u=u, gate=u, h=h, d=d)
    dropout_add(wide, wide, seed, 0.1, wide)
    ones = torch.ones(768)
    _, z, mean, rstd = forward(wide, wide, ones, ones, seed, 0.1, 1e-5, 0.0, False, torch.float32)
    backward(wide, z, z, ones, mean, rstd, seed, 0.1, 0.0, False, 15)


def main() -> None:
    found = [kernel._asdict() for target in sys.argv[1:] for kernel in compile_kernels(target, calls)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
