"""`fastattn.explain`: which backend an operation would run, and why the others would not."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.ops import attention, choice


def explain(*args: Any, **options: Any) -> choice.Explanation:
    """Which backend an operation would run with these arguments, and why the others would not.

    Args:
        args, options: an operation of this package and its arguments, as in ``explain(fastattn.layer_norm, x,
            (768,))``; without the operation those of `attention`. Nothing is computed.

    Returns:
        An `Explanation`; printing it gives a line for each backend.

    Raises:
        ValueError, TypeError: for arguments no backend takes, as the operation does.

    Example:
        >>> import torch, fastattn
        >>> q = torch.randn(1, 2, 5, 8, dtype=torch.float64)
        >>> fastattn.explain(q, q, q).backend
        'reference'
    """
    if args and callable(args[0]) and not isinstance(args[0], Tensor):
        return choice.explain(*args, **options)
    if not isinstance(args[0] if args else options.get("q"), Tensor):
        got = type(args[0]).__name__ if args else "nothing"
        raise TypeError(f"explain: expected q, k and v, or an operation and its arguments, got {got}")
    return attention.explain(*args, **options)
