"""GPT-2 in one file, with the attention of your choice.

Parameter names and layouts are those of `transformers.GPT2LMHeadModel`, so that checkpoints go both ways.
Source: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastattn.gpt2.config import GPT2Config
from fastattn.ops.attention import attention as tiled_attention
from fastattn.ops.attention import causal
from fastattn.ops.cross_entropy import linear_cross_entropy
from fastattn.ops.embedding import embedding
from fastattn.ops.layer_norm import dropout_add_layer_norm, layer_norm
from fastattn.ops.linear import linear
from fastattn.ops.mlp import mlp
from fastattn.ops.rotary import rotary

AttentionKind = Literal["standard", "sdpa", "fastattn"]
# What besides attention fastattn's operations may do; the others are plain PyTorch.
FUSED: Final = ("embedding", "norm", "linear", "mlp", "loss")
Angles = tuple[Tensor, Tensor]  # cosines and sines [L, head_dim / 2] of rotary positions
_ROTARY_BASE: Final = 10_000.0


@dataclass
class KVCache:
    """Keys and values of the positions already seen, for `capacity` positions in all."""

    capacity: int
    length: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[B, H, L, D]`` behind what is there; returns everything so far."""
        end = self.length + k.shape[2]
        if layer not in self.layers:
            shape = (*k.shape[:2], self.capacity, k.shape[3])
            self.layers[layer] = k.new_empty(shape), v.new_empty(shape)
        keys, values = self.layers[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]


class Conv1D(nn.Module):
    """A linear layer whose weight is stored ``[in, out]``, as in OpenAI's checkpoints."""

    def __init__(self, n_in: int, n_out: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return linear(x, self.weight.t(), self.bias)
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


def _angles(length: int, head_dim: int) -> Angles:
    """Of positions 0 to ``length - 1``: the frequencies fall geometrically from 1 to nearly 1 / base."""
    # On the CPU even where the weights are made on the meta device: no checkpoint holds the tables.
    frequency = _ROTARY_BASE ** (-torch.arange(0, head_dim, 2, device="cpu") / head_dim)
    angle = torch.arange(length, device="cpu")[:, None] * frequency
    return angle.cos(), angle.sin()


class Attention(nn.Module):
    """Causal self-attention behind one packed projection, computed as `kind` says."""

    def __init__(self, config: GPT2Config, layer: int, kind: AttentionKind, fused: Collection[str]) -> None:
        super().__init__()
        self.layer, self.kind, self.n_head, self.attn_pdrop = layer, kind, config.n_head, config.attn_pdrop
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd, "linear" in fused)
        self.c_proj = Conv1D(config.n_embd, config.n_embd, "linear" in fused)

    def forward(self, x: Tensor, cache: KVCache | None = None, angles: Angles | None = None) -> Tensor:
        q, k, v = rearrange(self.c_attn(x), "b l (qkv h d) -> qkv b h l d", qkv=3, h=self.n_head).unbind(0)
        if angles is not None:
            q, k = rotary(q, *angles), rotary(k, *angles)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        dropout = self.attn_pdrop if self.training else 0.0
        if self.kind == "fastattn":
            out = tiled_attention(q, k, v, mask=causal(), dropout=dropout)
        elif self.kind == "sdpa":
            square = q.shape[2] == k.shape[2]
            keep = None if square or q.shape[2] == 1 else _keep(q, k)
            out = F.scaled_dot_product_attention(q, k, v, keep, dropout_p=dropout, is_causal=square)
        else:
            out = _standard_attention(q, k, v, dropout)
        projected: Tensor = self.c_proj(rearrange(out, "b h l d -> b l (h d)"))
        return projected


def _keep(q: Tensor, k: Tensor) -> Tensor:
    """bool ``[L_q, L_k]``: the last query sees the last key."""
    l_q, l_k = q.shape[2], k.shape[2]
    return torch.ones(l_q, l_k, dtype=torch.bool, device=q.device).tril(l_k - l_q)


