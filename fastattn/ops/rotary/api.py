"""`fastattn.rotary`: checks what it is given, looks the angles up, rotates. Speaks to people."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.rotary import reference


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    start: int | Tensor = 0,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Rotary position embedding: pairs of dimensions turned by an angle that grows with the position.

    Args:
        x: queries or keys ``[B, H, L, D]``, or packed ones ``[T, H, D]`` with `cu_seqlens` or `positions`; of
            any floating dtype.
        cos: ``[P, R / 2]``, cosines of the angles of positions 0 to P - 1. R <= D dimensions are rotated, the
            rest passes through.
        sin: the same of the sines.
        interleaved: the pairs are the dimensions (0, 1), (2, 3), … (GPT-J); else (0, R/2), (1, R/2 + 1), …
            (GPT-NeoX, Llama).
        start: position of the first one of each sequence: an int, or an integer tensor ``[B]`` (packed:
            ``[N]``).
        positions: instead of `start` and `cu_seqlens`, the position of each one: an integer tensor ``[B, L]``
            or ``[1, L]`` (packed: ``[T]``).
        cu_seqlens: integer tensor ``[N + 1]``: packed sequence n is from ``cu_seqlens[n]`` to before
            ``cu_seqlens[n + 1]``. What is behind the last sequence is returned as it is.

    Returns:
        x rotated, in its shape and dtype; differentiable in x, cos and sin. The arithmetic is in float32 or
        wider whatever the dtypes.

    Raises:
        ValueError: shapes, devices or options that do not fit; a position outside of [0, P), where reading
            positions is free (ints; tensors in CPU memory, outside of `torch.compile`).
        TypeError: dtypes that do not fit.

    Source: Su et al., "RoFormer", 2021 (arXiv 2104.09864), equation 34.

    Example:
        >>> import torch, fastattn
        >>> angle = torch.arange(16.0)[:, None] * 10_000 ** -torch.linspace(0, 1, 5)[:4]
        >>> q = torch.randn(2, 3, 7, 8)
        >>> turned = fastattn.rotary(q, angle.cos(), angle.sin(), start=torch.tensor([0, 9]))
        >>> torch.equal(turned[0, :, 0], q[0, :, 0])  # position 0
        True
    """
    _check(x, cos, sin, positions, cu_seqlens)
    if positions is not None:
        if isinstance(start, Tensor) or start != 0:
            raise ValueError("rotary: expected start or positions, and not both")
        rows = ("L", x.shape[2]) if x.dim() == 4 else ("T", x.shape[0])
        if positions.dim() != x.dim() - 2 or positions.shape[-1] != rows[1]:
            raise ValueError(
                f"rotary(positions=): expected {'[B or 1, L]' if x.dim() == 4 else '[T]'} with "
                f"{rows[0]} = {rows[1]}, got {list(positions.shape)}"
            )
        if x.dim() == 4 and positions.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"rotary(positions=): expected a batch of {x.shape[0]} or 1, got {positions.shape[0]}"
            )
        cos, sin = _look_up(cos, sin, positions.to(torch.int64))
    elif cu_seqlens is not None:
        cos, sin = _packed(x.shape[0], cos, sin, start, cu_seqlens)
    elif isinstance(start, Tensor):
        _check_starts(start, x.shape[0], "B")
        index = start.to(torch.int64)[:, None] + torch.arange(x.shape[2], device=x.device)
        cos, sin = _look_up(cos, sin, index)
    else:
        if start < 0 or start + x.shape[2] > cos.shape[0]:
            raise ValueError(
                f"rotary: expected positions from 0 to {cos.shape[0] - 1} (cos has {cos.shape[0]} rows), "
                f"got start {start} and {x.shape[2]} of them"
            )
        cos, sin = (table[None, start : start + x.shape[2]] for table in (cos, sin))
    # One axis more: an angle is that of all heads.
    return reference.rotary(x, cos.unsqueeze(1), sin.unsqueeze(1), interleaved)


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> None:
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"rotary({name}): expected a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"rotary({name}): expected a floating dtype, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"rotary({name}): expected x's device {x.device}, got {tensor.device}")
    for name, index in (("positions", positions), ("cu_seqlens", cu_seqlens)):
        if index is not None:
            _check_integers(f"rotary({name}=)", index, x.device)
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            "rotary: expected cos and sin of one shape [P, R / 2], "
            f"got {list(cos.shape)} and {list(sin.shape)}"
        )
    if cu_seqlens is not None:
        if positions is not None:
            raise ValueError("rotary: expected cu_seqlens or positions, and not both")
        if x.dim() != 3 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(
                "rotary: expected cu_seqlens [N + 1] with x [T, H, D], "
                f"got {list(cu_seqlens.shape)} with {list(x.shape)}"
            )
    elif x.dim() != 4 and (x.dim() != 3 or positions is None):
        raise ValueError(
            "rotary(x): expected [B, H, L, D], or [T, H, D] with cu_seqlens or positions, "
            f"got {list(x.shape)}"
        )
    if not 1 <= cos.shape[1] <= x.shape[-1] // 2:
        raise ValueError(
            f"rotary(cos): expected 1 to {x.shape[-1] // 2} columns (half of x's head_dim {x.shape[-1]}), "
            f"got {cos.shape[1]}"
        )


def _check_integers(name: str, x: Tensor, device: torch.device) -> None:
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected an integer tensor, got {got}")
    if x.device != device:
        raise ValueError(f"{name}: expected x's device {device}, got {x.device}")


def _check_starts(start: Tensor, count: int, letter: str) -> None:
    if start.is_floating_point() or start.dtype == torch.bool:
        raise TypeError(f"rotary(start=): expected an int or an integer tensor, got {start.dtype}")
    if list(start.shape) != [count]:
        raise ValueError(f"rotary(start=): expected shape [{letter}] = [{count}], got {list(start.shape)}")


def _packed(
    total: int, cos: Tensor, sin: Tensor, start: int | Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[T, R / 2]`` of packed sequences; 1 and 0 behind the last."""
    cu_seqlens = cu_seqlens.to(torch.int64)
    sequences = cu_seqlens.shape[0] - 1
    if isinstance(start, Tensor):
        _check_starts(start, sequences, "N")
    index = torch.arange(total, device=cos.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
    inside = (index >= cu_seqlens[0]) & (sequence < sequences)
    position = index - cu_seqlens[sequence]
    if isinstance(start, Tensor):
        # One more for what is behind the last sequence.
        position = position + torch.nn.functional.pad(start.to(torch.int64), (0, 1))[sequence]
    else:
        position = position + start
    cos, sin = _look_up(cos, sin, torch.where(inside, position, 0))
    return torch.where(inside[:, None], cos, 1), torch.where(inside[:, None], sin, 0)


def _look_up(cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    if (
        not torch.compiler.is_compiling()
        and type(positions) is Tensor
        and positions.device.type == "cpu"
        and not torch._C._functorch.is_batchedtensor(positions)
        and positions.numel()
    ):
        low, high = (int(x) for x in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(
                f"rotary: expected positions from 0 to {cos.shape[0] - 1} (cos has {cos.shape[0]} rows), "
                f"got {low} to {high}"
            )
    return cos[positions], sin[positions]
