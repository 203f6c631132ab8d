"""Is it right on this device? Every feature against float64, and what only a GPU can get wrong.

A check raises AssertionError where a result is wrong, and returns the largest error as a share of its budget
where that is what it measures.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

import fastattn
from fastattn.gpu_check.report import Report
from fastattn.machine import Machine
from fastattn.ops.attention.biases import as_bias
from fastattn.testing import assert_within_budget, attention_errors, cases, poisoned_memory

Options = dict[str, Any]
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SMALL: Final = cases.Sizes()
# Of few queries: the gradient of a slope is one sum over all pairs, in which out's own rounding adds up.
HALF: Final = SMALL._replace(q_length=37)
# For Triton's interpreter, which takes a tenth of a second for a tile.
TINY: Final = cases.Sizes(batch=1, heads=2, kv_heads=1, q_length=33, k_length=70, dim=24, v_dim=17)
MINI: Final = cases.Sizes(batch=2, heads=1, kv_heads=1, q_length=20, k_length=36, dim=16, v_dim=16)
IN_A_DRY_RUN: Final = ("causal", "documents-causal", "dropout", "alibi")
# By name: batch, heads, kv_heads, q_length, k_length, dim, v_dim.
SIZES: Final = {
    "GPT-2, L 1024": (2, 12, 12, 1024, 1024, 64, 64),
    "L 4097": (1, 2, 2, 4097, 4097, 64, 64),
    "heads 12:4, D 128": (2, 12, 4, 1000, 1000, 128, 128),
    "D 256": (1, 4, 2, 513, 513, 256, 256),
    "D 512": (1, 2, 1, 257, 300, 512, 512),
    "D 80": (2, 5, 5, 333, 333, 80, 80),
    "D 192, D_v 128": (1, 4, 4, 500, 500, 192, 128),
    "D 16, heads 6:1": (3, 6, 1, 127, 129, 16, 16),
    "one query": (2, 8, 2, 1, 4097, 64, 64),
    "more queries than keys": (2, 4, 4, 700, 100, 64, 64),
    "one key": (1, 2, 2, 65, 1, 32, 32),
    "70,000 sequences": (70_000, 1, 1, 3, 5, 16, 16),
}
TINY_SIZES: Final = {"D 64": (1, 2, 1, 40, 50, 64, 64)}
AT_SIZE: Final = (
    "window",
    "documents-causal",
    "alibi",
    "dropout",
    "bias-1HQK",
    "block-sparse-causal",
    "key-padding",
    "softcap",
    "sinks",
    "relative-position",
    "dense-mask",
)


def features(report: Report, dtype_name: str, part: int, parts: int) -> None:
    """Every feature alone, forward and every gradient, against float64."""
    names = list(cases.FEATURES)
    if report.machine.dry_run:
        names = [*IN_A_DRY_RUN, *(name for name in names if name not in IN_A_DRY_RUN)]
    for i, name in enumerate(names):
        if i % parts != part:
            continue
        interpreted = report.machine.dry_run and report.backend == "triton"
        sizes, backend = SMALL if dtype_name == "float32" else HALF, report.backend
        if interpreted and name in IN_A_DRY_RUN and dtype_name == "float32":
            sizes = TINY
        elif interpreted:
            backend = on_a_cpu()
        errors(report, name, (name,), cases.sizes_for((name,), sizes), dtype_name, backend)


def pairs(report: Report, count: int) -> None:
    """Features joined, drawn at random, as many as there is time for."""
    draw, names = random.Random(0), list(cases.FEATURES)
    backend = on_a_cpu() if report.machine.dry_run else report.backend
    for i in range(count):
        chosen = draw.sample(names, 2 + i % 2)
        summed = any("alibi" in name or "slopes" in name for name in chosen)
        dtype_name = "float32" if summed else draw.choice(list(DTYPES))
        if cases.go_together(chosen):
            sizes = cases.sizes_for(chosen, SMALL)
            errors(report, " & ".join(chosen), chosen, sizes, dtype_name, backend)


def sizes(report: Report, dtype_name: str) -> None:
    """Lengths and head sizes as in models, causal and full; some features at such a size."""
    table = TINY_SIZES if report.machine.dry_run else SIZES
    for name, numbers in table.items():
        for mask in ("causal", "full"):
            names = () if mask == "full" else ("causal",)
            found = cases.Sizes(*numbers)
            errors(report, f"{name}, {mask}", names, found, dtype_name, report.backend)
    for name in () if report.machine.dry_run else AT_SIZE:
        # Of a slope's gradient over so many pairs half precision leaves little.
        if dtype_name == ("float32" if name == "alibi" else "bfloat16"):
            found = cases.Sizes(2, 8, 4, 1024, 1024, 64, 64)
            errors(report, f"{name}, L 1024", (name,), found, dtype_name, report.backend)


def errors(
    report: Report,
    case: str,
    names: Sequence[str],
    found: cases.Sizes,
    dtype_name: str,
    backend: str,
) -> None:
    """One problem's results against float64, uninitialised memory being NaN."""
    device, dtype = report.machine.device, DTYPES[dtype_name]

    def run() -> float:
        q, k, v = found.tensors(dtype, device=device)
        options = cases.options_of(names, found, device=device)
        with poisoned_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of ops of the oracle's that add in any order
            result = attention_errors(q, k, v, backend=backend, **options)
        assert_within_budget(result)
        return max(e.ours / e.budget for e in result if e.budget > 0)

    columns = {
        "kernel": backend,
        "passes": "both",
        "dtype": dtype_name,
        "batch": found.batch,
        "heads": found.heads,
        "kv_heads": found.kv_heads,
        "length": found.q_length,
        "head_dim": found.dim,
    }
    report.check(f"{case}, {dtype_name}", run, **columns)