def _standard_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Attention as it is usually written: the scores, the probabilities and their dropout are L×L each."""
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(q.shape[-1]))
    probs = F.softmax(scores.masked_fill(~_keep(q, k), float("-inf")), dim=-1)
    return F.dropout(probs, dropout) @ v


class MLP(nn.Module):
    """Four times wider in between, with the tanh form of GELU."""

    def __init__(self, config: GPT2Config, fused: Collection[str]) -> None:
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.fused = "mlp" in fused
        self.c_fc = Conv1D(config.n_embd, n_inner, "linear" in fused)
        self.c_proj = Conv1D(n_inner, config.n_embd, "linear" in fused)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            w1, w2 = self.c_fc.weight.t(), self.c_proj.weight.t()
            return mlp(x, w1, self.c_fc.bias, w2, self.c_proj.bias, "gelu_tanh")
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return out


class AddNorm(nn.LayerNorm):
    """``layer_norm(z)`` and ``z = residual + dropout(x)``; the dropout is that of the branch x came from."""

    def __init__(self, config: GPT2Config, fused: Collection[str]) -> None:
        super().__init__(config.n_embd, eps=config.layer_norm_epsilon)
        self.fused, self.p = "norm" in fused, config.resid_pdrop

    def forward(self, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if x is None:
            norm = layer_norm if self.fused else F.layer_norm
            return norm(residual, self.normalized_shape, self.weight, self.bias, self.eps), residual
        dropout = self.p if self.training else 0.0
        if self.fused:
            out, residual = dropout_add_layer_norm(
                x, residual, self.weight, self.bias, dropout=dropout, eps=self.eps, prenorm=True
            )
            return out, residual
        residual = residual + F.dropout(x, dropout)
        return super().forward(residual), residual


class Block(nn.Module):
    """Attention and MLP, each behind a layer norm. What they give is added to the residual with the norm that
    follows, so that it is read and written once."""

    def __init__(self, config: GPT2Config, layer: int, kind: AttentionKind, fused: Collection[str]) -> None:
        super().__init__()
        self.ln_1 = AddNorm(config, fused)
        self.attn = Attention(config, layer, kind, fused)
        self.ln_2 = AddNorm(config, fused)
        self.mlp = MLP(config, fused)

    def forward(
        self, x: Tensor | None, residual: Tensor, cache: KVCache | None = None, angles: Angles | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the block before gave and the residual it is to be added to; the same of this one."""
        x, residual = self.ln_1(x, residual)
        x, residual = self.ln_2(self.attn(x, cache, angles), residual)
        return self.mlp(x), residual


class Transformer(nn.Module):
    """Embeddings, blocks and the last layer norm: all but the language-model head."""

    def __init__(self, config: GPT2Config, kind: AttentionKind, fused: Collection[str]) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.fused, self.embd_pdrop = "embedding" in fused, config.embd_pdrop
        self.cos: Tensor
        self.sin: Tensor
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.n_positions = config.n_positions
        self.wpe = None if config.positions == "rotary" else nn.Embedding(config.n_positions, config.n_embd)
        if self.wpe is None:
            cos, sin = _angles(config.n_positions, config.head_dim)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.h = nn.ModuleList(Block(config, layer, kind, fused) for layer in range(config.n_layer))
        self.ln_f = AddNorm(config, fused)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        past = 0 if cache is None else cache.length
        end, most = past + ids.shape[1], self.n_positions
        if end > most:
            raise ValueError(f"ids: expected at most n_positions {most} tokens, got {end}")
        if cache is not None and end > cache.capacity:
            raise ValueError(f"ids: expected at most the cache's {cache.capacity} tokens, got {end}")
        angles = (self.cos[past:end], self.sin[past:end]) if self.wpe is None else None
        x, residual = None, self._embed(ids, past)
        for block in self.h:
            if self.gradient_checkpointing and self.training:
                x, residual = checkpoint(block, x, residual, cache, angles, use_reentrant=False)
            else:
                x, residual = block(x, residual, cache, angles)
        if cache is not None:
            cache.length = end
        hidden: Tensor = self.ln_f(x, residual)[0]
        return hidden

    def _apply(self, fn: Any, recurse: bool = True) -> Transformer:
        """Moves and casts; the tables of rotary positions stay float32, whatever the weights become."""
        super()._apply(fn, recurse)
        if self.wpe is None and self.cos.dtype != torch.float32:
            cos, sin = _angles(self.n_positions, 2 * self.cos.shape[1])
            self.cos, self.sin = cos.to(self.cos.device), sin.to(self.sin.device)
        return self

    def _embed(self, ids: Tensor, past: int) -> Tensor:
        dropout = self.embd_pdrop if self.training else 0.0
        places = None if self.wpe is None else self.wpe.weight[past : past + ids.shape[1]]
        if self.fused:
            return embedding(ids, self.wte.weight, position_weight=places, dropout=dropout)
        x = self.wte(ids)
        return F.dropout(x if places is None else x + places, dropout)


