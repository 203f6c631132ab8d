"""The child process of a comparison: one implementation's GPT-2, built and stepped as the parent says.

Commands come as JSON lines on standard input, answers go as JSON lines to standard output:
``{"do": "build", "context": 1024, "dropout": 0.1}`` makes the model anew from the seed and
``{"do": "step", "batches": path, "index": 0}`` trains on one batch.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import queue
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

import fastattn

# The optimiser of GPT-2's reproductions (Brown et al. 2020, appendix B; nanoGPT), the learning rate for a
# small batch and no warm-up.
OPTIMIZER: Final[dict[str, Any]] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}


class Trainer:
    """A `transformers.GPT2LMHeadModel` with one attention implementation, and its optimiser.

    Args:
        spec: what `Settings.worker_spec` made: ``attention`` (transformers' attn_implementation), ``config``
            (of GPT2Config), ``seed``, ``device``, ``dtype`` and ``device_memory`` (bytes, or None).
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.device = torch.device(spec["device"])
        self.dtype = getattr(torch, spec["dtype"])
        if spec["attention"] == "fastattn":
            from fastattn.integrations.transformers import register  # noqa: PLC0415

            register()
        if self.device.type == "cuda" and spec["device_memory"]:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, spec["device_memory"] / total), self.device)
        import transformers  # noqa: PLC0415, so that its lack is an answer

        self.transformers = transformers
        self.libraries_bytes = _resident() if self.device.type == "cpu" else 0
        self.model: Any = None
        self.optimizer: Any = None
        self.batches: tuple[str, Tensor, Tensor] | None = None

    def build(self, context: int, dropout: float) -> dict[str, Any]:
        """The model with the seed's initial weights; drops the one there was."""
        self.model = self.optimizer = None
        _give_back_memory(self.device)
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
        self.model = model.to(self.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **OPTIMIZER)
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
        resets = self._reset_peak()
        self._synchronize()
        start = time.perf_counter()
        autocast = (
            torch.autocast(self.device.type, self.dtype)
            if self.dtype != torch.float32
            else contextlib.nullcontext()
        )
        with autocast:
            logits = self.model(x, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
        del logits
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        self._synchronize()
        return {
            "loss": value,
            "ms": 1000 * (time.perf_counter() - start),
            "peak_bytes": self._peak() if resets else None,
        }

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

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _reset_peak(self) -> bool:
        """Start a new high-water mark; False where the system has none that can be reset."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _resident() -> int:
    try:
        return _status("VmRSS")
    except OSError:
        import resource  # noqa: PLC0415, not on every platform

        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _give_back_memory(device: torch.device) -> None:
    """Return what a dropped model leaves in the allocators, so that it is not in the next one's peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library without malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def _digest(model: torch.nn.Module) -> str:
    sha = hashlib.sha256()
    for parameter in model.parameters():
        sha.update(parameter.detach().contiguous().numpy().data)
    return sha.hexdigest()


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def main() -> None:
    """Answer commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    with contextlib.suppress(OSError):  # should the machine run out after all, end this process first
        Path("/proc/self/oom_score_adj").write_text("1000")

    commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            commands.put(json.loads(line))
        os._exit(0)  # the parent is gone, even in the middle of a step

    threading.Thread(target=read, daemon=True).start()
    trainer: Trainer | None = None
    while True:
        command = commands.get()
        try:
            if trainer is None:
                trainer = Trainer(json.loads(sys.argv[1]))
            if command["do"] == "build":
                answer = trainer.build(command["context"], command["dropout"])
            else:
                answer = trainer.step(*trainer.batch(command["batches"], command["index"]))
        except Exception as error:
            traceback.print_exc()
            kind = "out of memory" if _is_out_of_memory(error) else "error"
            answer = {kind: f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
