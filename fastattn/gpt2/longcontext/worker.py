"""The child process of a search: one training step of our GPT-2 at a context, measured.

``{"do": "train", "context": 4096, "config": {…}, "x": path}`` is answered with the step's loss, time and
highest memory. A process serves one such command: the next context begins with nothing left behind.
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

WARM_UP_TOKENS: Final = 64  # of a step before, which makes the optimizer's state and loads the kernels
_LEARNING_RATE: Final = 3e-4
_SDPA: Final = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}


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
        self._step(model, optimizer, ids[:, : WARM_UP_TOKENS + 1])
        measurable = reset_peak(self.device)
        synchronize(self.device)
        start = time.perf_counter()
        loss = self._step(model, optimizer, ids)
        synchronize(self.device)
        parameters = list(model.parameters())
        return {
            "loss": loss,
            "ms": 1000 * (time.perf_counter() - start),
            "peak_bytes": peak_bytes(self.device) if measurable else None,
            "libraries_bytes": libraries,
            "parameters": sum(p.numel() for p in parameters),
            # weights, gradients and AdamW's two moments
            "model_bytes": 4 * sum(p.numel() * p.element_size() for p in parameters),
            "threads": torch.get_num_threads(),
            "kernel": self._kernel(config, command["context"]),
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

    def _kernel(self, config: GPT2Config, context: int) -> str:
        """What computes this model's attention, as torch and `fastattn.explain` say."""
        shape = (1, config.n_head, context, config.head_dim)
        dtype = getattr(torch, self.spec["dtype"])
        q = torch.empty(1, device=self.device, dtype=dtype).expand(shape).requires_grad_()
        if self.spec["attention"] == "fastattn":
            chosen = fastattn.explain(q, q, q, mask=fastattn.causal(), dropout=config.attn_pdrop)
            return str(chosen.backend)
        if self.spec["attention"] == "sdpa":
            choice: int = torch._fused_sdp_choice(q, q, q, None, config.attn_pdrop, True)
            return _SDPA.get(choice, str(choice))
        return "matmul, softmax, matmul"


def _start(spec: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return Trainer(spec).train


if __name__ == "__main__":
    serve(_start)
