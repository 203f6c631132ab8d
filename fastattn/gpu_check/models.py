"""What a user feels: a step of decoding, a training step of GPT-2, and the host's time for a call."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.gpu_check.cache_checks import Cached, Step
from fastattn.gpu_check.peers import OURS, version_of
from fastattn.gpu_check.races import copy_buffers
from fastattn.gpu_check.report import Absent, Report, reraise_if_lost, status_of
from fastattn.gpu_check.timing import Run, columns_of, interleaved
from fastattn.machine import Machine, Moment, kernels_of, version

# Eight sequences of 32k keys, the new one included.
_KEYS: Final = 32 * 1024
DECODE: Final = {
    "decode 32:8 D128": Step(heads=32, kv_heads=8, dim=128),
    "decode 12:12 D64": Step(heads=12, kv_heads=12, dim=64),
    "decode 32:8 D128 pages of 64": Step(heads=32, kv_heads=8, dim=128, page=64),
    "decode 32:8 D128 int8": Step(heads=32, kv_heads=8, dim=128, cache_dtype=torch.int8),
    "decode 32:8 D128 float8": Step(heads=32, kv_heads=8, dim=128, cache_dtype=torch.float8_e4m3fn),
}

FIRST: Final = ("decode 32:8 D128", "decode 12:12 D64")


def decode(report: Report, name: str) -> None:
    """One new token for each of eight sequences: how fast are keys and values read, against a copy?"""
    machine = report.machine
    keys, batch = (64, 1) if machine.dry_run else (_KEYS, 8)
    given = DECODE[name]
    step = replace(given, lengths=(keys - 1,) * batch, capacity=keys)
    if machine.dry_run:
        step = replace(step, heads=step.heads // 4, kv_heads=step.kv_heads // 4, dim=16)
    if not report.begin(name):
        return
    source, target = copy_buffers(report)
    problem = Cached(step, machine.device)
    moved = 2 * batch * step.kv_heads * keys * step.dim * step.stored.itemsize
    columns: dict[str, Any] = {
        "case": name,
        "passes": "forward",
        "dtype": str(step.stored).removeprefix("torch."),
        "batch": batch,
        "heads": step.heads,
        "kv_heads": step.kv_heads,
        "length": keys,
        "head_dim": step.dim,
    }
    calls: dict[str, Callable[[], Tensor]] = {OURS: lambda: problem.run(report.backend)}
    if step.page is None and step.cache_dtype is None:
        for peer, which in (
            ("sdpa default", None),
            ("sdpa flash", SDPBackend.FLASH_ATTENTION),
            ("sdpa cudnn", SDPBackend.CUDNN_ATTENTION),
            ("sdpa efficient", SDPBackend.EFFICIENT_ATTENTION),
        ):
            calls[peer] = _sdpa_step(problem, which)
        calls["flash-attn 2"] = _flash_step(problem)
    want = problem.wanted(sequences=1)
    runs: dict[str, Run] = {"copy": _timed(machine, lambda: target.copy_(source))}
    errors, kernels = {}, {}
    for peer, call in calls.items():
        try:
            out = call()[:1].double()
            budget = max(4 * torch.finfo(step.dtype).eps, 1e-5) * max(1.0, float(want.abs().max()))
            errors[peer] = float((out - want).abs().nan_to_num(nan=float("inf")).max()) / budget
            assert errors[peer] <= 1, (
                f"expected an error of at most {budget:.3g}, got {errors[peer]:.3g} times that"
            )
            kernels[peer] = kernels_of(machine, call)
            runs[peer] = _timed(machine, call)
        except Exception as failure:
            status, note = status_of(failure, peer=peer != OURS)
            report.row(**columns, implementation=peer, version=version_of(peer), status=status, note=note)
            reraise_if_lost(failure)
    taken = {peer: columns_of(parts[0]) for peer, parts in interleaved(machine, runs, report.left).items()}
    copied = 2 * source.numel() / taken.pop("copy")["p50_ms"] / 1e6
    for peer, found in taken.items():
        rate = moved / found["p50_ms"] / 1e6
        report.row(
            **columns,
            **found,
            implementation=peer,
            version=version_of(peer),
            kernel=(f"{report.backend}: " if peer == OURS else "") + kernels[peer],
            status="ok",
            error_of_budget=round(errors[peer], 3),
            gb_per_s=round(rate, 1),
            share_of_copy=round(rate / copied, 3),
            sm_mhz=machine.sm_mhz(),
        )


def _timed(machine: Machine, call: Callable[[], object]) -> Run:
    def run() -> list[Moment]:
        with torch.no_grad():
            start = machine.mark()
            call()
            return [start, machine.mark()]

    return run


def _sdpa_step(problem: Cached, which: SDPBackend | None) -> Callable[[], Tensor]:
    """Append by index, then torch's attention to all rows: the cache is full."""
    cache, grouped = problem.cache, problem.step.heads != problem.step.kv_heads

    def call() -> Tensor:
        cache.k[:, :, -1:] = problem.k
        cache.v[:, :, -1:] = problem.v
        return F.scaled_dot_product_attention(problem.q, cache.k, cache.v, enable_gqa=grouped)

    def forced() -> Tensor:
        assert which is not None
        with sdpa_kernel(which):
            return call()

    return call if which is None else forced


