"""Hugging Face transformers' models on fastattn's kernels.

>>> from fastattn.integrations.transformers import register
>>> register()  # doctest: +SKIP
>>> model.set_attn_implementation("fastattn")  # doctest: +SKIP

Works with gradient checkpointing, generation with dynamic and static caches, left and right padding,
sequences packed by `position_ids` or `cu_seq_lens_q`, sliding windows and chunks, soft caps and attention
sinks, grouped-query attention and `torch.compile`; padding, windows and packing cost memory in proportion to
the length, not to its square. `explain_model` tells which kernel each layer runs. Where all keys of a query
are masked (a padding token's own row) attention gives 0, as transformers' `sdpa` does; `eager` gives a mean
over all tokens there.
"""

from __future__ import annotations

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from fastattn.integrations.transformers.forward import attention_forward, explain, explain_model
from fastattn.integrations.transformers.masks import CompactMask, attention_mask

__all__ = ["CompactMask", "attention_forward", "attention_mask", "explain", "explain_model", "register"]


def register(name: str = "fastattn") -> None:
    """Make ``attn_implementation=name`` available to every transformers model.

    Registers the attention function and its mask function: with the first alone transformers would pass no
    mask at all, and padding would be attended to.

    Args:
        name: what to pass to `from_pretrained(attn_implementation=)` or `set_attn_implementation`.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> register()
        >>> config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16)
        >>> model = GPT2LMHeadModel(config)
        >>> model.set_attn_implementation("fastattn")
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 11])
    """
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)
