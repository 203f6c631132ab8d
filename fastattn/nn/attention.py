"""Drop-in modules: `torch.nn.MultiheadAttention`'s and nanoGPT's attention on fastattn's kernels."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.ops.attention import attention, causal
from fastattn.ops.attention.masks import Mask
from fastattn.ops.attention.weights import attention_weights

_MINUS_INFINITY = float("-inf")


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` without the L × S matrix in memory: change the import, keep the rest.

    Constructor, parameters, their initialisation and names in a state dict are torch's own, so a checkpoint
    of one loads into the other. `forward` differs in four points:

    - A query whose keys are all masked gets 0 from attention; torch gives NaN if `need_weights`.
    - `is_causal` means causal (query i attends to keys ``j <= i``), and a given `attn_mask` holds as well.
      torch raises without `attn_mask`, reads it alone if `need_weights` or with padding, else ignores it.
    - `attn_mask` and `key_padding_mask` may be of different kinds, one bool and one float.
    - The weights returned are the probabilities before dropout, so each row sums to 1; torch returns them
      after dropout.

    Without weights nothing L × S is made but what a given L × S mask needs, with two exceptions: a float
    `key_padding_mask` with values other than 0 and -inf is added to a float `attn_mask` (under
    `torch.compile` any float one), and `is_causal` with `add_bias_kv` or `add_zero_attn` becomes a bool
    mask. Weights averaged over the heads are made a few heads at a time.

    `torch.nn.TransformerEncoderLayer` in eval mode without gradients computes from this module's parameters
    without calling it; ``torch.backends.mha.set_fastpath_enabled(False)`` makes it call.

    Source: Vaswani et al., "Attention Is All You Need", 2017 (arXiv 1706.03762); PyTorch 2.13's interface.

    Example:
        >>> import torch, fastattn
        >>> torch_mha = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        >>> mha = fastattn.MultiheadAttention(16, 4, batch_first=True)
        >>> mha.load_state_dict(torch_mha.state_dict())
        <All keys matched successfully>
        >>> x = torch.randn(2, 5, 16)
        >>> torch.allclose(mha(x, x, x)[0], torch_mha(x, x, x)[0], atol=1e-6)
        True
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` to `key` and `value`.

        Args:
            query: ``[L, N, embed_dim]``, with `batch_first` ``[N, L, embed_dim]``, or unbatched
                ``[L, embed_dim]``.
            key: ``[S, N, kdim]``, ``[N, S, kdim]`` or ``[S, kdim]``.
            value: ``[S, N, vdim]``, ``[N, S, vdim]`` or ``[S, vdim]``.
            key_padding_mask: ``[N, S]``, unbatched ``[S]``. Bool: True = masked out. Floating: added to the
                scores.
            need_weights: also return the attention weights; costs their computation and L × S memory.
            attn_mask: ``[L, S]`` or ``[N · num_heads, L, S]``. Bool: True = masked out. Floating: added to
                the scores.
            average_attn_weights: return the weights' mean over the heads.
            is_causal: query i attends to keys ``j <= i`` alone, of those that `attn_mask` lets it attend to
                where one is given. To hand over a causal `attn_mask` as well changes nothing but the cost.

        Returns:
            The output, in query's layout, and the weights: None without `need_weights`, else ``[N, L, S]``,
            or ``[N, num_heads, L, S]`` if not averaged; without N where unbatched. S counts the keys that
            `add_bias_kv` and `add_zero_attn` append.

        Raises:
            ValueError: shapes that do not fit, with the expected and the given.
            TypeError: a mask that is neither bool nor floating.
        """
        if query.is_nested:  # torch's inference path takes these whole
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._check(query, key, value)
        batched = query.dim() == 3
        q, k, v = self._project(query, key, value)
        mask, bias = self._masks(q, k, key_padding_mask, attn_mask, is_causal, batched)
        k, v = self._append(k, self.bias_k), self._append(v, self.bias_v)

        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, lse = attention(q, k, v, mask=mask, bias=bias, dropout=dropout, return_lse=True)
            weights = attention_weights(q, k, lse, mask=mask, bias=bias, average=average_attn_weights)
            weights = weights if batched else weights.squeeze(0)
        else:
            out = attention(q, k, v, mask=mask, bias=bias, dropout=dropout)

        if batched and not self.batch_first:
            out = out.permute(2, 0, 1, 3)  # [N, H, L, D] -> [L, N, H, D]
        else:
            out = out.transpose(1, 2)
        out = self.out_proj(out.flatten(2))
        return (out if batched else out.squeeze(0)), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        rank = query.dim()
        if rank not in (2, 3) or key.dim() != rank or value.dim() != rank:
            shapes = [list(x.shape) for x in (query, key, value)]
            raise ValueError(f"query, key, value: expected all of them 2-D (unbatched) or 3-D, got {shapes}")
        for name, x, dim in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.shape[-1] != dim:
                raise ValueError(f"{name}: expected a last dimension of {dim}, got {list(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"value: expected key's length and batch {list(key.shape[:-1])}, got {list(value.shape)}"
            )
        batch = 0 if self.batch_first else 1
        if rank == 3 and query.shape[batch] != key.shape[batch]:
            raise ValueError(f"key: expected query's batch {query.shape[batch]}, got {list(key.shape)}")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v ``[N, H, length, D]``, views of as few matrix products as the inputs allow."""
        dim, bias = self.embed_dim, self.in_proj_bias
        weights: tuple[Tensor, ...]
        if not self._qkv_same_embed_dim:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None, None, None) if bias is None else bias.chunk(3)
            q, k, v = (
                F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
        elif key is value and query is key:
            q, k, v = F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        elif key is value:
            w_q, w_kv = self.in_proj_weight.split([dim, 2 * dim])
            b_q, b_kv = (None, None) if bias is None else bias.split([dim, 2 * dim])
            q = F.linear(query, w_q, b_q)
            k, v = F.linear(key, w_kv, b_kv).chunk(2, dim=-1)
        else:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            weights = self.in_proj_weight.chunk(3)
            q, k, v = (
                F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)
            )
        return self._heads(q), self._heads(k), self._heads(v)

    def _heads(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _append(self, x: Tensor, learned: Tensor | None) -> Tensor:
        """k or v with the keys of `add_bias_kv` and `add_zero_attn` behind the others."""
        columns = [x]
        one = (x.shape[0], self.num_heads, 1, self.head_dim)
        if learned is not None:
            columns.append(learned.view(1, self.num_heads, 1, self.head_dim).expand(one).to(x.dtype))
        if self.add_zero_attn:
            columns.append(x.new_zeros(one))
        return torch.cat(columns, dim=2) if len(columns) > 1 else x

    def _masks(
        self,
        q: Tensor,
        k: Tensor,
        padding: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        batched: bool,
    ) -> tuple[Mask | Tensor | None, Tensor | None]:
        """torch's masks as `mask` (True = may attend) and `bias`; appended keys are open to every query."""
        batch, heads, length, _ = q.shape
        keys = k.shape[2]
        appended = (self.bias_k is not None) + self.add_zero_attn
        mask: Mask | Tensor | None = None
        bias = None
        if attn_mask is not None:
            shape = (length, keys) if attn_mask.dim() == 2 else (batch * heads, length, keys)
            _check_mask("attn_mask", attn_mask, shape)
        if is_causal and not appended:
            mask = causal("top_left")
        elif is_causal:
            later = torch.ones(length, keys, dtype=torch.bool, device=q.device).triu(1)
            attn_mask = _mask_more(attn_mask, later)

        if attn_mask is not None:
            attn_mask = F.pad(attn_mask, (0, appended))
            attn_mask = (
                attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads))
            )
            if attn_mask.dtype == torch.bool:
                mask = ~attn_mask if mask is None else mask & ~attn_mask
            else:
                bias = attn_mask

        if padding is not None:
            _check_mask("key_padding_mask", padding, (batch, keys) if batched else (keys,))
            padding = F.pad(padding, (0, appended)).view(batch, 1, 1, keys + appended)
            padding = _as_bool(padding)
            has_dense = attn_mask is not None and attn_mask.dtype == torch.bool
            if padding.dtype == torch.bool and not has_dense:
                mask = ~padding if mask is None else mask & ~padding
            else:
                # Two bool masks joined would be [N, 1, L, S]: the smaller one, [N, 1, 1, S], goes as a bias.
                if padding.dtype == torch.bool:
                    padding = torch.zeros_like(padding, dtype=q.dtype).masked_fill(padding, _MINUS_INFINITY)
                bias = padding if bias is None else bias + padding
        return mask, bias


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: expected a bool (True = masked out) or floating tensor, got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(mask.shape)}")


