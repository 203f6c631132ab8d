"""`fastattn.CausalSelfAttention` against nanoGPT's module, with and without its mask buffer."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastattn


@dataclass
class GPTConfig:
    """nanoGPT's, with small numbers."""

    block_size: int = 16
    vocab_size: int = 65
    n_layer: int = 2
    n_head: int = 3
    n_embd: int = 24
    dropout: float = 0.0
    bias: bool = True


class NanoGPTAttention(nn.Module):
    """The equations, names and buffer of nanoGPT's CausalSelfAttention without fused attention."""

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        size = config.block_size
        self.register_buffer("bias", torch.tril(torch.ones(size, size)).view(1, 1, size, size))

    def forward(self, x):
        length, width = x.shape[1:]
        q, k, v = (
            y.unflatten(2, (self.n_head, -1)).transpose(1, 2) for y in self.c_attn(x).split(width, dim=2)
        )
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.shape[-1])
        scores = scores.masked_fill(self.bias[:, :, :length, :length] == 0, float("-inf"))
        return self.c_proj((F.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 7, 16])
def test_matches_nanogpt(length, bias):
    config = GPTConfig(bias=bias)
    theirs = NanoGPTAttention(config)
    ours = fastattn.CausalSelfAttention(config)
    ours.load_state_dict(theirs.state_dict())  # mask buffer and all
    results = []
    x = torch.randn(2, length, config.n_embd)
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        out.square().sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in module.parameters())])
    for expected, found in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=2e-6 * max(1, float(expected.detach().abs().max())))


def test_state_dict_is_nanogpts_with_fused_attention():
    names = ["c_attn.weight", "c_attn.bias", "c_proj.weight", "c_proj.bias"]
    assert list(fastattn.CausalSelfAttention(GPTConfig()).state_dict()) == names
    # nanoGPT's crop_block_size cuts `attn.bias` where there is one.
    assert not hasattr(fastattn.CausalSelfAttention(GPTConfig()), "bias")


def test_loads_inside_a_model():
    theirs = nn.ModuleDict({"h": nn.ModuleList([NanoGPTAttention(GPTConfig()) for _ in range(2)])})
    ours = nn.ModuleDict({"h": nn.ModuleList([fastattn.CausalSelfAttention(GPTConfig()) for _ in range(2)])})
    state = theirs.state_dict()
    ours.load_state_dict(state)
    assert "h.1.bias" in state  # the caller's own is left as it was
    assert torch.equal(ours["h"][1].c_attn.weight, theirs["h"][1].c_attn.weight)
    with pytest.raises(RuntimeError, match="bias_of_another"):
        ours.load_state_dict({**state, "h.0.bias_of_another": torch.ones(1)})


def test_both_signatures_are_one():
    torch.manual_seed(0)
    one = fastattn.CausalSelfAttention(GPTConfig(dropout=0.2, bias=False))
    torch.manual_seed(0)
    other = fastattn.CausalSelfAttention(24, 3, dropout=0.2, bias=False)
    assert repr(one) == repr(other)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert one.dropout == other.dropout == 0.2


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((24,), {}, TypeError, "n_embd alone"),
        ((GPTConfig(), 3), {}, TypeError, "got both"),
        ((GPTConfig(),), {"bias": True}, TypeError, "got both"),
        ((25, 3), {}, ValueError, "multiple of n_head=3, got 25"),
        ((24, 0), {}, ValueError, "n_head=0"),
        ((24, 3), {"dropout": 1.0}, ValueError, r"dropout: expected .* in \[0, 1\), got 1.0"),
        ((24, 3), {"dropout": -0.1}, ValueError, r"got -0.1"),
        ((GPTConfig(dropout=1.0),), {}, ValueError, r"got 1.0"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fastattn.CausalSelfAttention(*arguments, **options)


def test_dropout_in_training_alone():
    attn = fastattn.CausalSelfAttention(24, 3, dropout=0.5)
    x = torch.randn(2, 16, 24)
    assert not torch.equal(attn(x), attn(x))
    attn.eval()
    assert torch.equal(attn(x), attn(x))


def test_projection_is_not_copied(monkeypatch):
    seen = []

    def spy(q, k, v, **options):
        seen.extend(x.untyped_storage().data_ptr() for x in (q, k, v))
        return fastattn.attention(q, k, v, **options)

    monkeypatch.setattr("fastattn.nn.attention.attention", spy)
    fastattn.CausalSelfAttention(24, 3)(torch.randn(2, 5, 24))
    assert len(set(seen)) == 1


def test_compiles_whole_and_for_any_length():
    attn = fastattn.CausalSelfAttention(24, 3)
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(attn, backend=backend, fullgraph=True, dynamic=True)
    for length in (5, 9, 33):
        x = torch.randn(2, length, 24)
        assert torch.allclose(compiled(x), attn(x), atol=1e-6)
    assert len(frames) == 1
