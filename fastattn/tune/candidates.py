"""Block sizes, warps and stages worth trying for a case, and which of them will not do."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from typing import Final, NamedTuple

import torch

from fastattn.ops.attention.triton import tuning
from fastattn.ops.attention.triton.tuning import Config
from fastattn.testing.cases import Sizes
from fastattn.testing.compiled import Kernel, compile_kernels
from fastattn.tune.calls import Case, features_as_words, forced

# Of what a case is compiled for: no length is known at compile time.
_SIZES: Final = Sizes(batch=2, heads=4, kv_heads=4, q_length=512, k_length=512)
# Float32 tiles that a kernel holds in registers: of [block_q, dim], of [block_k, dim], of [block_q, block_k].
_TILES: Final = {
    "forward": (1, 0, 1),
    "decode": (1, 0, 1),
    "dkdv": (0, 2, 2),
    "dq": (1, 0, 2),
    "bias": (0, 0, 2),
    "relative": (0, 0, 2),
}
_BLOCKS: Final = (128, 64, 32, 16)
_FUNCTIONS: Final = {
    "forward": "_forward",
    "decode": "_decode",
    "dkdv": "_dk_dv",
    "dq": "_dq",
    "bias": "_dbias",
    "relative": "_drelative",
}
_TENSOR_MEMORY: Final = 512
# What it is worth that programs fill each other's gaps; that no tile is loaded ahead. Guesses.
_SEVERAL: Final = 1.05
_NOTHING_AHEAD: Final = 0.5


class Compiled(NamedTuple):
    """What came of a candidate.

    Attributes:
        config: the candidate.
        kernels: what each variant of the case was compiled to, up to the one that is ruled out.
        reason: why it is ruled out; empty where it is not.
    """

    config: Config
    kernels: tuple[Kernel, ...]
    reason: str = ""

    def __str__(self) -> str:
        words = " ".join(f"{name} {value}" for name, value in self.config._asdict().items())
        return ": ".join(filter(None, (words, self.reason))) + self.facts

    @property
    def facts(self) -> str:
        """Registers, shared memory and programs at once of the variant that takes the most registers."""
        if not self.kernels:
            return ""
        most = max(self.kernels, key=lambda kernel: (kernel.registers, kernel.instructions))
        at_once = "" if most.programs is None else f", {most.programs} at once"
        return f" ({most.registers} registers, {most.shared_memory / 1024:.0f} KiB{at_once})"


def candidates(case: Case, arch: str) -> list[Config]:
    """What is worth compiling for a case, the one with the most work for a byte first.

    Left out are tiles that can't be held in registers, or whose operands can't be held in shared memory.

    Example:
        >>> candidates(Case("forward", 64, torch.bfloat16, True, False), "sm_90")[0]
        Config(block_q=128, block_k=128, warps=8, stages=3)
    """
    rows = (16,) if case.kernel == "decode" else _BLOCKS
    most = 2 if arch.startswith("gfx") or case.kernel in ("bias", "relative") else 3
    stages = range(1, 2 if case.dtype == torch.float32 else most + 1)
    found = [Config(*numbers) for numbers in product(rows, _BLOCKS, (4, 8), stages)]
    fitting = [config for config in found if _may_fit(case, arch, config)]
    return sorted(fitting, key=lambda config: _preference(case, config))


def _preference(case: Case, config: Config) -> tuple[float, ...]:
    """Smaller is better: the most work, loads that run ahead, then more stages and warps."""
    return (-_work(case, config), config.stages == 1, -config.stages, -config.warps)


def _work(case: Case, config: Config) -> float:
    """Products for each number read, where the tile that is kept while others are streamed counts twice.

    Tensor cores read both from shared memory; of what comes through the L2 cache the kept tile's rows decide.
    In decoding, which waits for memory alone, the keys that are on their way.
    """
    if case.kernel == "decode":
        return config.block_k
    kept, streamed = config.block_q, config.block_k
    if case.kernel == "dkdv":
        kept, streamed = streamed, kept
    weight = 1 if case.kernel in ("bias", "relative") else 2
    return 1 / (weight / kept + 1 / streamed)


def _may_fit(case: Case, arch: str, config: Config) -> bool:
    block_q, block_k, warps, stages = config
    if block_q == block_k == min(_BLOCKS):
        return True  # there is nothing smaller
    threads = warps * (64 if arch.startswith("gfx") else 32)
    q_tiles, k_tiles, score_tiles = _TILES[case.kernel]
    dim = max(16, case.dim)
    registers = (
        q_tiles * block_q * dim + k_tiles * block_k * dim + score_tiles * block_q * block_k
    ) / threads
    if not 4 <= registers <= _registers(case, arch):  # below, warps have next to nothing to do
        return False
    operands = {"dkdv": block_k + stages * block_q, "bias": block_k + block_q, "relative": block_k + block_q}
    rows = operands.get(case.kernel, stages * block_k)
    return 2 * dim * case.dtype.itemsize * rows <= tuning.shared_memory(arch)


def _registers(case: Case, arch: str) -> int:
    """How many a thread can give to accumulators and scores."""
    if case.dtype == torch.float32:
        return 96  # multiply-adds take both operands from registers
    if arch.startswith("gfx"):
        return 384
    # wgmma and tcgen05 leave operands in shared memory; mma.sync has them in registers as well.
    return 208 if tuning.shared_memory(arch) >= tuning.shared_memory("sm_90") else 130


def compile_candidate(case: Case, arch: str, config: Config) -> Compiled:
    """Compile a case's kernel with `config` for each of its variants, until one is ruled out."""
    sizes = _SIZES._replace(q_length=1) if case.kernel == "decode" else _SIZES
    found: list[Kernel] = []
    for features in case.variants:
        try:
            with forced(case.kernel, config):
                call = case.call(sizes, torch.device("cpu"), features)
                own = compile_kernels(arch, call, names=(_FUNCTIONS[case.kernel],))
        except Exception as error:  # the compiler's own, of any kind
            return Compiled(
                config, tuple(found), f"{features_as_words(features)} does not compile: {_last_line(error)}"
            )
        if not own:
            raise RuntimeError(f"expected {case} to launch {_FUNCTIONS[case.kernel]}, it does not")
        found += own
        reasons = [ruled_out(kernel) for kernel in own]
        if any(reasons):
            return Compiled(
                config, tuple(found), f"{features_as_words(features)}: {next(filter(None, reasons))}"
            )
    return Compiled(config, tuple(found))


