"""Trains transformers' GPT-2 with naive attention a step at a time: eager, compiled, or optimized.

    python -m bench.compiler.worker HOW LAYERSxHEADSxWIDTH TOKENS DROPOUT DTYPE DEVICE

A line on stdin is answered by a line of JSON: milliseconds of that step, its loss, its peak of memory, and
the milliseconds that the pass has taken so far; of the second step the kernels too.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

import fastattn.compiler
from fastattn.compiler import backend
from fastattn.gpt2.compare.child import peak_bytes, reset_peak
from fastattn.machine import Machine, kernels_of

HOWS = ("standard", "torch.compile", "fastattn.optimize")


def main() -> None:
    how, size, tokens, dropout, dtype, device = sys.argv[1:]
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, heads, width = (int(n) for n in size.split("x"))
    torch.manual_seed(0)
    p = float(dropout)
    config = GPT2Config(
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        n_positions=max(1024, int(tokens)),
        attn_pdrop=p,
        resid_pdrop=p,
        embd_pdrop=p,
        attn_implementation="eager",
    )
    model: Any = GPT2LMHeadModel(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    seconds = of_the_pass()
    if how == "torch.compile":
        model.compile()
    elif how == "fastattn.optimize":
        fastattn.optimize(model)
    ids = torch.randint(config.vocab_size, (1, int(tokens) + 1), device=device)
    half = getattr(torch, dtype)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, half, enabled=half != torch.float32):
            # The model's own loss logs a warning, which breaks the graph.
            logits = model(ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return float(loss)

    machine = Machine(dry_run=False, device=device)

    def answer(number: int) -> dict[str, Any]:
        said: dict[str, Any] = {}
        resets = number > 0 and reset_peak(machine.device)
        begin = time.perf_counter()
        if number == 1:
            said["kernel"] = kernels_of(machine, lambda: said.update(loss=step()), most=5)
        else:
            said["loss"] = step()
        machine.synchronize()
        said["ms"] = (time.perf_counter() - begin) * 1000
        said["peak_bytes"] = peak_bytes(machine.device) if resets else None
        if how == "fastattn.optimize" and number == 0:
            said["rewritten"] = fastattn.compiler.report().rewritten
        return said | {"pass_ms": seconds[0] * 1000}

    for number, _ in enumerate(sys.stdin):
        print(json.dumps(answer(number)), flush=True)


def of_the_pass() -> list[float]:
    """The seconds that the pass takes, added up in a list of one."""
    found, replace = [0.0], backend.rewrite

    def timed(module: Any) -> Any:
        begin = time.perf_counter()
        try:
            return replace(module)
        finally:
            found[0] += time.perf_counter() - begin

    backend.rewrite = timed
    return found


if __name__ == "__main__":
    main()
