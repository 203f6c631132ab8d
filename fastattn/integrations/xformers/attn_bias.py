"""Attention biases with the names, constructors and methods of ``xformers.ops.fmha.attn_bias``.

For code that is written for xformers to run where it is not installed. Tensors are made on the device given,
CPU if none; attention takes them along to the device of its query.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from fastattn.integrations.xformers.structure import structure, tensor_of

Device = torch.device | str | None


class AttentionBias:
    """What `memory_efficient_attention` takes as its attn_bias besides a tensor."""

    def to(self, device: Device) -> Any:
        """The same bias with its tensors on `device`."""
        return self

    def materialize(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Tensor:
        """The tensor it stands for, to be added to the scores: 0 and -inf, and its own tensor.

        Args:
            shape: ``[..., L_q, L_k]``.
            dtype: of the tensor.
            device: of the tensor.

        Example:
            >>> LowerTriangularMask().materialize((2, 3))
            tensor([[0., -inf, -inf],
                    [0., 0., -inf]])
        """
        q_length, k_length = shape[-2:]
        mask = structure(self, q_length, k_length).to(device or "cpu")
        keep = mask.to_dense(batch=1, q_length=q_length, k_length=k_length, device=device)
        assert keep is not None
        out = torch.zeros(shape, dtype=dtype, device=device).masked_fill(~keep[0, 0], float("-inf"))
        bias = tensor_of(self)
        return out if bias is None else out + bias.to(device)


class LowerTriangularMask(AttentionBias):
    """Causal from the top left: query i attends to keys ``j <= i``."""

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        """The same, and `bias` added to the scores."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causal from the top left, and a tensor added to the scores.

    Args:
        bias: ``[B, H, L_q, L_k]``.
    """

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias

    def to(self, device: Device) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(self._bias.to(device))


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal from the bottom right: the last query attends to the last key."""

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        """The same, to the last `window_size` keys alone."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Causal from the bottom right, to the last `_window_size` keys alone."""

    _window_size: int

    def __post_init__(self) -> None:
        _check_window(self._window_size)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """A window from `window_left` keys before to `window_right` behind, from the bottom right."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        for name in ("window_left", "window_right"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")


@dataclass
class SeqLenInfo:
    """A dimension divided into blocks.

    Attributes:
        seqstart: int32 ``[N + 1]``, where each block starts and the last ends.
        max_seqlen, min_seqlen: of the longest and the shortest block.
        seqstart_py: `seqstart` as a list.
    """

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    def to(self, device: Device) -> Any:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in own.items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    def intervals(self) -> Iterator[tuple[int, int]]:
        """First element of each block, and the first behind it."""
        yield from pairwise(self.seqstart_py)

    @classmethod
    def from_seqlens(cls, seqlens: Sequence[int], *, device: Device = None) -> SeqLenInfo:
        starts = [0, *accumulate(seqlens)]
        return SeqLenInfo(_int32(starts, device), max(seqlens), min(seqlens), starts)

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """``[1, M, ...]`` as a list of ``[batch_size, M_i, ...]``."""
        if x.shape[:2] != (1, self.seqstart_py[-1]):
            raise ValueError(f"split: expected [1, {self.seqstart_py[-1]}, ...], got {list(x.shape)}")
        sizes = [1] * (len(self.seqstart_py) - 1) if batch_sizes is None else list(batch_sizes)
        bounds = [self.seqstart_py[n] for n in (0, *accumulate(sizes))]
        parts = x.split([b - a for a, b in pairwise(bounds)], dim=1)
        return [part.reshape(n, -1, *x.shape[2:]) for n, part in zip(sizes, parts, strict=True)]


@dataclass
class GappySeqLenInfo(SeqLenInfo):
    """Blocks with elements between them that are not in use.

    Attributes:
        seqlen: int32 ``[N]``, elements of each block.
        seqlen_py: `seqlen` as a list.
        padding: elements from one block's start to the next one's, where these are alike.
    """

    seqlen: Tensor
    seqlen_py: list[int]
    padding: int | None = None

    def intervals(self) -> Iterator[tuple[int, int]]:
        for start, size in zip(self.seqstart_py, self.seqlen_py, strict=False):
            yield start, start + size

    @classmethod
    def from_starts(
        cls, starts: Sequence[int], seqlens: Sequence[int], padding: int | None, device: Device
    ) -> GappySeqLenInfo:
        if len(starts) != len(seqlens) + 1:
            raise ValueError(
                f"seqstarts: expected one more than the {len(seqlens)} lengths, the last the end of all, "
                f"got {len(starts)}"
            )
        return GappySeqLenInfo(
            _int32(starts, device),
            max(seqlens),
            min(seqlens),
            list(starts),
            _int32(seqlens, device),
            list(seqlens),
            padding,
        )

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        raise NotImplementedError("split: expected blocks without gaps; slice the tensor by intervals()")


@dataclass
class _Blocks(AttentionBias):
    """Query block i attends to key block i."""

    q_seqinfo: Any
    k_seqinfo: Any

    def to(self, device: Device) -> Any:
        return replace(self, q_seqinfo=self.q_seqinfo.to(device), k_seqinfo=self.k_seqinfo.to(device))


@dataclass
class BlockDiagonalMask(_Blocks):
    """Sequences packed behind one another: each query attends to the keys of its own.

    Example:
        >>> mask = BlockDiagonalMask.from_seqlens([1, 2])
        >>> mask.materialize((3, 3)).exp().int()
        tensor([[1, 0, 0],
                [0, 1, 1],
                [0, 1, 1]], dtype=torch.int32)
    """

    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: Device = None
    ) -> Any:
        """From the lengths of the sequences' queries, and of their keys where these are others."""
        q_seqinfo = SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is None or list(kv_seqlen) == list(q_seqlen):
            return cls(q_seqinfo, q_seqinfo)
        _check_same_number(q_seqlen, kv_seqlen)
        return cls(q_seqinfo, SeqLenInfo.from_seqlens(kv_seqlen, device=device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[Any, Tensor]:
        """From tensors ``[B_i, M_i, ...]``; also returns them packed, ``[1, sum(B_i · M_i), ...]``."""
        mask = cls.from_seqlens(_lengths(tensors), device=tensors[0].device)
        mask._batch_sizes = [x.shape[0] for x in tensors]
        return mask, _pack(tensors)

    @classmethod
    def from_tensor_lists_qkv(
        cls,
        tensors_q: Sequence[Tensor],
        tensors_k: Sequence[Tensor],
        tensors_v: Sequence[Tensor] | None = None,
    ) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """As `from_tensor_list`, of queries, keys and values of lengths of their own."""
        for name, tensors in (("tensors_k", tensors_k), ("tensors_v", tensors_v)):
            if tensors is not None and [x.shape[0] for x in tensors] != [x.shape[0] for x in tensors_q]:
                raise ValueError(f"{name}: expected the batch sizes of tensors_q, one tensor for each")
        if tensors_v is not None and _lengths(tensors_v) != _lengths(tensors_k):
            raise ValueError("tensors_v: expected the lengths of tensors_k")
        mask = cls.from_seqlens(_lengths(tensors_q), _lengths(tensors_k), device=tensors_q[0].device)
        mask._batch_sizes = [x.shape[0] for x in tensors_q]
        return mask, _pack(tensors_q), _pack(tensors_k), None if tensors_v is None else _pack(tensors_v)

    def split_queries(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of `from_tensor_list` for queries and outputs."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)  # type: ignore[no-any-return]

    def split_kv(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of `from_tensor_list` for keys and values."""
        return self.k_seqinfo.split(tensor, self._batch_sizes)  # type: ignore[no-any-return]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of `from_tensor_list`."""
        if self.q_seqinfo.seqstart_py != self.k_seqinfo.seqstart_py:
            raise ValueError(
                "split: expected queries and keys of the same lengths; see split_queries, split_kv"
            )
        return self.split_queries(tensor)

    def make_causal(self) -> BlockDiagonalCausalMask:
        """The same, causal from the top left of each block."""
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        """The same, causal from the bottom right of each block."""
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        """The same, causal from the top left of each block, to the last `window_size` keys alone."""
        own = (self.q_seqinfo, self.k_seqinfo, self._batch_sizes)
        return BlockDiagonalCausalLocalAttentionMask(*own, window_size)

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        """The same, causal from the bottom right of each block, to the last `window_size` keys alone."""
        own = (self.q_seqinfo, self.k_seqinfo, self._batch_sizes)
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(*own, window_size)


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """`BlockDiagonalMask`, causal from the top left of each block."""


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """`BlockDiagonalMask`, causal from the bottom right of each block; with no fewer keys than queries."""

    def __post_init__(self) -> None:
        blocks = zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True)
        for i, ((q_start, q_end), (k_start, k_end)) in enumerate(blocks):
            if k_end - k_start < q_end - q_start:
                raise ValueError(
                    f"block {i}: expected as many keys as queries or more, "
                    f"got {k_end - k_start} keys and {q_end - q_start} queries"
                )


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """`BlockDiagonalCausalMask`, to the last `_window_size` keys alone."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        _check_window(self._window_size)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """`BlockDiagonalCausalFromBottomRightMask`, to the last `_window_size` keys alone."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_window(self._window_size)


@dataclass
class BlockDiagonalPaddedKeysMask(_Blocks):
    """`BlockDiagonalMask` whose blocks have room for more keys than are used, the first of each."""

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,
        *,
        device: Device = None,
    ) -> Any:
        """From the lengths of queries and keys, and the room for keys; `causal_diagonal` is unused."""
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, device))

    def make_local_attention(
        self, window_left: int, window_right: int
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        """The same, to a window from the bottom right of each block."""
        own = (self.q_seqinfo, self.k_seqinfo)
        return BlockDiagonalLocalAttentionPaddedKeysMask(*own, window_left, window_right)


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """`BlockDiagonalPaddedKeysMask`, causal from the bottom right of each block."""

    causal_diagonal: Any = field(default=None, repr=False)


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """`BlockDiagonalPaddedKeysMask`, to a window from the bottom right of each block."""

    window_left: int
    window_right: int

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        """From lengths and room as `from_seqlens`, and the window."""
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, None), window_left, window_right)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """`BlockDiagonalCausalWithOffsetPaddedKeysMask`, to the last `_window_size` keys alone."""

    _window_size: int

    def __post_init__(self) -> None:
        _check_window(self._window_size)

    @classmethod
    def from_seqlens_local(
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], window_size: int
    ) -> BlockDiagonalCausalLocalAttentionPaddedKeysMask:
        """From lengths and room as `from_seqlens`, and the window."""
        return cls(*_padded(q_seqlen, kv_padding, kv_seqlen, None), window_size)