def on_a_cpu() -> str:
    """What stands in, in a dry run, where the interpreter would take minutes."""
    return next(name for name in ("cpu", "reference") if not _unavailable(name))


def _unavailable(backend: str) -> list[str]:
    x = torch.empty(1, 1, 1, 8)
    return fastattn.explain(x, x, x, backend=backend).reasons.get(backend, [])


class Problem:
    """q, k, v and out's gradient on a device, and the options of the call.

    Args:
        machine: where.
        found: sizes.
        names: features.
        dtype: of q, k and v.
        seed: of the numbers.
        learn: ask for the gradients of biases and sinks too.
    """

    def __init__(
        self,
        machine: Machine,
        found: cases.Sizes,
        names: Sequence[str] = ("causal",),
        dtype: torch.dtype = torch.bfloat16,
        seed: int = 1,
        learn: bool = False,
    ) -> None:
        self.leaves = [x.requires_grad_() for x in found.tensors(dtype, seed, machine.device)]
        g = torch.Generator().manual_seed(seed)
        shape = (found.batch, found.heads, found.q_length, found.v_dim)
        self.dout = torch.randn(shape, generator=g).to(dtype).to(machine.device)
        self.options = cases.options_of(names, found, device=machine.device)
        self.machine = machine
        for x in _learned(self.options) if learn else ():
            x.requires_grad_()

    def run(self, backend: str) -> list[Tensor]:
        """out, lse and the gradients of q, k and v, and of what is learned."""
        return both_passes(self.leaves, self.dout, backend, self.options)


def both_passes(leaves: Sequence[Tensor], dout: Tensor, backend: str, options: Options) -> list[Tensor]:
    """out, lse and the gradients of q, k and v, and of biases and sinks that ask for one."""
    found = fastattn.attention(*leaves, backend=backend, return_lse=True, **options)
    assert isinstance(found, tuple)
    out, lse = found
    learned = [x for x in _learned(options) if x.requires_grad]
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, [*leaves, *learned], dout)]


def _learned(options: Options) -> list[Tensor]:
    bias = as_bias(options.get("bias"))
    found = [options.get("sinks"), bias.dense, *(part.parameter for part in bias.compact)]
    return [x for x in found if x is not None]


def assert_same_bits(found: Sequence[Tensor], want: Sequence[Tensor], when: str) -> None:
    """Raise where any bit differs."""
    names = ("out", "lse", "dq", "dk", "dv", *(f"gradient {i}" for i in range(len(want))))
    pairs = zip(found, want, strict=True)
    differ = [name for name, (a, b) in zip(names, pairs, strict=False) if not _same_bits(a, b)]
    assert not differ, f"{when}: expected the same bits, got others in {differ}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def medium(machine: Machine) -> cases.Sizes:
    """Some tiles each way."""
    return MINI if machine.dry_run else cases.Sizes(2, 6, 2, 700, 900, 64, 64)


