"""Attention by Triton's kernels: NVIDIA's sm_80 and newer, and AMD; CPU tensors in Triton's interpreter."""

from fastattn.ops.interpreter import interpreted, mend

if interpreted():
    mend()

from fastattn.ops.attention.triton.backward import backward
from fastattn.ops.attention.triton.decode import decode
from fastattn.ops.attention.triton.forward import forward, forward_float8

__all__ = ["backward", "decode", "forward", "forward_float8"]