def _flash_step(problem: Cached) -> Callable[[], Tensor]:
    def call() -> Tensor:
        try:
            function = importlib.import_module("flash_attn").flash_attn_with_kvcache
        except ImportError as error:
            raise Absent(f"flash-attn is not installed ({error})") from error
        q, k, v, keys, values = (
            x.transpose(1, 2) for x in (problem.q, problem.k, problem.v, problem.cache.k, problem.cache.v)
        )
        out: Tensor = function(q, keys, values, k, v, cache_seqlens=problem.cache.lengths, causal=True)
        return out.transpose(1, 2)

    return call


class _Loss(nn.Module):
    """A model whose forward is the loss, whoever it is from."""

    def __init__(self, model: nn.Module, theirs: bool) -> None:
        super().__init__()
        self.model, self.theirs = model, theirs

    def forward(self, ids: Tensor) -> Tensor:
        if self.theirs:
            found: Tensor = self.model(ids, labels=ids).loss
            return found
        # As many tokens go in as there; of the last the next is not known.
        targets = F.pad(ids[:, 1:], (0, 1), value=-100)
        mine: Tensor = self.model.loss(ids, targets)  # type: ignore[operator]
        return mine


def gpt2(report: Report, context: int = 1024, batch: int = 8) -> None:
    """A training step of GPT-2 124M: bfloat16 autocast, dropout 0.1, AdamW, random tokens."""
    machine = report.machine
    if not report.begin("GPT-2 step"):
        return
    from fastattn.gpt2 import GPT2, GPT2Config  # noqa: PLC0415 - needs einops
    from fastattn.gpt2.optim import make_optimizer  # noqa: PLC0415

    sizes: dict[str, Any] = {
        "n_layer": 12,
        "n_head": 12,
        "n_embd": 768,
        "vocab_size": 50257,
        "n_positions": 1024,
    }
    if machine.dry_run:
        context, batch = 32, 2
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 101, "n_positions": 32}
    columns: dict[str, Any] = {
        "case": "GPT-2 step",
        "dtype": "bfloat16",
        "batch": batch,
        "heads": sizes["n_head"],
        "length": context,
        "head_dim": sizes["n_embd"] // sizes["n_head"],
    }
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(sizes["vocab_size"], (batch, context), generator=g).to(machine.device)
    with machine.device:
        weights = GPT2(GPT2Config(**sizes)).state_dict()
    makers: dict[str, Callable[[], nn.Module]] = {
        "fastattn.gpt2, fastattn": lambda: _Loss(GPT2(GPT2Config(**sizes), "fastattn"), theirs=False),
        "fastattn.gpt2, sdpa": lambda: _Loss(GPT2(GPT2Config(**sizes), "sdpa"), theirs=False),
        "fastattn.gpt2, standard": lambda: _Loss(GPT2(GPT2Config(**sizes), "standard"), theirs=False),
    }
    for name in ("fastattn", "sdpa", "eager"):
        makers[f"transformers, {name}"] = partial(_theirs, sizes, name)
    runs: dict[str, Run] = {}
    kernels: dict[str, str] = {}
    peaks: dict[str, float | None] = {}
    losses: dict[str, float] = {}
    for name, make in makers.items():
        own = columns | {"implementation": name, "version": _model_version(name), "passes": "step"}
        try:
            with machine.device:
                model = make()
            model.model.load_state_dict(weights)  # type: ignore[union-attr]
            losses[name] = _loss_without_dropout(machine, model, ids)
            wanted = next(iter(losses.values()))
            assert abs(losses[name] - wanted) < 0.02, (
                f"loss without dropout: expected {wanted:.4f}, got {losses[name]:.4f}"
            )
            run = _training_step(machine, model, ids, make_optimizer(model, lr=1e-4))
            run()
            peaks[name] = machine.peak_mb(run)
            kernels[name] = kernels_of(machine, run, most=4)
            runs[name] = run
        except Exception as failure:
            status, note = status_of(failure, peer="fastattn" not in name.partition(", ")[2])
            report.row(**own, status=status, note=note)
            reraise_if_lost(failure)
    for name, parts in interleaved(machine, runs, report.left, cold=False).items():
        report.row(
            **columns,
            **columns_of(parts[0]),
            passes="step",
            implementation=name,
            version=_model_version(name),
            kernel=kernels[name],
            status="ok",
            note=f"{batch * context / columns_of(parts[0])['p50_ms'] * 1e3:.0f} tokens/s",
            peak_mb=peaks[name],
            sm_mhz=machine.sm_mhz(),
        )