def dropout(report: Report) -> None:
    """The same seed drops the same elements as the reference does on the CPU, forward and backward."""
    batch, length = (1, 40) if report.machine.dry_run else (2, 200)
    calls: dict[str, Options] = {
        "causal": {"mask": fastattn.causal()},
        "a shard's positions": {"q_start": 5000, "k_start": 37},
        "half": {"dropout": 0.5, "seed": 2**62 + 3},
    }
    for name, options in calls.items():
        call: Options = {"dropout": 0.2, "seed": 12345} | options

        def run(call: Options = call) -> None:
            g = torch.Generator().manual_seed(0)
            q = torch.randn(batch, 2, length, 32, generator=g)
            k = torch.randn(batch, 1, length, 32, generator=g)
            # out is then the matrix of probabilities, and dv that of a key head's first queries
            one = torch.eye(length).expand(batch, 1, length, length)
            dout = torch.stack((torch.eye(length), torch.zeros(length, length))).expand(batch, -1, -1, -1)
            leaves = [x.clone().requires_grad_() for x in (q, k, one)]
            want = both_passes(leaves, dout, "reference", call)
            moved = [x.detach().to(report.machine.device).requires_grad_() for x in leaves]
            found = both_passes(moved, dout.to(report.machine.device), report.backend, call)
            for what, i in (("forward", 0), ("backward", 4)):
                dropped, expected = found[i].cpu() == 0, want[i] == 0
                assert torch.equal(dropped, expected), (
                    f"{what}: expected the reference's {int(expected.sum())} zeros, "
                    f"got {int(dropped.sum())}, {int((dropped != expected).sum())} elsewhere"
                )

        report.check(name, run, dtype="float32", passes="both")


def determinism(report: Report, runs: int = 20) -> None:
    """The same bits in every run, and for a sequence whatever else is in the batch."""
    machine = report.machine
    features = [
        (),
        ("causal",),
        ("dropout", "alibi"),
        ("bias-1HQK", "sinks"),
        ("bias-BH1K", "relative-position"),
        ("documents-causal",),
    ]
    for names in features[1:2] if machine.dry_run else features:
        found = medium(machine)

        def run(names: Sequence[str] = names, found: cases.Sizes = found) -> None:
            problem = Problem(machine, found, names, learn=True)
            want = problem.run(report.backend)
            for i in range(2 if machine.dry_run else runs):
                assert_same_bits(problem.run(report.backend), want, f"run {i + 2}")

        report.check(f"{runs} runs, {' & '.join(names) or 'full'}", run, dtype="bfloat16", passes="both")

    def alone() -> None:
        problem = Problem(machine, found)
        want = problem.run(report.backend)
        leaves = [x.detach()[1:].requires_grad_() for x in problem.leaves]
        single = both_passes(leaves, problem.dout[1:], report.backend, problem.options)
        assert_same_bits(single, [x[1:] for x in want], "alone in its batch")

    found = medium(machine)
    report.check("batch of one", alone, dtype="bfloat16", passes="both")


Layout = Callable[[Tensor], Tensor]


def _wider(x: Tensor) -> Tensor:
    """A slice of a tensor with more of everything."""
    whole = torch.full((x.shape[0] + 1, x.shape[1] + 2, x.shape[2] + 3, x.shape[3] + 8), float("nan")).to(x)
    part = whole[1:, 1:-1, 2:-1, 4:-4]
    part.copy_(x)
    return part


LAYOUTS: Final[dict[str, Layout]] = {
    "[B, L, H, D]": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "[L, B, H, D]": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "packed [B, L, 3, H, D]": lambda x: torch.stack([x.transpose(1, 2)] * 3, 2)[:, :, 1].transpose(1, 2),
    "a slice": _wider,
    "last dimension not of stride 1": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every second row": lambda x: torch.stack((x, torch.full_like(x, float("nan"))), 3).flatten(2, 3)[
        :, :, ::2
    ],
    "odd address": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


def layouts(report: Report) -> None:
    """Strided inputs give the same bits as contiguous ones."""
    machine = report.machine
    found = medium(machine)._replace(v_dim=medium(machine).dim)
    for name, change in list(LAYOUTS.items())[: 2 if machine.dry_run else None]:

        def run(change: Layout = change, name: str = name) -> None:
            problem = Problem(machine, found)
            want = problem.run(report.backend)
            leaves = [change(x.detach()).requires_grad_() for x in problem.leaves]
            got = both_passes(leaves, change(problem.dout), report.backend, problem.options)
            assert_same_bits(got, want, name)

        report.check(name, run, dtype="bfloat16", passes="both")

    def expanded() -> None:
        problem = Problem(machine, found)
        one = [x.detach()[:1].expand_as(x) for x in problem.leaves]
        dout = problem.dout.new_ones(()).expand_as(problem.dout)
        got = both_passes([x.requires_grad_() for x in one], dout, report.backend, problem.options)
        leaves = [x.detach().contiguous().requires_grad_() for x in one]
        assert_same_bits(
            got, both_passes(leaves, dout.contiguous(), report.backend, problem.options), "expanded"
        )

    report.check("expanded, of stride 0", expanded, dtype="bfloat16", passes="both")


