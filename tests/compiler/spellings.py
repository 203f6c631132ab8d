"""Naive attention as people write it: functions of q, k, v ``[B, H, L, D]``, and what their masks are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]
SPELLINGS: dict[str, tuple[Spelling, str]] = {}


def spelling(words: str = "no mask") -> Callable[[Spelling], Spelling]:
    def note(function: Spelling) -> Spelling:
        SPELLINGS[function.__name__] = (function, words)
        return function

    return note


def wave(*shape: Any, like: Tensor) -> Tensor:
    """The same numbers at every call, all different."""
    x: Tensor = torch.arange(math.prod(shape), device=like.device, dtype=torch.float32)
    return torch.sin(x).reshape(shape).to(like.dtype)


# --- products, scales and softmaxes


@spelling()
def matmul_scale_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax((q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1))), dim=-1) @ v


@spelling()
def scale_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q * q.shape[-1] ** -0.5
    return torch.matmul(torch.softmax(torch.matmul(q, k.permute(0, 1, 3, 2)), -1), v)


@spelling()
def scale_on_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = q.shape[-1] ** -0.25
    return (q * root).matmul((k * root).mT).softmax(dim=-1).matmul(v)


@spelling()
def divided_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(3, 2)
    scores /= math.sqrt(q.size(-1))
    return torch.nn.Softmax(dim=-1)(scores).matmul(v)


@spelling()
def bmm_of_merged_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    q, k, v = (x.reshape(batch * heads, -1, dim) for x in (q, k, v))
    probs = F.softmax(torch.bmm(q, k.transpose(1, 2)) / 4.0, dim=2)
    return torch.bmm(probs, v).view(batch, heads, length, dim)


@spelling()
def baddbmm_of_nothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    flat_q, flat_k = q.reshape(-1, length, dim), k.reshape(-1, k.shape[2], dim)
    start = torch.empty(batch * heads, length, k.shape[2], dtype=q.dtype)
    scores = torch.baddbmm(start, flat_q, flat_k.transpose(-1, -2), beta=0, alpha=0.25)
    return torch.matmul(scores.view(batch, heads, length, -1).softmax(-1), v)


@spelling("bias")
def baddbmm_of_alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    slopes = wave(batch * heads, 1, 1, like=q) * torch.arange(k.shape[2], device=q.device).to(q.dtype)
    flat = q.reshape(-1, length, dim), k.reshape(-1, k.shape[2], dim).transpose(1, 2)
    scores = slopes.baddbmm(batch1=flat[0], batch2=flat[1], beta=1.0, alpha=0.25)
    probs = F.softmax(scores.view(batch, heads, length, -1), dim=-1, dtype=torch.float32).to(q.dtype)
    merged = torch.bmm(probs.view(batch * heads, length, -1), v.reshape(batch * heads, -1, dim))
    return merged.view(batch, heads, length, dim)


@spelling()
def einsum_heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.25
    return torch.einsum("b h i j, b h j d -> b h i d", sim.softmax(dim=-1), v)


@spelling()
def einsum_length_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    probs = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", [q / 4, k]), dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", probs, v).transpose(1, 2)


@spelling()
def einsum_keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Transformer-XL: the softmax runs over the second of four axes, which are the keys."""
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    scores = torch.einsum("ibnd,jbnd->ijbn", q, k) * 0.25
    return torch.einsum("ijbn,jbnd->ibnd", F.softmax(scores, dim=1), v).permute(1, 2, 0, 3)


@spelling()
def einsum_dots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("...qk,...kd->...qd", torch.einsum("...qd,...kd->...qk", q, k).softmax(-1), v)


@spelling()
def keys_times_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probs = torch.softmax(k @ q.transpose(-1, -2) * 0.25, dim=-2)
    return (v.transpose(-1, -2) @ probs).transpose(-1, -2)


@spelling()
def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q[:, 0], k[:, 0], v[:, 0]
    return ((q @ k.transpose(1, 2)) * 0.25).softmax(-1).bmm(v)