def compile_all(case: Case, arch: str, configs: Sequence[Config]) -> Iterator[Compiled]:
    """`compile_candidate` of each, in order, in as many processes as there are cores, eight at most.

    What they compile is in Triton's cache when a GPU is to run it.
    """
    processes = min(8, os.cpu_count() or 1, len(configs))
    if processes == 1:
        yield from (compile_candidate(case, arch, config) for config in configs)
        return
    spawn = multiprocessing.get_context("spawn")  # a GPU's context does not live through a fork
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        yield from pool.map(partial(compile_candidate, case, arch), configs)


def ruled_out(kernel: Kernel) -> str:
    """Why a kernel will not do; empty if it will."""
    limit = tuning.shared_memory(kernel.target)
    if kernel.shared_memory > limit:
        return f"takes {kernel.shared_memory} of {limit} bytes of shared memory"
    if kernel.tensor_memory > _TENSOR_MEMORY:
        return f"takes {kernel.tensor_memory} of {_TENSOR_MEMORY} columns of tensor memory"
    if kernel.spills or kernel.stack:
        return f"spills ({kernel.spills} instructions, {kernel.stack} bytes)"
    return ""


def without_measuring(case: Case, arch: str, tell: Callable[[Compiled], None]) -> Compiled | None:
    """The candidate to take where none can be timed: the most work for a byte, by the warps that share it.

    Args:
        case: what is tuned.
        arch: what it is compiled for.
        tell: called with each candidate that is compiled.

    Returns:
        The best that does not spill; None where all do.
    """
    best, best_score = None, 0.0
    for config in candidates(case, arch):
        most = _work(case, config) * _enough_warps(case, arch) * _SEVERAL
        if most <= best_score:
            break
        found = compile_candidate(case, arch, config)
        tell(found)
        score = 0.0 if found.reason else _score(case, arch, found)
        if score > best_score:
            best, best_score = found, score
    return best


def _score(case: Case, arch: str, found: Compiled) -> float:
    programs = min(kernel.programs or 1 for kernel in found.kernels)
    warps = min(_enough_warps(case, arch), programs * found.config.warps)
    score = _work(case, found.config) * warps
    if programs > 1:
        score *= _SEVERAL
    if found.config.stages == 1 and case.dtype != torch.float32:
        score *= _NOTHING_AHEAD
    return score


def _enough_warps(case: Case, arch: str) -> int:
    """Warps on a multiprocessor at a time beyond which more are no better.

    Forward's asynchronous products of one program run while another's softmax does. Elsewhere, and where a
    warp waits for its products as on sm_80, larger tiles are worth more than more warps. A guess as well.
    """
    asynchronous = not arch.startswith("gfx") and tuning.shared_memory(arch) >= tuning.shared_memory("sm_90")
    plain = case.kernel == "forward" and case.dtype != torch.float32 and not case.rich
    return 12 if asynchronous and plain else 8


def _last_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
