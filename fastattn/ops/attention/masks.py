"""Attention masks as data: what may attend to what, in a form every backend can skip blocks by.

A mask is a conjunction of constraints. `causal()` and `key_padding()` name the structured ones, a bool
tensor is the general one, and `&` joins them:

>>> import torch, fastattn
>>> mask = fastattn.causal() & fastattn.key_padding(torch.tensor([3, 5]))
>>> mask.to_dense(batch=2, q_length=5, k_length=5).shape
torch.Size([2, 1, 5, 5])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

# Bits of `Mask.diagonal`: both may be set, then the tighter one holds.
TOP_LEFT: Final = 1
BOTTOM_RIGHT: Final = 2

Align = Literal["bottom_right", "top_left"]
_ALIGN: Final[dict[str, int]] = {"top_left": TOP_LEFT, "bottom_right": BOTTOM_RIGHT}


@dataclass(frozen=True, eq=False)
class Mask:
    """A conjunction of constraints; build one with `causal`, `key_padding`, a bool tensor, and `&`.

    Attributes:
        diagonal: bit set of `TOP_LEFT` and `BOTTOM_RIGHT`; 0 where the mask is not causal.
        lengths: int64 ``[B]``, keys ``j >= lengths[b]`` are masked, or None.
        dense: bool, broadcastable to ``[B, H, L_q, L_k]``, True = may attend, or None.
    """

    diagonal: int = 0
    lengths: Tensor | None = None
    dense: Tensor | None = None

    def __and__(self, other: Mask | Tensor) -> Mask:
        if not isinstance(other, (Mask, Tensor)):
            return NotImplemented
        other = as_mask(other)
        lengths, dense = self.lengths, self.dense
        if other.lengths is not None:
            if lengths is not None and lengths.shape != other.lengths.shape:
                raise ValueError(
                    f"key_padding(lengths) & key_padding(lengths): expected the same batch, "
                    f"got {list(lengths.shape)} and {list(other.lengths.shape)}"
                )
            lengths = other.lengths if lengths is None else torch.minimum(lengths, other.lengths)
        if other.dense is not None:
            dense = other.dense if dense is None else dense & other.dense
        return Mask(self.diagonal | other.diagonal, lengths, dense)

    __rand__ = __and__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """``mask & tensor`` under `torch.compile`, which takes an operator with a tensor to be torch's."""
        if func in (Tensor.__and__, Tensor.__rand__, Tensor.bitwise_and):
            return as_mask(args[0]) & as_mask(args[1])
        return NotImplemented

    def to_dense(
        self,
        *,
        batch: int,
        q_length: int,
        k_length: int,
        device: torch.device | str | None = None,
    ) -> Tensor | None:
        """The same mask as one bool tensor.

        Args:
            batch: B; checked against nothing, a mask without lengths keeps a batch size of 1.
            q_length: L_q.
            k_length: L_k.
            device: where to make it; the device of the mask's tensors if None.

        Returns:
            bool, broadcastable to ``[B, H, L_q, L_k]``, True = may attend; None for the empty conjunction.
        """
        if device is None:
            given = self.dense if self.dense is not None else self.lengths
            device = None if given is None else given.device
        keep = self.dense
        key = torch.arange(k_length, device=device)
        query = torch.arange(q_length, device=device)[:, None]
        if self.diagonal & TOP_LEFT:
            band = key <= query
            keep = band if keep is None else keep & band
        if self.diagonal & BOTTOM_RIGHT:
            band = key <= query + (k_length - q_length)
            keep = band if keep is None else keep & band
        if self.lengths is not None:
            real = key < self.lengths.view(-1, 1, 1, 1)
            keep = real if keep is None else keep & real
        if keep is not None and keep.dim() < 4:
            keep = keep[(None,) * (4 - keep.dim())]
        return keep


def causal(align: Align = "bottom_right") -> Mask:
    """A query attends to the keys at and before its own position.

    Args:
        align: which corner the diagonal ends in when L_q ≠ L_k. ``"bottom_right"`` (flash-attn): the last
            query sees the last key, query i sees keys ``j <= i + L_k - L_q``. ``"top_left"``
            (`torch.nn.functional.scaled_dot_product_attention`): the first query sees the first key,
            ``j <= i``. With L_q = L_k they are the same.

    Returns:
        A mask, to be passed as `fastattn.attention(..., mask=)` or joined with others by ``&``.

    Raises:
        ValueError: for another `align`.

    Example:
        >>> causal().to_dense(batch=1, q_length=2, k_length=3)[0, 0].int()
        tensor([[1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
        >>> causal("top_left").to_dense(batch=1, q_length=2, k_length=3)[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0]], dtype=torch.int32)
    """
    if align not in _ALIGN:
        raise ValueError(f"causal(align=): expected one of {sorted(_ALIGN)}, got {align!r}")
    return Mask(diagonal=_ALIGN[align])


def key_padding(lengths: Tensor) -> Mask:
    """Each sequence of the batch has its own number of keys; those behind it are padding.

    Args:
        lengths: integer tensor ``[B]``, 0 <= lengths <= L_k. On CPU, outside of `torch.compile` and `vmap`,
            `attention` raises for others; elsewhere, where reading them would stop the queue or break the
            graph, every backend takes the nearest that fits.

    Returns:
        A mask.

    Raises:
        TypeError: `lengths` is not an integer tensor.
        ValueError: `lengths` is not one-dimensional.

    Example:
        >>> key_padding(torch.tensor([1, 3])).to_dense(batch=2, q_length=1, k_length=3)[:, 0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"key_padding(lengths): expected an integer tensor, got {got}")
    if lengths.dim() != 1:
        raise ValueError(
            f"key_padding(lengths): expected shape [B], got {list(lengths.shape)}; "
            "a [B, L_k] bool tensor is a mask of its own: pass keep[:, None, None, :]"
        )
    return Mask(lengths=lengths.to(torch.int64))


def as_mask(mask: Any) -> Mask:
    """A `Mask` of what `fastattn.attention(mask=)` takes: a mask, a bool tensor or None.

    Raises:
        TypeError: not a mask, a bool tensor or None.
    """
    if mask is None:
        return Mask()
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask: expected a bool tensor (True = may attend), got {mask.dtype}; "
                "an additive float mask is passed as bias="
            )
        return Mask(dense=mask)
    hint = (
        "; masks are made by a call: mask=fastattn.causal()"
        if callable(mask) or isinstance(mask, str)
        else ""
    )
    raise TypeError(f"mask: expected a fastattn mask, a bool tensor or None, got {type(mask).__name__}{hint}")
