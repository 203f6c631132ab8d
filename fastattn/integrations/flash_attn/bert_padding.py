"""`flash_attn.bert_padding`: padded batches to packed ones, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, packed.

    Args:
        hidden_states: ``(batch, seqlen, ...)``.
        attention_mask: ``(batch, seqlen)``, bool or int, not 0 for a token.
        unused_mask: ``(batch, seqlen)``, bool or int, not 0 for a place that is kept but not used.

    Returns:
        The packed tokens ``(total, ...)``, differentiable; their indices ``(total,)`` among the
        ``batch · seqlen`` places, int64; cu_seqlens ``(batch + 1,)``, int32; the length of the longest
        sequence, an int (reading it waits for the device); and seqused ``(batch,)``, int32, the tokens of
        each sequence without the places that are not used.

    Source: flash-attn 2.8.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> tokens, indices, cu_seqlens, longest, used = unpad_input(torch.randn(2, 3, 4), mask)
        >>> tokens.shape, indices.tolist(), cu_seqlens.tolist(), longest, used.tolist()
        (torch.Size([3, 4]), [0, 1, 3], [0, 2, 3], 2, [2, 1])
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    return tokens, indices, _cumulative(lengths), int(lengths.max()), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tokens of a padded batch whose rows have several short sequences each, packed.

    Args:
        hidden_states: ``(batch, seqlen, ...)``.
        attention_mask_in_length: ``(batch, seqlen)``, int: the lengths of a row's sequences, and 0 behind
            them. ``[2, 3, 0, 0, 0, 0]`` is a row of two sequences, of 2 and 3 tokens, and one place of
            padding.

    Returns:
        As the first four of `unpad_input`, with a sequence in cu_seqlens for every short one.

    Source: flash-attn 2.8.

    Example:
        >>> import torch
        >>> lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
        >>> _, _, cu_seqlens, longest = unpad_input_for_concatenated_sequences(torch.randn(2, 6, 4), lengths)
        >>> cu_seqlens.tolist(), longest
        ([0, 2, 5, 11], 6)
    """
    place = torch.arange(attention_mask_in_length.shape[-1], device=attention_mask_in_length.device)
    kept = place < attention_mask_in_length.sum(dim=-1, keepdim=True)
    indices = kept.flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths.nonzero().flatten()]
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _cumulative(lengths), int(lengths.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`.

    Args:
        hidden_states: ``(total, ...)``.
        indices: ``(total,)``, where each token goes among the ``batch · seqlen`` places.
        batch: sequences.
        seqlen: places of each.

    Returns:
        ``(batch, seqlen, ...)``, 0 in places without a token; differentiable.

    Source: flash-attn 2.8.

    Example:
        >>> import torch
        >>> pad_input(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 3]), 2, 2).tolist()
        [[[1.0], [0.0]], [[0.0], [2.0]]]
    """
    rows = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rows.view(batch, seqlen, *hidden_states.shape[1:])


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """``input[indices]`` for a vector of indices; differentiable."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """`first_axis_dim` rows of 0, with `values` in those of `indices`; differentiable."""
    empty = values.new_zeros((first_axis_dim, *values.shape[1:]))
    rows: Tensor = empty.index_copy(0, indices.long(), values)
    return rows


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """``input[indices]`` and input itself, for what a layer adds to its output."""
    return input.index_select(0, indices), input


def _cumulative(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
