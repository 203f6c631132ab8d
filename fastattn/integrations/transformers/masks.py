"""transformers' masks as fastattn's: memory that grows with the length, not with its square."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask
from transformers.utils.import_utils import is_tracing

from fastattn.integrations.transformers.symbols import Atom, Band, Chunk, Same, atoms_of
from fastattn.ops.attention.masks import Mask, as_mask, chunked, documents, key_padding, sliding_window

_UNLIKE = "expected documents to begin where position_ids do not go on counting by one"
_RETURNS = "expected numbers of packed documents that do not decrease"
_SHIFTED = "expected chunks that count from the first token where there is no attention_mask"


@dataclass(frozen=True, eq=False)
class CompactMask:
    """What stands for transformers' ``[B, 1, L_q, L_k]`` mask in memory that grows with L_q + L_k alone.

    It goes from a model's mask function through its layers to `attention_forward`. Model code that does
    anything else with its mask than hand it on (cuts it, inverts it, compares it, joins another, converts it
    to another dtype) gets the tensor it stands for.

    Attributes:
        mask: see `fastattn.Mask`.
        shape: of the tensor it stands for.
        device: of the tensor it stands for.
        q_start: position of the first query, as in `fastattn.attention`; None for alignment by corner.
        k_start: position of the first key.
    """

    mask: Mask
    shape: tuple[int, int, int, int]
    device: torch.device | str
    q_start: int | Tensor | None = None
    k_start: int | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def packed(self) -> bool:
        """Whether it keeps documents packed into one sequence apart."""
        return self.mask.documents is not None

    def contiguous(self) -> CompactMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> CompactMask | Tensor:
        """As `torch.Tensor.to`: itself on another device, the tensor where another dtype is asked for."""
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for given in (*args, kwargs.get("other")):
            if isinstance(given, Tensor):
                device, dtype = given.device, given.dtype
            elif isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, (torch.device, str)):
                device = given
        if dtype not in (None, torch.bool):
            return self.to_tensor().to(*args, **kwargs)
        return self if device is None else self.on(device)

    def on(self, device: torch.device | str) -> CompactMask:
        """The same on `device`."""
        q_start = self.q_start.to(device) if isinstance(self.q_start, Tensor) else self.q_start
        return replace(self, mask=self.mask.to(device), device=device, q_start=q_start)

    def to_tensor(self) -> Tensor:
        """The bool tensor, True = may attend."""
        batch, _, q_length, k_length = self.shape
        keep = self.mask.to_dense(
            batch=batch,
            q_length=q_length,
            k_length=k_length,
            q_start=self.q_start,
            k_start=self.k_start,
            device=self.device,
        )
        if keep is None:
            keep = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self.device)
        return keep.expand(self.shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.to_tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.to_tensor()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __eq__(self, other: object) -> Any:
        return self.to_tensor() == _tensor(other)

    def __ne__(self, other: object) -> Any:
        return self.to_tensor() != _tensor(other)

    __hash__ = object.__hash__  # as a tensor: by what it is, not by what is in it

    def __invert__(self) -> Tensor:
        return ~self.to_tensor()

    def __and__(self, other: object) -> Any:
        return self.to_tensor() & _tensor(other)

    def __or__(self, other: object) -> Any:
        return self.to_tensor() | _tensor(other)

    def __xor__(self, other: object) -> Any:
        return self.to_tensor() ^ _tensor(other)

    def __add__(self, other: object) -> Any:
        return self.to_tensor() + _tensor(other)

    def __sub__(self, other: object) -> Any:
        return self.to_tensor() - _tensor(other)

    def __mul__(self, other: object) -> Any:
        return self.to_tensor() * _tensor(other)

    def __rsub__(self, other: object) -> Any:
        return _tensor(other) - self.to_tensor()

    __rand__, __ror__, __rxor__, __radd__, __rmul__ = __and__, __or__, __xor__, __add__, __mul__

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*tree_map(_tensor, args), **tree_map(_tensor, kwargs or {}))


def _tensor(x: Any) -> Any:
    return x.to_tensor() if isinstance(x, CompactMask) else x


class _Place(NamedTuple):
    """Where queries and keys stand."""

    q_length: int
    k_length: int
    q_start: int | Tensor
    k_start: int

    @property
    def aligned(self) -> bool:
        """Whether the last query is the last key's; not in a static cache, whose last keys are unwritten."""
        return isinstance(self.q_start, int) and self.q_start + self.q_length == self.k_start + self.k_length

    @property
    def whole(self) -> bool:
        """Whether queries and keys are of the same tokens."""
        at_zero = isinstance(self.q_start, int) and self.q_start == 0 and self.k_start == 0
        return at_zero and self.q_length == self.k_length


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | CompactMask | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | CompactMask | None:
    """The mask function for transformers' `AttentionMaskInterface`.

    Args: those transformers passes to `sdpa_mask`.

    Returns:
        None for causal or bidirectional attention without padding; a `CompactMask` where padding, a sliding
        window, chunks, packed sequences, or a cache come in; the bool tensor ``[B, 1, L_q, L_k]`` that
        `sdpa_mask` makes for a mask of the model's own, and where the model asks for a tensor.
    """
    if isinstance(attention_mask, CompactMask):  # made before the model was called
        return attention_mask
    if isinstance(q_offset, Tensor) and q_offset.device.type == "cpu" and not is_tracing(q_offset):
        q_offset = int(q_offset)
    place = _Place(q_length, kv_length, q_offset, kv_offset)
    # A mask of the model's own (`use_vmap`) may do what symbols do not survive under the compiler.
    atoms = None if use_vmap else atoms_of(mask_function)
    found = None if atoms is None else _structure(_biting(atoms, place), place, attention_mask)
    packed = found is not None and found.documents is not None
    # A model that joins its mask to another says so by allowing no None; packed sequences never allow it.
    wants_tensor = not (packed or allow_is_causal_skip or allow_is_bidirectional_skip)
    if found is None or wants_tensor:
        return sdpa_mask(  # type: ignore[no-any-return]
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            **kwargs,
        )

    assert atoms is not None
    biting = _biting(atoms, place)
    padding = _padding(attention_mask, place)
    if padding is None and not packed:
        if not biting and allow_is_bidirectional_skip:
            return None
        is_causal = biting == (Band(None, 0, None),)
        if is_causal and allow_is_causal_skip and place.aligned and q_length in (1, kv_length):
            return None
    mask = found if padding is None else found & padding
    device = kwargs.get("device", "cpu") if attention_mask is None else attention_mask.device
    shape = (batch_size, 1, q_length, kv_length)
    by_corner = packed or (place.aligned and not any(isinstance(atom, Chunk) for atom in biting))
    if by_corner:
        return CompactMask(mask, shape, device)
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.reshape(-1).to(torch.int64).expand(batch_size)
    return CompactMask(mask, shape, device, q_offset, kv_offset)


