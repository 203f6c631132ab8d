"""Choose the C++ kernels' instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastattn import _backends


def present_isas() -> list[str]:
    """Instruction sets the C++ library has and this CPU can run, slowest first; empty without a library.

    Example:
        >>> set(present_isas()) <= {"scalar", "avx2", "avx512", "wide"}
        True
    """
    return [] if _backends.unavailable("cpu") else list(_backends.isas_present())


@contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Run the `cpu` backend's kernels on one instruction set inside.

    Args:
        name: one of `present_isas()`.

    Raises:
        ValueError: it is not one of them.
    """
    before = _backends.isa_override
    _backends.isa_override = name
    try:
        _backends.cpu_isa()
        yield
    finally:
        _backends.isa_override = before