class GPT2(nn.Module):
    """GPT-2 with its language-model head, initialised as OpenAI's was.

    Args:
        config: sizes; see `config_of` for the published ones.
        attention: ``"fastattn"`` (tiled, no L×L memory, dropout in the kernel), ``"sdpa"``
            (`F.scaled_dot_product_attention`) or ``"standard"`` (scores and probabilities in memory).
        fused: which of ``"embedding"``, ``"norm"`` (with dropout and residual), ``"linear"``, ``"mlp"`` and
            ``"loss"`` are fastattn's operations, the others being plain PyTorch; None for all of them where
            attention is, and none where it is not.

    Example:
        >>> model = GPT2(GPT2Config(vocab_size=257, n_embd=32, n_layer=1, n_head=2)).eval()
        >>> model(torch.tensor([[72, 105]])).shape
        torch.Size([1, 2, 257])
    """

    def __init__(
        self,
        config: GPT2Config,
        attention: AttentionKind = "fastattn",
        fused: Collection[str] | None = None,
    ) -> None:
        super().__init__()
        if attention not in get_args(AttentionKind):
            raise ValueError(f"attention: expected one of {list(get_args(AttentionKind))}, got {attention!r}")
        if fused is None:
            fused = FUSED if attention == "fastattn" else ()
        unknown = sorted(set(fused) - set(FUSED))
        if unknown or isinstance(fused, str):
            raise ValueError(f"fused: expected some of {list(FUSED)}, got {fused!r}")
        self.config = config
        self.fused = tuple(name for name in FUSED if name in fused)
        self.transformer = Transformer(config, attention, self.fused)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two of them a layer add to the residual stream
                nn.init.normal_(parameter, std=config.initializer_range / math.sqrt(2 * config.n_layer))
            elif name.endswith("weight") and parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, ids: Tensor, *, cache: KVCache | None = None, last_only: bool = False) -> Tensor:
        """Logits of the next token, ``[B, L, vocab_size]``.

        Args:
            ids: int64 ``[B, L]``, at most `n_positions` with what the cache holds.
            cache: keys and values of the tokens before `ids`; those of `ids` are added.
            last_only: only the last position's logits, ``[B, 1, vocab_size]``.

        Raises:
            ValueError: more tokens than positions.
        """
        x = self.transformer(ids, cache)
        return self._logits(x[:, -1:] if last_only else x)

    def _logits(self, x: Tensor) -> Tensor:
        if "linear" in self.fused:
            return linear(x, self.lm_head.weight)
        logits: Tensor = self.lm_head(x)
        return logits

    def loss(self, ids: Tensor, targets: Tensor, *, chunk: int | None = None) -> Tensor:
        """Mean cross-entropy of the next token, in nats.

        Args:
            ids: int64 ``[B, L]``.
            targets: int64 ``[B, L]``, the token after each; -100 is left out of the mean.
            chunk: at most this many tokens' logits are held at a time, and made again in the backward
                pass; None holds all of them, ``B · L · vocab_size`` numbers. The fused loss never does, and
                makes none again.
        """
        hidden, flat = self.transformer(ids).flatten(0, 1), targets.flatten()
        if "loss" in self.fused:
            return linear_cross_entropy(hidden, self.lm_head.weight, flat)
        if chunk is None or len(flat) <= chunk:
            return self._summed_loss(hidden, flat) / (flat != -100).sum()
        parts = zip(torch.split(hidden, chunk), torch.split(flat, chunk), strict=True)
        sums = [checkpoint(self._summed_loss, x, y, use_reentrant=False) for x, y in parts]
        return torch.stack(sums).sum() / (flat != -100).sum()

    def _summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self._logits(hidden).float(), targets, reduction="sum")

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
        end_of_text: int | None = None,
    ) -> Tensor:
        """Continue each row of `ids`, int64 ``[B, L]`` with L >= 1; dropout is off meanwhile.

        Args:
            ids: the prompts.
            max_new_tokens: at most this many are added behind them.
            temperature: the logits are divided by it; 0 takes the likeliest token each time.
            top_k: draw from this many likeliest tokens only.
            seed: of the draws; torch's own generator if None.
            end_of_text: a row that has drawn it repeats it, and once all have, that is the end.

        Raises:
            ValueError: an empty prompt, more tokens than positions, or options out of range.
        """
        total, most = ids.shape[1] + max_new_tokens, self.config.n_positions
        if ids.shape[1] < 1 or max_new_tokens < 0 or total > most:
            given = f"{ids.shape[1]} and {max_new_tokens}"
            raise ValueError(
                f"expected a token or more and 0 or more new ones, at most {most} in all, got {given}"
            )
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"expected temperature >= 0 and top_k >= 1, got {temperature} and {top_k}")
        generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
        training, cache, fresh = self.training, KVCache(total), ids
        ended = torch.zeros_like(ids[:, :1], dtype=torch.bool)
        self.eval()
        try:
            while ids.shape[1] < total and not bool(ended.all()):
                logits = self(fresh, cache=cache, last_only=True)[:, 0]
                fresh = _draw(logits.float(), temperature, top_k, generator)
                if end_of_text is not None:
                    fresh = fresh.masked_fill(ended, end_of_text)
                    ended = fresh == end_of_text
                ids = torch.cat((ids, fresh), dim=1)
        finally:
            self.train(training)
        return ids


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Next ids ``[B, 1]`` of logits ``[B, vocab_size]``."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
