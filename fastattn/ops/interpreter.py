"""Triton's interpreter, which runs kernels on CPU tensors: how to tell, and the mending of its bf16 products.

Set TRITON_INTERPRET=1 before triton is imported. The kernels then run in NumPy, one program after another.
"""

from __future__ import annotations

from typing import Any

import triton


def interpreted() -> bool:
    """Whether kernels run in the interpreter."""
    return bool(triton.knobs.runtime.interpret)


def mend() -> None:
    """Make `tl.dot` of bfloat16 right: the interpreter multiplies the bit patterns (triton issue 11584)."""
    import numpy as np  # noqa: PLC0415 - a kernel on a GPU needs none of this
    import triton.language as tl  # noqa: PLC0415
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: PLC0415

    dot = InterpreterBuilder.create_dot
    if getattr(dot, "bfloat16_is_right", False):
        return

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16 or x.data.dtype != np.uint16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    create_dot.bfloat16_is_right = True  # type: ignore[attr-defined]
    InterpreterBuilder.create_dot = create_dot