def _biting(atoms: tuple[Atom, ...], place: _Place) -> tuple[Atom, ...]:
    """Those of `atoms` that can mask a key here: not a window longer than the keys."""
    if not isinstance(place.q_start, int):
        return atoms
    reach = place.q_start + place.q_length - 1 - place.k_start
    return tuple(
        atom
        for atom in atoms
        if not (isinstance(atom, Band) and atom.ids is None and atom.right is None and atom.left >= reach)  # type: ignore[operator]
    )


def _structure(atoms: tuple[Atom, ...], place: _Place, padding: Tensor | None) -> Mask | None:
    """The mask of these atoms; None where there is none of this form."""
    packing = [atom.ids for atom in atoms if isinstance(atom, Same)]
    if packing:
        return _packed(atoms, packing, place)
    if any(atom.ids is not None for atom in atoms):
        return None
    mask = Mask()
    for atom in atoms:
        if isinstance(atom, Band):
            mask = mask & sliding_window(atom.left, atom.right)
        elif isinstance(atom, Chunk):
            if atom.origin is None or _holds(atom.origin == 0, padding is None, _SHIFTED):
                mask = mask & chunked(atom.size)
            elif place.whole and not is_tracing(atom.origin) and _is_left_padding(atom.origin, padding):
                # Chunks count from the first token that is not padding: as documents, padding and the rest.
                index = torch.arange(place.q_length, device=atom.origin.device)[None]
                origin = atom.origin[:, None]
                mask = mask & documents(position_ids=torch.where(index < origin, index, index - origin))
                mask = mask & chunked(atom.size)
            else:
                return None
    return mask


def _packed(atoms: tuple[Atom, ...], packing: list[Tensor], place: _Place) -> Mask | None:
    """Documents packed into one sequence, and what else holds within each."""
    numbers, positions = packing[0], [atom.ids for atom in atoms if isinstance(atom, (Band, Chunk))]
    counted = positions[0] if positions else None
    if len(packing) > 1 or not place.whole or any(ids is not counted for ids in positions):
        return None
    if numbers.shape[1] != place.q_length:
        return None
    # A number that comes back is of one document in several places, which bounds can't say.
    if not _holds(numbers.diff(dim=-1) >= 0, True, _RETURNS):
        return None
    index = torch.arange(place.q_length, device=numbers.device)[None]
    if counted is None:
        # Goes on counting by one where the number of the document stays the same.
        mask = documents(position_ids=index + 2 * numbers)
    elif _holds((counted.diff(dim=-1) != 1) == (numbers.diff(dim=-1) != 0), True, _UNLIKE):
        mask = documents(position_ids=counted)
    else:
        return None
    for atom in atoms:
        if isinstance(atom, Band):
            mask = mask & sliding_window(atom.left, atom.right)
        elif isinstance(atom, Chunk):
            # Chunks of a document count from its own first position: its first token's has to be 0.
            if counted is None or is_tracing(numbers):
                return None
            begins = torch.ones_like(numbers, dtype=torch.bool)
            begins[:, 1:] = numbers.diff(dim=-1) != 0
            from_zero = bool((counted[begins.expand(counted.shape)] == 0).all())
            if not from_zero or (atom.origin is not None and bool((atom.origin != 0).any())):
                return None
            mask = mask & chunked(atom.size)
    return mask


def _holds(condition: Tensor, expected: bool, what: str) -> bool:
    """Whether `condition` is true everywhere. The compiler can't read it: it takes what is `expected`, and
    the compiled model raises where that is wrong."""
    if not is_tracing(condition):
        return bool(condition.all())
    if expected:
        torch._assert_async(condition.all(), f"fastattn: {what}")
    return expected


def _is_left_padding(origin: Tensor, padding: Tensor | None) -> bool:
    return padding is not None and torch.equal(origin, (padding.cumsum(-1) == 0).sum(-1))


def _padding(attention_mask: Tensor | None, place: _Place) -> Mask | None:
    """The keys that are tokens; None where all are."""
    keep = prepare_padding_mask(attention_mask, place.k_length, place.k_start)
    if keep is None:
        return None
    keep = keep[:, place.k_start : place.k_start + place.k_length].to(torch.bool)
    if not is_tracing(keep):
        if bool(keep.all()):
            return None
        lengths = keep.sum(-1)
        if torch.equal(keep, torch.arange(place.k_length, device=keep.device) < lengths[:, None]):
            return key_padding(lengths)
    return as_mask(keep[:, None, None, :])