def _theirs(sizes: dict[str, int], attention: str) -> nn.Module:
    try:
        import transformers  # noqa: PLC0415
    except ImportError as error:
        raise Absent(f"transformers is not installed ({error})") from error
    from fastattn.integrations.transformers import register  # noqa: PLC0415

    register()
    config = transformers.GPT2Config(**sizes, attn_implementation=attention)
    return _Loss(transformers.GPT2LMHeadModel(config), theirs=True)


def _model_version(name: str) -> str:
    package = name.partition(",")[0]
    return fastattn.__version__ if package.startswith("fastattn") else version(package) or ""


def _loss_without_dropout(machine: Machine, model: nn.Module, ids: Tensor) -> float:
    model.eval()
    with torch.no_grad(), torch.autocast(machine.device.type, dtype=torch.bfloat16):
        found = float(model(ids))
    model.train()
    return found


def _training_step(machine: Machine, model: nn.Module, ids: Tensor, optimizer: torch.optim.Optimizer) -> Run:
    def run() -> list[Moment]:
        start = machine.mark()
        with torch.autocast(machine.device.type, dtype=torch.bfloat16):
            loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [start, machine.mark()]

    return run


def launches(report: Report) -> None:
    """Microseconds of the host's for a call on a tiny problem, that the device has long done by the next."""
    machine = report.machine
    if not report.begin("launch"):
        return
    calls, heads, size = (1, 1, 16) if machine.dry_run else (100, 8, 64)
    q, k, v, dout = (
        torch.randn(1, heads, size, size, device=machine.device).to(
            torch.float32 if machine.dry_run else torch.bfloat16
        )
        for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = fastattn.attention(q, k, v, mask=fastattn.causal(), backend=report.backend)
        assert isinstance(found, Tensor)
        return found

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(function: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            function(*leaves)

    def both(function: Callable[..., Tensor]) -> None:
        torch.autograd.grad(function(*leaves), leaves, dout)

    for passes, run in (("forward", forward), ("both", both)):
        taken: dict[str, list[float]] = {OURS: [], "sdpa default": []}
        functions = {OURS: ours, "sdpa default": sdpa}
        for turn in range(2 if machine.dry_run else 21):
            for name, function in functions.items():
                machine.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    run(function)
                spent = 1e3 * (time.perf_counter() - start) / calls
                machine.synchronize()
                if turn:  # the first is the warm-up
                    taken[name].append(spent)
        for name, samples in taken.items():
            report.row(
                case="launch",
                passes=passes,
                dtype=str(q.dtype).removeprefix("torch."),
                batch=1,
                heads=heads,
                kv_heads=heads,
                length=size,
                head_dim=size,
                implementation=name,
                version=version_of(name),
                kernel=report.backend if name == OURS else None,
                status="ok",
                note="the host's time for a call",
                **columns_of(samples),
            )
