"""What only a device with its own memory and queue can get wrong: graphs, streams, waits, far addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn.gpu_check.checks import Problem, assert_same_bits, both_passes, medium
from fastattn.gpu_check.report import Report
from fastattn.testing import cases

NEEDS_A_GPU = "needs a GPU"


def graphs(report: Report) -> None:
    """Capture in a CUDA graph; replayed with other numbers it gives the bits that a call gives."""
    problems: dict[str, Sequence[str]] = {
        "causal": ("causal",),
        "documents": ("documents-causal",),
        "alibi, window": ("alibi", "window"),
        "dense bias": ("bias-1HQK",),
        "dropout": ("dropout",),
    }
    for name, names in problems.items():
        case = f"graph, {name}"
        if report.machine.dry_run:
            report.not_run(case, NEEDS_A_GPU)
            continue

        def run(names: Sequence[str] = names) -> None:
            problem = Problem(report.machine, medium(report.machine), names)
            if "dropout" in names:
                problem.options["seed"] = torch.tensor([11], device=report.machine.device)
            _replay(problem, report.backend)

        report.check(case, run, dtype="bfloat16", passes="both")


def _replay(problem: Problem, backend: str) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            problem.run(backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run(backend)
    changing = [*problem.leaves, problem.dout]
    for i in range(3):
        with torch.no_grad():
            for x in changing:
                x.copy_(torch.randn_like(x))
            if "seed" in problem.options:
                problem.options["seed"] += i
        graph.replay()
        torch.cuda.synchronize()
        found = [x.clone() for x in captured]
        assert_same_bits(found, problem.run(backend), f"replay {i}")


def waits(report: Report) -> None:
    """No feature makes the host wait for the device, forward or backward; nor does a step of decoding."""
    if report.machine.dry_run:
        report.not_run("no waits", NEEDS_A_GPU)
        return
    for name in cases.FEATURES:

        def run(name: str = name) -> None:
            found = cases.sizes_for((name,), cases.Sizes())
            problem = Problem(report.machine, found, (name,))
            without_waiting(lambda: problem.run(report.backend))

        report.check(f"no waits, {name}", run, dtype="bfloat16", passes="both")


def without_waiting(run: Any) -> None:
    """Run it, and then once more where a synchronisation is an error."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()


def streams(report: Report, count: int = 4, rounds: int = 5) -> None:
    """Calls on several streams at once give the bits that each gives alone."""
    if report.machine.dry_run:
        report.not_run("streams", NEEDS_A_GPU)
        return

    def run() -> None:
        features = [("causal",), ("documents-causal",), ("dropout",), ("bias-1HQK",)]
        problems = [
            Problem(report.machine, medium(report.machine), features[i % len(features)], seed=i)
            for i in range(count)
        ]
        wants = [problem.run(report.backend) for problem in problems]
        torch.cuda.synchronize()
        queues = [torch.cuda.Stream() for _ in problems]
        for turn in range(rounds):
            found: list[list[Tensor]] = []
            for problem, queue in zip(problems, queues, strict=True):
                with torch.cuda.stream(queue):
                    found.append(problem.run(report.backend))
            torch.cuda.synchronize()
            for i, (got, want) in enumerate(zip(found, wants, strict=True)):
                assert_same_bits(got, want, f"round {turn}, stream {i}")

    report.check("streams", run, dtype="bfloat16", passes="both")


def far(report: Report) -> None:
    """Offsets beyond 32 bits: by strides, and in tensors of more than 2^31 elements."""
    machine = report.machine
    step = 4096 if machine.dry_run else 2**31 + 4096

    def strided() -> None:
        found = medium(machine)._replace(batch=2, v_dim=medium(machine).dim)
        problem = Problem(machine, found)
        wide = [_far_apart(x.detach(), step + x[0].numel()) for x in (*problem.leaves, problem.dout)]
        leaves = [x.requires_grad_() for x in wide[:3]]
        got = both_passes(leaves, wide[3], report.backend, problem.options)
        assert_same_bits(got, problem.run(report.backend), "strides over 2^31")

    need = 4 * 2 * (step + 2**24)
    if not machine.dry_run and machine.free_bytes() < need:
        report.not_run("strides over 2^31", f"needs {need / 2**30:.0f} GiB of free memory")
    else:
        report.check("strides over 2^31", strided, dtype="bfloat16", passes="both")

    case, need = "2^31 elements", 52 * 2**30
    if machine.dry_run or machine.free_bytes() < need:
        report.not_run(
            case, NEEDS_A_GPU if machine.dry_run else f"needs {need / 2**30:.0f} GiB of free memory"
        )
        return
    report.check(case, lambda: _huge(report), dtype="bfloat16", passes="both", heads=33, length=2**20)


def _far_apart(x: Tensor, step: int) -> Tensor:
    """The same numbers, the sequences of the batch `step` elements apart."""
    memory = x.new_empty(step * (x.shape[0] - 1) + x[0].numel())
    strides = (step, *x[0].contiguous().stride())
    found = memory.as_strided(x.shape, strides)
    found.copy_(x)
    return found


def _huge(report: Report, heads: int = 33, length: int = 2**20, dim: int = 64) -> None:
    """The last head of q, k, v and out begins 2^31 elements behind their first; a window keeps it quick."""
    device = report.machine.device
    g = torch.Generator(device).manual_seed(0)
    shape = (1, heads, length, dim)
    q, k, v, dout = (torch.randn(shape, generator=g, device=device, dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    window, reach, rows = fastattn.sliding_window(63, 0), 63, 512
    found = fastattn.attention(*leaves, mask=window, backend=report.backend)
    assert isinstance(found, Tensor)
    grads = torch.autograd.grad(found, leaves, dout)
    for head in (0, heads - 1):
        # The last rows by themselves: their keys begin `reach` before them.
        part = [x.detach()[:, head : head + 1, -rows - reach :].double().requires_grad_() for x in leaves]
        out = fastattn.attention(*part, mask=window, backend="reference")
        assert isinstance(out, Tensor)
        want = torch.autograd.grad(out, part, dout[:, head : head + 1, -rows - reach :].double())
        pairs = [(found, out), *zip(grads, want, strict=True)]
        for name, (got, exact) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
            a = got.detach()[0, head, -rows:].double()
            b = exact.detach()[0, 0, -rows:]
            error = float((a - b).abs().max() / b.abs().max())
            assert error < 0.02, (
                f"{name}, head {head}: expected an error below 0.02 of its size, got {error:.3g}"
            )
