"""The child process of a comparison: one implementation's GPT-2, built and stepped as the parent says.

Commands come as JSON lines on standard input, answers go as JSON lines to standard output:
``{"do": "build", "context": 1024, "dropout": 0.1}`` makes the model anew from the seed and
``{"do": "step", "batches": path, "index": 0}`` trains on one batch, ``"profile"`` too, under the profiler.
"""

from __future__ import annotations

import contextlib
import hashlib
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
from fastattn.gpt2.model import FUSED, GPT2
from fastattn.machine import Machine, kernels_of
from fastattn.optim import AdamW

# The optimiser of GPT-2's reproductions (Brown et al. 2020, appendix B; nanoGPT), the learning rate for a
# small batch and no warm-up.
OPTIMIZER: Final[dict[str, Any]] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


class Trainer:
    """One implementation's GPT-2, transformers' or our own with its weights, and its optimiser.

    Args:
        spec: what `Settings.worker_spec` made: ``attention`` (transformers' attn_implementation),
            ``compiled``, ``own``, ``config`` (of GPT2Config), ``seed``, ``device``, ``dtype`` and
            ``device_memory`` (bytes, or None).
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.device = torch.device(spec["device"])
        self.dtype = getattr(torch, spec["dtype"])
        if spec["attention"] == "fastattn":
            from fastattn.integrations.transformers import register  # noqa: PLC0415

            register()
        limit_device_memory(self.device, spec["device_memory"])
        import transformers  # noqa: PLC0415, so that its lack is an answer

        self.transformers = transformers
        self.libraries_bytes = resident() if self.device.type == "cpu" else 0
        self.model: Any = None
        self.optimizer: Any = None
        self.loss: Callable[[Any, Tensor, Tensor], Tensor] = GPT2.loss if spec["own"] else _loss
        self.batches: tuple[str, Tensor, Tensor] | None = None

    def build(self, context: int, dropout: float) -> dict[str, Any]:
        """The model with the seed's initial weights; drops the one there was."""
        self.model = self.optimizer = None
        give_back_memory(self.device)
        config = self.transformers.GPT2Config(
            **self.spec["config"],
            n_positions=max(1024, context),
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_implementation=self.spec["attention"],
        )
        torch.manual_seed(self.spec["seed"])  # the weights, and after them the dropout
        model = self.transformers.GPT2LMHeadModel(config)
        weights = _digest(model)
        if self.spec["own"]:
            model = _own(model, dropout)
        self.model = model.to(self.device).train()
        if self.spec["own"]:
            self.optimizer = AdamW(self.model.parameters(), **OPTIMIZER)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), **OPTIMIZER, fused=True)
        if self.spec["compiled"]:
            self.loss = torch.compile(_loss, dynamic=False)
        parameters = list(self.model.parameters())
        return {
            "parameters": sum(p.numel() for p in parameters),
            "weights": weights,
            "libraries_bytes": self.libraries_bytes,
            # weights, gradients and AdamW's two moments
            "model_bytes": 4 * sum(p.numel() * p.element_size() for p in parameters),
            "threads": torch.get_num_threads(),
            "backend": self._backend(config, context, dropout),
        }

    def step(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """One training step on ``x`` and ``y``, ``[batch, context]``."""
        x, y = x.to(self.device), y.to(self.device)
        resets = reset_peak(self.device)
        synchronize(self.device)
        start = time.perf_counter()
        autocast = (
            torch.autocast(self.device.type, self.dtype)
            if self.dtype != torch.float32
            else contextlib.nullcontext()
        )
        with autocast:
            loss = self.loss(self.model, x, y)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        synchronize(self.device)
        return {
            "loss": value,
            "ms": 1000 * (time.perf_counter() - start),
            "peak_bytes": peak_bytes(self.device) if resets else None,
        }

    def profile(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """What ran in one more step, by the profiler."""
        kernel = kernels_of(Machine(dry_run=False, device=self.spec["device"]), lambda: self.step(x, y))
        give_back_memory(self.device)
        return {"kernel": kernel}

    def batch(self, path: str, index: int) -> tuple[Tensor, Tensor]:
        """A batch of the parent's file."""
        if self.batches is None or self.batches[0] != path:
            saved = torch.load(path, weights_only=True)
            self.batches = (path, saved["x"], saved["y"])
        return self.batches[1][index], self.batches[2][index]

    def _backend(self, config: Any, context: int, dropout: float) -> str | None:
        """What `fastattn.explain` says of this model's attention."""
        if self.spec["attention"] != "fastattn":
            return None
        shape = (1, config.n_head, context, config.n_embd // config.n_head)
        q = torch.empty(1, device=self.device, dtype=self.dtype).expand(shape)
        return str(fastattn.explain(q, q, q, mask=fastattn.causal(), dropout=dropout))


def _loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """Of transformers' model."""
    logits = model(x, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def _own(theirs: Any, dropout: float) -> GPT2:
    """`fastattn.gpt2.GPT2` with every fused operation, of the weights of transformers' model, not copied."""
    names = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
    config = GPT2Config(**{name: getattr(theirs.config, name) for name in names}).with_dropout(dropout)
    with torch.device("meta"):
        model = GPT2(config, "fastattn", FUSED)
    model.load_state_dict(theirs.state_dict(), assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model


def _digest(model: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for parameter in model.parameters():
        sha.update(parameter.detach().contiguous().numpy().data)
    return sha.hexdigest()


def _start(spec: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    trainer = Trainer(spec)

    def answer(command: dict[str, Any]) -> dict[str, Any]:
        if command["do"] == "build":
            return trainer.build(command["context"], command["dropout"])
        do = trainer.profile if command["do"] == "profile" else trainer.step
        return do(*trainer.batch(command["batches"], command["index"]))

    return answer


if __name__ == "__main__":
    serve(_start)
