"""Models whose attention is naive: tiny, with random weights; and what to call them with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, HEADS, LENGTH = 61, 32, 4, 20
_ROPE = {
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
_BERT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "attn_implementation": "eager",
}


def gpt2(**changed: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    given = {
        "n_layer": 2,
        "n_head": HEADS,
        "n_embd": WIDTH,
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "bos_token_id": 0,
    }
    return GPT2Model(GPT2Config(eos_token_id=0, attn_implementation="eager", **given, **changed))


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **_BERT))


def t5() -> nn.Module:
    from transformers import T5Config, T5Model

    given = {
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 1,
        "num_heads": HEADS,
        "vocab_size": VOCABULARY,
    }
    return T5Model(T5Config(attn_implementation="eager", use_cache=False, **given))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(num_hidden_layers=2, **_ROPE))


def gemma() -> nn.Module:
    from transformers import GemmaConfig, GemmaModel

    return GemmaModel(GemmaConfig(num_hidden_layers=1, head_dim=8, **_ROPE))


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(num_hidden_layers=2, head_dim=8, sliding_window=6, **_ROPE))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(image_size=16, patch_size=4, **_BERT))


class NanoBlock(nn.Module):
    """nanoGPT's CausalSelfAttention, slow path."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.register_buffer("bias", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)
        k = k.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        q = q.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        v = v.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        att = self.attn_dropout(att)
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class XBlock(nn.Module):
    """x-transformers' Attend with rearrange written out, one key head, softcap and float32 softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_kv = nn.Linear(WIDTH, 2 * WIDTH // HEADS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.to_q(x).unflatten(-1, (HEADS, -1)).permute(0, 2, 1, 3)
        k, v = self.to_kv(x).chunk(2, dim=-1)
        sim = torch.einsum("b h i d, b j d -> b h i j", q, k) * q.shape[-1] ** -0.5
        sim = (sim / 30.0).tanh() * 30.0
        i, j = sim.shape[-2:]
        causal = torch.ones((i, j), dtype=torch.bool, device=x.device).triu(j - i + 1)
        sim = sim.masked_fill(causal, -torch.finfo(sim.dtype).max)
        attn = F.softmax(sim, dim=-1, dtype=torch.float32).type(sim.dtype)
        out = torch.einsum("b h i j, b j d -> b h i d", F.dropout(attn, p=0.0, training=self.training), v)
        return out.permute(0, 2, 1, 3).reshape(*x.shape)


def nano() -> nn.Module:
    return nn.Sequential(NanoBlock(), NanoBlock())


def x_transformer() -> nn.Module:
    return nn.Sequential(XBlock(), XBlock())


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 48, batch_first=True, dropout=0.0)


class Crossed(nn.Module):
    """nn.MultiheadAttention with keys of another width and length."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, kdim=8, vdim=12)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x[:-3, :, :8], x[:-3, :, :12], need_weights=False)[0]


# The model, how many attentions it has, and whether it takes a padding mask.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "gpt2": (gpt2, 2, True),
    "bert": (bert, 2, True),
    "t5": (t5, 3, True),
    "llama": (llama, 2, True),
    "gemma": (gemma, 1, True),
    "gemma2": (gemma2, 2, True),
    "vit": (vit, 2, False),
    "nano": (nano, 2, False),
    "x_transformer": (x_transformer, 2, False),
    "encoder_layer": (encoder_layer, 1, False),
    "crossed": (Crossed, 1, False),
}


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "attn_pdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def arguments(name: str, length: int, padding: str = "") -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call a model with; `padding` hides keys on that side of the first sequence."""
    if name == "vit":
        return (torch.randn(2, 3, 16, 16),), {}
    if name in ("nano", "x_transformer", "encoder_layer", "crossed"):
        return (torch.randn(2, length, WIDTH),), {}
    ids = torch.randint(VOCABULARY, (2, length))
    given: dict[str, Any] = {}
    if name == "t5":
        given["decoder_input_ids"] = ids[:, : length // 2]
    if name not in ("t5", "bert"):
        given["use_cache"] = False
    if padding:
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, slice(5) if padding == "left" else slice(-5, None)] = 0
        given["attention_mask"] = mask
    return (ids,), given


def output(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]
