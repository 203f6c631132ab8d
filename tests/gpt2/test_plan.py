"""What a run is told to take, against counts by hand."""

from __future__ import annotations

from dataclasses import replace

import torch

import fastattn
from fastattn.gpt2 import plan
from fastattn.gpt2.config import GPT2Config
from fastattn.gpt2.model import GPT2
from fastattn.gpt2.options import Options


def test_counts_of_the_plan(monkeypatch):
    options = Options(size="gpt2", batch=2, steps=10, device="cpu", attention="standard", fused="none")
    options = options.resolved()
    with torch.device("meta"):
        model = GPT2(GPT2Config())
    counts = plan.make_plan(model, options, torch.float32)
    assert counts.tokens == 20480 and counts.parameters == 124_439_808
    # 12 layers of 12 n_embd^2 and the head, and biases left out; half of L x L for causal attention
    products = 12 * 12 * 768**2 + 50257 * 768
    assert counts.flops == 20480 * (6 * products + 6 * 12 * 1024 * 768)
    square = 2 * 1024 * 1024 * 12 * (12 * 9 + 12)
    found = fastattn.Explanation("cpu", {})
    monkeypatch.setattr(fastattn, "explain", lambda *tensors, **arguments: found)
    ours = plan.make_plan(model, replace(options, attention="fastattn"), torch.float32)
    assert counts.memory - ours.memory == square

    # without a kernel to run, ours holds the scores too
    found = fastattn.Explanation("reference", {"cpu": ["no compiler"]})
    slow = plan.make_plan(model, replace(options, attention="fastattn"), torch.float32)
    assert slow.memory - ours.memory == 2 * 1024 * 1024 * 12 * (12 * 9 + 24)

    # of the fused operations: no input of the MLP's second product, no dropout's masks, no logits
    fused = plan.make_plan(
        model, replace(options, attention="fastattn", fused="mlp,norm,loss"), torch.float32
    )
    saved = 2 * 1024 * 12 * (4 * 4 * 768 + 2 * 768) + 2 * 1024 * 50257 * 12 - 50257 * 768 * 4 - (64 << 20)
    assert slow.memory - fused.memory == saved
