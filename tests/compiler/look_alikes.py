"""What looks like naive attention and is not, or can't be replaced, and the reason that is given."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiler.spellings import Spelling, _low, wave

LOOK_ALIKES: dict[str, tuple[Spelling, str]] = {}


def look_alike(reason: str) -> Callable[[Spelling], Spelling]:
    def note(function: Spelling) -> Spelling:
        LOOK_ALIKES[function.__name__] = (function, reason)
        return function

    return note


@look_alike("the softmax does not run over the axis that the values are summed over")
def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.25).softmax(dim=-2) @ v


@look_alike("the probabilities have another user")
def probabilities_used_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probs = ((q @ k.mT) * 0.25).softmax(-1)
    return probs @ v + probs.sum()


@look_alike("the scores have another user")
def scores_used_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT) * 0.25
    return scores.softmax(-1) @ v + scores.mean()


@look_alike("the scores go through softmax")
def two_softmaxes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.25).softmax(-1).softmax(-1) @ v


@look_alike("the scores go through cumsum")
def softmax_of_an_input(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q[..., :1].expand(-1, -1, -1, v.shape[2]).cumsum(-1).softmax(-1) @ v


@look_alike("a mask that puts in -5, which does not hide a key for certain")
def masked_by_a_little(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return ((q @ k.mT) * 0.25).masked_fill(~keep, -5.0).softmax(-1) @ v


@look_alike("the scores go through relu")
def relu_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * 0.25).relu().softmax(-1) @ v


@look_alike("the scores are multiplied by a tensor")
def scaled_by_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT) * wave(k.shape[2], like=q)).softmax(-1) @ v


@look_alike("the scores are multiplied by a tensor behind a mask, a bias or tanh")
def gated_after_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT + wave(q.shape[2], k.shape[2], like=q)) * wave(q.shape[1], 1, 1, like=q)).softmax(
        -1
    ) @ v


@look_alike("the softmax does not run over the axis that the values are summed over")
def talking_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mix = wave(q.shape[1], q.shape[1], like=q)
    return torch.einsum("hg,bgij->bhij", mix, ((q @ k.mT) * 0.25).softmax(-1)) @ v


@look_alike("probabilities set to 0 where the scores are not masked")
def masked_behind_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return ((q @ k.mT) * 0.25).softmax(-1).masked_fill(hidden, 0.0) @ v


@look_alike("a mask that puts in something other than one number")
def filled_from_what_was_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    low = torch.full((q.shape[2], k.shape[2]), -1e9)
    low[:, 0] = 0.0
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return torch.where(keep, (q @ k.mT) * 0.25, low).softmax(-1) @ v


@look_alike("one of its inputs is written into before its end")
def values_changed_meanwhile(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    changed = q.detach() * 1.0
    probs = ((changed @ k.detach().mT) * 0.25).softmax(-1)
    changed.zero_()
    return probs @ v + changed


@look_alike("masks by finite numbers of which a row may have nothing else")
def two_finite_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = wave(q.shape[0], k.shape[2], like=q) > 0
    scores = ((q @ k.mT) * 0.25).masked_fill(hidden[:, None, None], -1e5)
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -1e9).softmax(-1) @ v


@look_alike("the scores are written into something else")
def written_into_the_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = wave(q.shape[0], q.shape[1], q.shape[2], k.shape[2], like=q) * 1.5
    bias += q @ k.mT
    return bias.softmax(-1) @ v


@look_alike("a mask that puts in something other than one number")
def filled_from_what_relu_wrote(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    low = torch.full((q.shape[2], k.shape[2]), -1e9)
    F.relu(low, inplace=True)
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return torch.where(keep, (q @ k.mT) * 0.25, low).softmax(-1) @ v


@look_alike("a mask that puts in something other than one number")
def filled_from_a_list_of_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    low = torch.full((q.shape[2], k.shape[2]), -1e9)
    torch._foreach_mul_([low], 0.0)
    keep = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return torch.where(keep, (q @ k.mT) * 0.25, low).softmax(-1) @ v


@look_alike("a bias that may hide what it leaves of a row")
def causal_fill_then_padding_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2 of old: rows of left padding have nothing but the one number or the other."""
    there = (torch.arange(k.shape[2]) >= torch.arange(q.shape[0])[:, None] * 3).to(q.dtype)
    padding = (1.0 - there[:, None, None].sin().asin().round()) * torch.finfo(q.dtype).min
    scores = torch.where(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), q @ k.mT, -1e9)
    return (scores + padding).softmax(-1) @ v


@look_alike("a bias that is added behind a mask by a finite number")
def bias_behind_a_finite_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = (q @ k.mT).masked_fill(hidden, -1e4) + wave(q.shape[2], k.shape[2], like=q)
    return scores.softmax(-1) @ v


@look_alike("masks by finite numbers of which a row may have nothing else")
def finite_mask_and_an_infinite_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    there = torch.arange(k.shape[2]) >= torch.arange(q.shape[0])[:, None] * 3
    scores = q @ k.mT + _low(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(), q)
    return scores.masked_fill(~there[:, None, None], -math.inf).softmax(-1) @ v


@look_alike("masks by finite numbers of which a row may have nothing else")
def added_number_that_keeps_digits(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return (q @ k.mT * 40 + torch.where(hidden, -1e9, 0.0)).softmax(-1) @ v


@look_alike("keys of 2 heads and values of 4")
def fewer_heads_of_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :2], v, enable_gqa=True)