def _mask_more(mask: Tensor | None, masked: Tensor) -> Tensor:
    """`mask` (bool: True = masked out; or floating) with what `masked` names masked out too."""
    if mask is None:
        return masked
    return mask | masked if mask.dtype == torch.bool else mask.masked_fill(masked, _MINUS_INFINITY)


def _as_bool(padding: Tensor) -> Tensor:
    """A bool mask for a float one of 0 and -inf alone, as `torch.nn.TransformerEncoderLayer` makes it."""
    if padding.dtype == torch.bool or padding.requires_grad or torch.compiler.is_compiling():
        return padding
    masked = padding == _MINUS_INFINITY
    return masked if bool((masked | (padding == 0)).all()) else padding


class GPTConfig(Protocol):
    """What `CausalSelfAttention` reads of nanoGPT's config object."""

    n_embd: int
    n_head: int
    dropout: float
    bias: bool


class CausalSelfAttention(nn.Module):
    """Causal self-attention of a GPT: one projection to q, k and v, attention, one projection back, dropout.

    nanoGPT's class of this name, with its parameters (`c_attn`, `c_proj`) and its state dict: replace its
    definition by ``from fastattn import CausalSelfAttention``. The `bias` buffer (a causal mask) that nanoGPT
    keeps where it has no fused attention is not needed; a checkpoint that holds one loads.

    Args:
        n_embd: width of the model, a multiple of `n_head`; or nanoGPT's config object, of which `n_embd`,
            `n_head`, `dropout` and `bias` are read and which then is the only one of these given.
        n_head: number of heads.
        dropout: of attention's probabilities and of the output alike, in [0, 1), in training only.
        bias: whether the two projections have one.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: both a config object and what it holds, or neither.
        ValueError: `n_head` does not divide `n_embd`, or `dropout` is not in [0, 1).

    Source: nanoGPT, model.py; Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.

    Example:
        >>> import torch, fastattn
        >>> attn = fastattn.CausalSelfAttention(n_embd=32, n_head=4)
        >>> attn(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 32])
    """

    def __init__(
        self,
        n_embd: int | GPTConfig,
        n_head: int | None = None,
        dropout: float | None = None,
        bias: bool | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(n_embd, int):
            if (n_head, dropout, bias) != (None, None, None):
                raise TypeError(
                    "CausalSelfAttention: expected n_head, dropout and bias in the config alone, got both"
                )
            config = n_embd
            n_embd, n_head, dropout, bias = config.n_embd, config.n_head, config.dropout, config.bias
        if n_head is None:
            raise TypeError(
                "CausalSelfAttention: expected n_embd and n_head, or a config object, got n_embd alone"
            )
        if n_head <= 0 or n_embd <= 0 or n_embd % n_head != 0:
            raise ValueError(f"n_embd: expected a positive multiple of n_head={n_head}, got {n_embd}")
        self.n_embd = n_embd
        self.n_head = n_head
        self.dropout = 0.0 if dropout is None else dropout
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        bias = True if bias is None else bias
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias, device=device, dtype=dtype)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias, device=device, dtype=dtype)
        self.resid_dropout = nn.Dropout(self.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every position to itself and those before it.

        Args:
            x: ``[B, T, n_embd]``.

        Returns:
            ``[B, T, n_embd]``.

        Raises:
            ValueError: another shape.
        """
        if x.dim() != 3 or x.shape[2] != self.n_embd:
            raise ValueError(f"x: expected [B, T, {self.n_embd}], got {list(x.shape)}")
        batch, length, width = x.shape
        qkv = self.c_attn(x).view(batch, length, 3, self.n_head, width // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, T, D] each, strided views of qkv
        out = attention(q, k, v, mask=causal(), dropout=self.dropout if self.training else 0.0)
        assert isinstance(out, Tensor)
        out = out.transpose(1, 2).reshape(batch, length, width)
        return self.resid_dropout(self.c_proj(out))  # type: ignore[no-any-return]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "bias", None)  # the mask of nanoGPT without fused attention
        super()._load_from_state_dict(state_dict, prefix, *args)