@dataclass
class BlockDiagonalGappyKeysMask(_Blocks):
    """`BlockDiagonalMask` whose blocks of keys begin anywhere, one behind the other."""

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqstarts: Sequence[int],
        kv_seqlen: Sequence[int],
        *,
        device: Device = None,
    ) -> Any:
        """From the lengths of queries and keys, and where each block of keys begins and all end."""
        _check_same_number(q_seqlen, kv_seqlen)
        k_seqinfo = GappySeqLenInfo.from_starts(kv_seqstarts, kv_seqlen, None, device)
        return cls(SeqLenInfo.from_seqlens(q_seqlen, device=device), k_seqinfo)


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """`BlockDiagonalGappyKeysMask`, causal from the bottom right of each block."""


def _padded(
    q_seqlen: Sequence[int], padding: int, kv_seqlen: Sequence[int], device: Device
) -> tuple[SeqLenInfo, GappySeqLenInfo]:
    _check_same_number(q_seqlen, kv_seqlen)
    if max(kv_seqlen) > padding:
        raise ValueError(f"kv_seqlen: expected at most kv_padding = {padding} keys, got {max(kv_seqlen)}")
    starts = [padding * i for i in range(len(kv_seqlen) + 1)]
    k_seqinfo = GappySeqLenInfo.from_starts(starts, kv_seqlen, padding, device)
    return SeqLenInfo.from_seqlens(q_seqlen, device=device), k_seqinfo


def _check_same_number(q_seqlen: Sequence[int], kv_seqlen: Sequence[int]) -> None:
    if len(q_seqlen) != len(kv_seqlen):
        raise ValueError(f"kv_seqlen: expected {len(q_seqlen)} lengths, as of queries, got {len(kv_seqlen)}")


def _check_window(window_size: int) -> None:
    if window_size < 1:
        raise ValueError(f"window_size: expected 1 or more, got {window_size}")


def _int32(numbers: Sequence[int], device: Device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device or "cpu")


def _lengths(tensors: Sequence[Tensor]) -> list[int]:
    return [x.shape[1] for x in tensors for _ in range(x.shape[0])]


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], dim=1)