@spelling()
def learned_temperature(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swin V2: a scale for each head."""
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    temperature = (wave(q.shape[1], 1, 1, like=q) + 2).exp()
    return ((q @ k.transpose(-2, -1)) * temperature).softmax(dim=-1) @ v


@spelling()
def shifted_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.25 + 3.0 - 1).softmax(-1) @ v


@spelling()
def softmax_in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


@spelling()
def cast_there_and_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.float() @ k.float().transpose(-1, -2)).div(4)
    return (scores.float().softmax(-1).type_as(q) @ v).contiguous()


@spelling("no mask")
def softcapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2)) * 0.25
    return (torch.tanh(scores / 5.0) * 5.0).softmax(-1) @ v


@spelling()
def scaled_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probs = ((q @ k.mT) * 0.25).softmax(-1)
    return (probs * wave(1, q.shape[1], 1, 1, like=q)) @ v * 0.5


@spelling()
def viewed_result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = ((q @ k.mT) * 0.25).softmax(-1) @ v
    return out.view(-1, *out.shape[2:]).view(out.shape)


# --- grouped heads


def _few(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] // 2]


@spelling()
def repeat_interleave(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (_few(x).repeat_interleave(2, dim=1) for x in (k, v))
    return ((q @ k.mT) * 0.25).softmax(-1) @ v


@spelling("causal")
def repeat_kv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    k, v = (
        _few(x)[:, :, None, :, :].expand(batch, heads // 2, 2, length, dim).reshape(batch, heads, length, dim)
        for x in (k, v)
    )
    keep = torch.ones(length, length, dtype=torch.bool).tril()
    return ((q @ k.transpose(2, 3)) * 0.25).masked_fill(keep.logical_not(), -math.inf).softmax(-1) @ v


@spelling()
def repeated_the_other_way(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head h reads key head h modulo their number: not grouped-query attention, and kept as it is."""
    k, v = (_few(x).repeat(1, 2, 1, 1) for x in (k, v))
    return ((q @ k.mT) * 0.25).softmax(-1) @ v


@spelling()
def grouped_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    q = q.reshape(batch, heads // 2, 2, length, dim)
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q, _few(k)) * 0.25
    return torch.einsum("bhgqk,bhkd->bhgqd", scores.softmax(-1), _few(v)).reshape(batch, heads, length, dim)


@spelling()
def broadcast_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    scores = q.view(batch, heads // 2, 2, length, dim) @ _few(k)[:, :, None].transpose(-1, -2) / 4
    return (scores.softmax(-1) @ _few(v)[:, :, None]).flatten(1, 2)


@spelling()
def multi_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sim = torch.einsum("bhid,bjd->bhij", q, k[:, 0]) * 0.25
    return torch.einsum("bhij,bjd->bhid", sim.softmax(-1), v[:, 0])


@spelling("causal")
def multi_query_heads_in_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-BigCode: the heads are rows of one product."""
    batch, heads, length, dim = q.shape
    scores = torch.baddbmm(
        torch.empty(batch, heads * length, length, dtype=q.dtype),
        q.reshape(batch, heads * length, dim),
        k[:, 0].transpose(1, 2),
        beta=0,
        alpha=0.25,
    ).view(batch, heads, length, length)
    keep = torch.ones((length, length), dtype=torch.bool).tril()
    probs = torch.where(keep, scores, torch.full([], -math.inf, dtype=q.dtype)).softmax(-1)
    return torch.bmm(probs.view(batch, heads * length, length), v[:, 0]).view(batch, heads, length, dim)


# --- masks


@spelling("causal")
def tril_masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[2]
    mask = torch.tril(torch.ones(length, length)).view(1, 1, length, length)
    scores = (q @ k.transpose(-2, -1)) * 0.25
    return F.softmax(scores.masked_fill(mask[:, :, :length, :length] == 0, float("-inf")), dim=-1) @ v


@spelling("causal")
def triu_of_infinities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT) * 0.25
    scores = scores + torch.triu(torch.full((q.shape[2], k.shape[2]), float("-inf")), diagonal=1)
    return scores.softmax(-1) @ v


@spelling("causal")
def where_of_lowest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.tril(torch.ones((q.shape[2], k.shape[2]), dtype=torch.bool))
    scores = torch.where(keep, q @ k.mT, torch.finfo(q.dtype).min)
    return (scores * 0.25).softmax(-1) @ v


@spelling("causal")
def arange_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    scores.mul_(0.25)
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    scores.masked_fill_(j > i, -1e9)
    return scores.softmax(-1) @ v


@spelling("causal")
def bottom_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """x-transformers: the last query sees the last key."""
    q = q[:, :, -7:]
    i, j = q.shape[2], k.shape[2]
    sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.25
    sim = sim.masked_fill(torch.ones((i, j), dtype=torch.bool).triu(j - i + 1), -torch.finfo(sim.dtype).max)
    return torch.einsum(
        "b h i j, b h j d -> b h i d", F.softmax(sim, dim=-1, dtype=torch.float32).type(sim.dtype), v
    )


@spelling("window of 3 before and 0 behind")
def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    keep = torch.tril(ones) & ~torch.tril(ones, diagonal=-4)
    return ((q @ k.mT) * 0.25).masked_fill(~keep, -1e9).softmax(-1) @ v


@spelling("window of 2 before and 3 behind")
def window_by_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask of no kind that is followed, but computed from nothing: it is computed to see what it is."""
    length = q.shape[2]
    away = torch.arange(length)[None] - torch.arange(length)[:, None]
    keep = (away * 2 - 1).abs() <= 5
    return ((q @ k.mT) * 0.25).masked_fill(~keep, -1e9).softmax(-1) @ v


@spelling("bool mask")
def off_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query sees the keys before its own; the first sees none, and is the mean of all."""
    keep = torch.tril(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool), diagonal=-1)
    return ((q @ k.mT) * 0.25).masked_fill(~keep, -1e9).softmax(-1) @ v


@spelling("causal & bool mask")
def causal_with_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mask of transformers: two keys of the first sequence are padding, its first two rows empty."""
    there = wave(q.shape[0], k.shape[2], like=q) * 0 + torch.arange(k.shape[2]).to(q.dtype)
    there = (there + torch.arange(q.shape[0])[:, None].to(q.dtype) * 2) >= 2
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()[None, None] & there[:, None, None]
    low = torch.finfo(q.dtype).min
    mask = torch.where(keep, torch.zeros((), dtype=q.dtype), low)
    return ((q @ k.mT) * 0.25 + mask).softmax(-1) @ v


@spelling("causal & bool mask")
def softcapped_with_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma 2, of which rows are empty too."""
    there = torch.arange(k.shape[2]) >= torch.arange(q.shape[0])[:, None] * 3
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()[None, None] & there[:, None, None]
    mask = torch.where(keep, torch.zeros((), dtype=q.dtype), torch.finfo(q.dtype).min)
    k, v = (_few(x).repeat_interleave(2, dim=1) for x in (k, v))
    return (torch.tanh((q @ k.mT) * 0.5) * 2.0 + mask).softmax(-1) @ v


@spelling("bool mask")
def padding_filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All keys of the first sequence are padding."""
    hidden = (wave(q.shape[0], k.shape[2], like=q) > 0.5) | (torch.arange(q.shape[0]) == 0)[:, None]
    return ((q @ k.mT) * 0.25).masked_fill(hidden[:, None, None, :], -1e9).softmax(-1) @ v


@spelling("bool mask")
def padding_zeroed_behind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ESPnet: what is masked is 0 behind the softmax too, so an empty row is 0."""
    hidden = ((wave(q.shape[0], k.shape[2], like=q) > 0.5) | (torch.arange(q.shape[0]) == 0)[:, None])[
        :, None, None
    ]
    scores = ((q @ k.mT) * 0.25).masked_fill(hidden, torch.finfo(q.dtype).min)
    return torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0) @ v


@spelling("bias")
def float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (1.0 - (wave(q.shape[0], 1, 1, k.shape[2], like=q) > -0.5).float().round()) * -10000.0
    return ((q @ k.mT) * 0.25 + mask.exp().log().clamp(min=-50)).softmax(-1) @ v


@spelling("bias")
def relative_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    table = wave(16, q.shape[1], like=q) + q.mean() * 0
    away = (torch.arange(k.shape[2])[None] - torch.arange(q.shape[2])[:, None]).clamp(-8, 7) + 8
    bias = F.embedding(away, table).permute(2, 0, 1).unsqueeze(0)
    return (q @ k.mT + bias).softmax(-1) @ v


@spelling("causal & bias")
def bias_then_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT - wave(q.shape[1], q.shape[2], k.shape[2], like=q)) * 0.25
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf).softmax(-1) @ v


@spelling("bool mask")
def mask_written_into(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Not causal any more, once the first rows see everything."""
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    keep[:3] = True
    return ((q @ k.mT) * 0.25).masked_fill(~keep, -math.inf).softmax(-1) @ v


@spelling("bool mask")
def mask_joined_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    keep |= torch.ones_like(keep).triu(3)
    return ((q @ k.mT) * 0.25).masked_fill(~keep, -torch.inf).softmax(-1) @ v


@spelling()
def multiplied_by_dunder(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    doubled = q.__mul__(2.0)
    return ((q @ k.mT) * 0.25).softmax(-1) @ v + doubled.__rsub__(1.0) - q


@spelling()
def permuted_by_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ torch.permute(k, dims=(0, 1, 3, 2)) * 0.25
    return torch.permute(torch.permute(scores, dims=(1, 0, 2, 3)).softmax(-1), dims=(1, 0, 2, 3)) @ v


@spelling()
def viewed_behind_a_gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.dropout(((q @ k.mT) * 0.25).softmax(-1) @ v * torch.sigmoid(q), training=False)
    return out.view(q.shape[0] * q.shape[1], q.shape[2], q.shape[3])


@spelling()
def viewed_behind_two_transposes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = (((q @ k.mT) * 0.25).softmax(-1) @ v).transpose(1, 2).relu()
    return out.transpose(1, 2).view(q.shape[0], -1)


@spelling("bool mask & bias")
def shifted_windows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Swin: a mask for each window, a bias for each head, the windows in the batch."""
    q, k, v = (torch.cat((x, -x)) for x in (q, k, v))
    windows, (batch, heads, length, _) = 2, q.shape
    scores = (q * 0.25) @ k.mT + wave(heads, length, length, like=q).unsqueeze(0)
    hidden = wave(windows, length, length, like=q) > 0.8
    mask = torch.zeros_like(hidden, dtype=q.dtype).masked_fill(hidden, -math.inf)
    scores = scores.view(batch // windows, windows, heads, length, length) + mask.unsqueeze(1).unsqueeze(0)
    return scores.view(-1, heads, length, length).softmax(-1) @ v


def _low(keep: Tensor, like: Tensor) -> Tensor:
    return torch.where(keep, torch.zeros((), dtype=like.dtype), torch.finfo(like.dtype).min)


@spelling("bias")
def permuted_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of the same shape as what it is taken from, and another."""
    bias = wave(q.shape[0], 1, q.shape[2], k.shape[2], like=q)[[1, 0]]
    return (q @ k.mT + bias).softmax(-1) @ v


@spelling("bias")
def permuted_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    mask = _low(keep, q)[torch.arange(q.shape[2]).flip(0)]
    return (q @ k.mT + mask).softmax(-1) @ v


@spelling("bias")
def bias_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        bias = q.mean(-1, keepdim=True).mT.contiguous()
    return (q @ k.mT + bias).softmax(-1) @ v


@spelling()
def keys_repeated_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        k = _few(k).repeat_interleave(2, dim=1)
    return ((q @ k.mT) * 0.25).softmax(-1) @ v.repeat_interleave(1, dim=1)


@spelling("bool mask & bias")
def bias_of_empty_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """T5 whose first sequence is padding: its bias has a gradient there too."""
    there = torch.arange(k.shape[2]) >= torch.arange(q.shape[0]).flip(0)[:, None] * k.shape[2]
    bias = torch.einsum("bhqd,bhkd->hqk", q, q.flip(2)) / 64
    return ((q @ k.mT) * 0.25 + (bias + _low(there[:, None, None], q))).softmax(-1) @ v


@spelling("bool mask")
def small_integers_wrap_around(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i = torch.zeros(q.shape[2], 1, dtype=torch.uint8) + 250 + 10
    hidden = (i > 100) | (torch.arange(k.shape[2]) > 5)
    return (q @ k.mT).masked_fill(hidden, -math.inf).softmax(-1) @ v


@spelling()
def bias_of_other_bits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The bits of 1.0 as an int32, which is not 1."""
    bits = torch.ones(q.shape[2], k.shape[2]).tril().view(torch.int32)
    return (q @ k.mT + torch.where(bits == 1, -math.inf, 0.0)).softmax(-1) @ v


@spelling("bool mask")
def mask_drawn_at_random(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Drawn at every call, though the chance is nearly none."""
    drawn = torch.poisson(torch.full((q.shape[2], k.shape[2]), 1e-9)) > 0.5
    hidden = drawn | (torch.arange(k.shape[2]) * 2 > 12)
    return (q @ k.mT).masked_fill(hidden, -math.inf).softmax(-1) @ v
