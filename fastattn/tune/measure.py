"""Times of candidates on the GPU at hand, in rounds: what drifts, drifts for all of them."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention.triton.tuning import Config
from fastattn.testing.cases import Sizes
from fastattn.tune.calls import Call, Case, forced

# How far a candidate's result may be from the default's, as |a - b| / |b|: blocks change the order of sums.
_TOLERANCE: Final = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
_COARSE_ROUNDS: Final = 5
_FINALISTS: Final = 5
# About 0.3 ms on an H100: as long as the host needs to launch a whole backward behind it.
_SLEEP_CYCLES: Final = 500_000


class Timing(NamedTuple):
    """What a candidate takes.

    Attributes:
        config: the candidate.
        milliseconds: the median.
        low, high: 20th and 80th percentile.
        rounds: how often it was measured.
    """

    config: Config
    milliseconds: float
    low: float
    high: float
    rounds: int


class Outcome(NamedTuple):
    """Of one case.

    Attributes:
        timings: of the candidates measured longest, the fastest first.
        ruled_out: candidates that could not run or gave another result than the default, and why.
    """

    timings: list[Timing]
    ruled_out: dict[Config, str]


def measure(
    case: Case, default: Config, configs: Sequence[Config], sizes: Sizes, device: torch.device, rounds: int
) -> Outcome:
    """Time a case's candidates: all of them for a few rounds, the fastest and the default for `rounds`.

    What is timed are all variants of the case, one after the other, as the host code launches them.

    Args:
        case: the kernel and its options.
        default: what the table has now, whose result the others are held against.
        configs: the candidates.
        sizes: of q, k and v.
        device: a GPU.
        rounds: how often the finalists are timed.

    Raises:
        RuntimeError: the default can't run, or a candidate broke the device's context.
    """
    calls = [case.call(sizes, device, features) for features in case.variants]

    def call() -> tuple[Tensor, ...]:
        return tuple(x for variant in calls for x in variant())

    with forced(case.kernel, default):
        expected = call()
    torch.cuda.synchronize(device)
    able, ruled_out = [default], {}
    for config in configs:
        if config == default:
            continue
        wrong = _wrong(case, config, call, expected, device)
        if wrong:
            ruled_out[config] = wrong
        else:
            able.append(config)
    flush = _flush_buffer(device)
    coarse = _rounds(case.kernel, able, call, flush, device, _COARSE_ROUNDS)
    fastest = sorted(able, key=lambda config: statistics.median(coarse[config]))[:_FINALISTS]
    finalists = list(dict.fromkeys((*fastest, default)))
    fine = _rounds(case.kernel, finalists, call, flush, device, rounds)
    timings = [_timing(config, times) for config, times in fine.items()]
    return Outcome(sorted(timings, key=lambda timing: timing.milliseconds), ruled_out)


def _wrong(
    case: Case, config: Config, call: Call, expected: Sequence[Tensor], device: torch.device
) -> str | None:
    """Why `config` can't be measured, if it can't."""
    try:
        with forced(case.kernel, config):
            found = call()
        torch.cuda.synchronize(device)
    except Exception as error:  # the compiler's own, of any kind
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as broken:
            raise RuntimeError(f"{case} with {config} broke the device's context: {reason}") from broken
        return reason
    distance = difference(found, expected)
    allowed = _TOLERANCE[case.dtype]
    return None if distance <= allowed else f"result off by {distance:.1e}, expected at most {allowed:.0e}"


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest |a - b| / |b| of the pairs; infinite where one is finite and the other is not.

    Example:
        >>> difference([torch.tensor([3.0, 4.5])], [torch.tensor([3.0, 4.0])])
        0.1
    """
    largest = 0.0
    for a, b in zip(found, expected, strict=True):
        a_, b_ = a.to(torch.float64), b.to(torch.float64)
        finite = torch.isfinite(b_)
        if not torch.equal(torch.isfinite(a_), finite) or not torch.equal(a_[~finite], b_[~finite]):
            return float("inf")
        norm = float(torch.linalg.vector_norm(b_[finite]))
        apart = float(torch.linalg.vector_norm(a_[finite] - b_[finite]))
        largest = max(largest, apart / norm if norm else apart)
    return largest


def _rounds(
    kernel: str, configs: Sequence[Config], call: Call, flush: Tensor, device: torch.device, rounds: int
) -> Mapping[Config, list[float]]:
    """Milliseconds of each call; the first of each is warm-up and left out."""
    times: dict[Config, list[float]] = {config: [] for config in configs}
    order = list(configs)
    for turn in range(rounds + 1):
        random.Random(turn).shuffle(order)
        events = {}
        for config in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(_SLEEP_CYCLES)  # launches queue up, so that none waits for the host
            start.record()
            with forced(kernel, config):
                call()
            end.record()
            events[config] = (start, end)
        torch.cuda.synchronize(device)
        if turn > 0:
            for config, (start, end) in events.items():
                times[config].append(start.elapsed_time(end))
    return times


def _flush_buffer(device: torch.device) -> Tensor:
    """Writing it leaves nothing else in the L2 cache."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    return torch.empty(4 * cache, dtype=torch.uint8, device=device)


def _timing(config: Config, times: Sequence[float]) -> Timing:
    ordered = sorted(times)
    low, high = (ordered[round(part * (len(ordered) - 1))] for part in (0.2, 0.8))
    return Timing(config, statistics.median(ordered), low, high, len(ordered))
