"""`fastattn.rotary`: checks what it is given, looks the angles up, rotates. Speaks to people."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fastattn.ops import choice
from fastattn.ops.rotary import library, reference

_GRADIENT_OF_TABLES: Final = "gradients of cos and sin, and maps over them, are the reference's"


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    start: int | Tensor = 0,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
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
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; the best that can if None. Gradients of cos and
            sin are the reference's, and so is float64.

    Returns:
        x rotated, in its shape and dtype; differentiable in x, cos and sin, any number of times. The
        arithmetic is in float32 or wider whatever the dtypes.

    Raises:
        ValueError: shapes, devices or options that do not fit; a position outside of [0, P), where reading
            positions is free (ints; tensors in CPU memory, outside of `torch.compile`). Elsewhere it is a
            RuntimeError on CPU, and a row of NaN from the `triton` backend.
        TypeError: dtypes that do not fit.
        NotImplementedError: the backend asked for can't run this.

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
        _check_positions(positions, x, start)
    elif isinstance(start, Tensor):
        count, letter = (x.shape[0], "B") if cu_seqlens is None else (cu_seqlens.shape[0] - 1, "N")
        _check_starts(start, count, letter)
    chosen = choice.choose(x, backend, _against(cos, sin))
    packed = x.dim() == 3
    index = _index(x, start, positions, cu_seqlens)
    if index is not None:
        index = index[None] if packed else index
        _check_range(index, cos.shape[0])
    elif not isinstance(start, Tensor) and (start < 0 or start + x.shape[2] > cos.shape[0]):
        raise ValueError(
            f"rotary: expected positions from 0 to {cos.shape[0] - 1} (cos has {cos.shape[0]} rows), "
            f"got start {start} and {x.shape[2]} of them"
        )
    if packed:
        x = x.transpose(0, 1)[None]
    if chosen == "reference":
        out = reference.rotary(x, *_look_up(cos, sin, index, start, x.shape[2]), interleaved)
    else:
        if cos.dtype != sin.dtype or cos.dtype == torch.float64:
            cos, sin = cos.float(), sin.float()
        first = 0 if index is not None else start
        out = library.rotary(x, cos, sin, index, first, interleaved, False, chosen)
    return out[0].transpose(0, 1) if packed else out


def _against(cos: Tensor, sin: Tensor) -> tuple[choice.Against, ...]:
    learned = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    if learned or _is_mapped(cos) or _is_mapped(sin):
        return tuple(choice.Against(name, _GRADIENT_OF_TABLES) for name in ("cpu", "triton"))
    return ()


def _is_mapped(x: Tensor) -> bool:
    """Whether `torch.vmap` maps over x."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(x)


def _index(
    x: Tensor, start: int | Tensor, positions: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor | None:
    """int64 positions ``[B or 1, L]`` (packed: ``[T]``); None where they are those from an int on."""
    if positions is not None:
        return positions.to(torch.int64)
    if cu_seqlens is not None:
        return _packed(x.shape[0], start, cu_seqlens)
    if isinstance(start, Tensor):
        return start.to(torch.int64)[:, None] + torch.arange(x.shape[2], device=x.device)
    return None


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


def _check_positions(positions: Tensor, x: Tensor, start: int | Tensor) -> None:
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


def _check_starts(start: Tensor, count: int, letter: str) -> None:
    if start.is_floating_point() or start.dtype == torch.bool:
        raise TypeError(f"rotary(start=): expected an int or an integer tensor, got {start.dtype}")
    if list(start.shape) != [count]:
        raise ValueError(f"rotary(start=): expected shape [{letter}] = [{count}], got {list(start.shape)}")


def _packed(total: int, start: int | Tensor, cu_seqlens: Tensor) -> Tensor:
    """int64 positions ``[T]`` of packed sequences; `UNTURNED` behind the last."""
    cu_seqlens = cu_seqlens.to(torch.int64)
    sequences = cu_seqlens.shape[0] - 1
    index = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True)
    inside = (index >= cu_seqlens[0]) & (sequence < sequences)
    position = index - cu_seqlens[sequence]
    if isinstance(start, Tensor):
        # One more for what is behind the last sequence.
        position = position + torch.nn.functional.pad(start.to(torch.int64), (0, 1))[sequence]
    else:
        position = position + start
    return torch.where(inside, position, library.UNTURNED)


def _check_range(index: Tensor, rows: int) -> None:
    """Raise where a position is outside of the tables and reading it is free."""
    if (
        torch.compiler.is_compiling()
        or type(index) is not Tensor
        or index.device.type != "cpu"
        or torch._C._are_functorch_transforms_active()  # mapped at any depth, it can't be read
        or not index.numel()
    ):
        return
    low, high = (int(x) for x in index.aminmax())
    if low == library.UNTURNED:
        index = torch.where(index == library.UNTURNED, 0, index)
        low, high = (int(x) for x in index.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(
            f"rotary: expected positions from 0 to {rows - 1} (cos has {rows} rows), got {low} to {high}"
        )


def _look_up(
    cos: Tensor, sin: Tensor, index: Tensor | None, start: int | Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[B or 1, 1, L, R / 2]``: an angle is that of all heads."""
    if index is None:
        cos, sin = (table[None, None, start : start + length] for table in (cos, sin))
        return cos, sin
    turned = (index != library.UNTURNED)[:, None, :, None]
    index = torch.where(index == library.UNTURNED, 0, index)
    cos, sin = cos[index][:, None], sin[index][:, None]
    return torch.where(turned, cos, 1), torch.where(turned, sin, 0)
