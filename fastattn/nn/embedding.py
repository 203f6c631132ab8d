"""The embedding of a transformer: tokens, learned positions, dropout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.ops.embedding import embedding


class TokenPositionEmbedding(nn.Module):
    """``dropout(token(ids) + position(0, 1, …))`` in one pass; GPT-2's and BERT's first lines.

    `token` and `position` are `torch.nn.Embedding` modules, called so in the state dict, and made as torch's.
    The weight of `token` may be tied to a head's.

    Args:
        vocab_size: rows of `token`.
        max_length: rows of `position`.
        dim: columns of both.
        dropout: probability in [0, 1), while training.
        padding_idx: the token without a gradient.
        device, dtype: of the tables.

    Example:
        >>> import torch, fastattn
        >>> embed = fastattn.nn.TokenPositionEmbedding(100, 16, 8, dropout=0.1)
        >>> embed(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        dim: int,
        *,
        dropout: float = 0.0,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.token = nn.Embedding(vocab_size, dim, padding_idx, device=device, dtype=dtype)
        self.position = nn.Embedding(max_length, dim, device=device, dtype=dtype)
        self.dropout = dropout

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embed tokens.

        Args:
            ids: integers ``[..., L]``.
            positions: integers that broadcast to its shape; 0 to L - 1 if None.

        Returns:
            ``[..., L, dim]``.

        Raises: as `fastattn.embedding` does.
        """
        return embedding(
            ids,
            self.token.weight,
            self.position.weight,
            positions,
            padding_idx=self.token.padding_idx,
            dropout=self.dropout if self.training else 0.0,
        )