def float8(report: Report) -> None:
    """Attention of float8 tensors with a scale of each head, against float64 on what they stand for."""
    machine = report.machine
    for dim in (16,) if machine.dry_run else (16, 64, 80, 128, 256):

        def run(dim: int = dim) -> None:
            found = medium(machine)._replace(dim=dim, v_dim=dim)
            wide = found.tensors(torch.float32, 1, machine.device)
            scales = [x.abs().amax((2, 3)) / 448 for x in wide]
            stored = [
                (x / by[..., None, None]).to(torch.float8_e4m3fn) for x, by in zip(wide, scales, strict=True)
            ]
            exact = [x.double() * by.double()[..., None, None] for x, by in zip(stored, scales, strict=True)]
            mask = fastattn.causal()
            ours = fastattn.attention_float8(
                *stored,
                q_scale=scales[0],
                k_scale=scales[1],
                v_scale=scales[2],
                mask=mask,
                backend=report.backend,
            )
            want = fastattn.attention(*exact, mask=mask, backend="reference")
            plain = fastattn.attention(*(x.bfloat16() for x in exact), mask=mask, backend="reference")
            assert isinstance(ours, Tensor) and isinstance(want, Tensor) and isinstance(plain, Tensor)
            error, budget = (float((x.double() - want).abs().max()) for x in (ours, plain))
            budget = 2 * budget + torch.finfo(torch.bfloat16).eps * float(want.abs().max())
            assert error <= budget, f"error {error:.3e} over budget {budget:.3e}"

        report.check(f"D {dim}", run, dtype="float8_e4m3fn", passes="forward")


def compiled(report: Report) -> None:
    """Through torch.compile in one graph, for two lengths; under autocast."""
    machine = report.machine

    def run() -> None:
        torch.compiler.reset()

        def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
            return fastattn.attention(
                q, k, v, mask=fastattn.causal(), backend=report.backend, return_lse=True
            )

        inner = "aot_eager" if machine.dry_run else "inductor"
        whole = torch.compile(function, fullgraph=True, dynamic=True, backend=inner)
        for extra in (0,) if machine.dry_run else (0, 7):
            found = medium(machine)
            problem = Problem(machine, found._replace(q_length=found.q_length + extra))
            out, lse = whole(*problem.leaves)
            got = [out.detach(), lse.detach(), *torch.autograd.grad(out, problem.leaves, problem.dout)]
            assert_same_bits(got, problem.run(report.backend), f"compiled, L + {extra}")

    report.check("torch.compile, fullgraph", run, dtype="bfloat16", passes="both")

    def autocast() -> None:
        problem = Problem(machine, medium(machine), dtype=torch.float32)
        with torch.autocast(machine.device.type, dtype=torch.bfloat16):
            out = fastattn.attention(*problem.leaves, mask=fastattn.causal(), backend=report.backend)
        assert isinstance(out, Tensor)
        assert out.dtype == torch.bfloat16, f"expected bfloat16, got {out.dtype}"
        leaves = [x.detach().bfloat16() for x in problem.leaves]
        want = fastattn.attention(*leaves, mask=fastattn.causal(), backend=report.backend)
        assert isinstance(want, Tensor)
        assert_same_bits([out.detach()], [want], "autocast")

    report.check("autocast", autocast, dtype="bfloat16", passes="forward")


def sanitized(report: Report) -> None:
    """A few small problems of every kernel: what compute-sanitizer watches."""
    tiny = MINI if report.machine.dry_run else cases.Sizes(1, 2, 1, 90, 130, 64, 64)
    for names in (
        ("causal",),
        ("documents-causal", "dropout"),
        ("bias-1HQK", "alibi"),
        ("block-sparse", "sinks"),
    ):

        def run(names: Sequence[str] = names) -> None:
            found = Problem(report.machine, cases.sizes_for(names, tiny), names).run(report.backend)
            report.machine.synchronize()
            assert not any(bool(x.isnan().any()) for x in found), "expected numbers, got NaN"

        report.check(f"sanitized, {' & '.join(names)}", run, dtype="bfloat16", passes="both")
