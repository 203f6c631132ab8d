"""The child process of a search: one training step of our GPT-2 at a context, measured.

``{"do": "train", "context": 4096, "config": {…}, "x": path}`` is answered with the step's loss, time and
highest memory, and with what the profiler saw in the warm-up. A process serves one such command: the next
context begins with nothing left behind.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

import fastattn
from fastattn.gpt2.compare.child import (
    give_back_memory,
    limit_device_memory,
    peak_bytes,
    reset_peak,
    resident,
    serve,
    synchronize,
)
from fastattn.gpt2.config import GPT2Config
from fastattn.gpt2.model import GPT2
from fastattn.gpt2.optim import make_optimizer
from fastattn.machine import Machine, kernels_of

WARM_UP_TOKENS: Final = 64  # of a step before, which makes the optimizer's state and loads the kernels
_LEARNING_RATE: Final = 3e-4


class Trainer:
    """One implementation's GPT-2 and its optimizer.

    Args:
        spec: what `Settings.worker_spec` made.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.device = torch.device(spec["device"])
        limit_device_memory(self.device, spec["device_memory"])

    def train(self, command: dict[str, Any]) -> dict[str, Any]:
        """One step at ``command["context"]`` tokens, behind a short one."""
        libraries = resident() if self.device.type == "cpu" else 0
        config = GPT2Config(**command["config"])
        torch.manual_seed(self.spec["seed"])
        model = GPT2(config, self.spec["attention"], self.spec["fused"]).to(self.device)
        model.transformer.gradient_checkpointing = self.spec["checkpoint"]
        optimizer = make_optimizer(model, lr=_LEARNING_RATE)
        ids = torch.load(command["x"], weights_only=True).to(self.device)
        kernel = kernels_of(
            Machine(dry_run=False, device=self.spec["device"]),
            lambda: self._step(model, optimizer, ids[:, : WARM_UP_TOKENS + 1]),
        )
        give_back_memory(self.device)  # the profiler's
        measurable = reset_peak(self.device)
        synchronize(self.device)
        start = time.perf_counter()
        loss = self._step(model, optimizer, ids)
        synchronize(self.device)
        parameters, ours = list(model.parameters()), self.spec["attention"] == "fastattn"
        return {
            "loss": loss,
            "ms": 1000 * (time.perf_counter() - start),
            "peak_bytes": peak_bytes(self.device) if measurable else None,
            "libraries_bytes": libraries,
            "parameters": sum(p.numel() for p in parameters),
            # weights, gradients and AdamW's two moments
            "model_bytes": 4 * sum(p.numel() * p.element_size() for p in parameters),
            "threads": torch.get_num_threads(),
            "kernel": f"{self._backend(config, command['context'])}: {kernel}" if ours else kernel,
        }

    def _step(self, model: GPT2, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
        low = self.spec["dtype"] != "float32"
        autocast = torch.autocast(self.device.type, torch.bfloat16) if low else contextlib.nullcontext()
        with autocast:
            loss = model.loss(ids[:, :-1], ids[:, 1:], chunk=self.spec["loss_chunk"])
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _backend(self, config: GPT2Config, context: int) -> str:
        """Our backend for this model's attention, as `fastattn.explain` says."""
        dtype = getattr(torch, self.spec["dtype"])
        q = torch.empty(1, device=self.device, dtype=dtype)
        q = q.expand(1, config.n_head, context, config.head_dim).requires_grad_()
        return str(fastattn.explain(q, q, q, mask=fastattn.causal(), dropout=config.attn_pdrop).backend)


def _start(spec: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return Trainer(spec).train


if __name__ == "__main__":
    serve(_start)
