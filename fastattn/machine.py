"""The device that is measured: its clock, its memory, its names, and what ran on it by the profiler."""

from __future__ import annotations

import gc
import importlib.metadata
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch

import fastattn

Moment: TypeAlias = "torch.cuda.Event | float"
# Device cycles to wait before what is timed, so that the host is ahead of the device from the first kernel.
_HEAD_START: Final = 1_500_000
_LEAST_FLUSH: Final = 64 * 2**20
# What else the profiler has: torch.compile's names for regions; on a device's line copies too.
_NO_OPS: Final = ("Torch-Compiled", "TorchDynamo")
_NO_KERNELS: Final = ("Mem", "##", "Torch-Compiled", "CompiledFx")


class Machine:
    """A GPU with its own clock and memory, or the CPU: in its place, or for its own sake.

    Args:
        dry_run: rehearse on the CPU: problems are tiny, and run once.
        device: ``cuda`` or ``cpu``; the GPU if not given and this is no rehearsal.
    """

    def __init__(self, dry_run: bool, device: str | None = None) -> None:
        self.dry_run = dry_run
        self.device = torch.device(device or ("cpu" if dry_run else "cuda"))
        self.on_cpu = self.device.type == "cpu"
        self._l2: torch.Tensor | None = None

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        if not self.on_cpu:
            torch.cuda.synchronize()

    def mark(self) -> Moment:
        """A moment on the device's clock: when what was launched before it is done."""
        if self.on_cpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Moment, end: Moment) -> float:
        """Milliseconds from one moment to another; both have to have come."""
        if isinstance(start, float) or isinstance(end, float):
            assert isinstance(start, float) and isinstance(end, float)
            return 1e3 * (end - start)
        elapsed: float = start.elapsed_time(end)
        return elapsed

    def settle(self) -> None:
        """Before a sample: nothing of the last one in the L2 cache, and the host ahead of the device."""
        if self.on_cpu:
            return
        if self._l2 is None:
            size = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)
            self._l2 = torch.empty(max(2 * size, _LEAST_FLUSH), dtype=torch.int8, device=self.device)
        self._l2.zero_()
        torch.cuda._sleep(_HEAD_START)

    def peak_mb(self, run: Callable[[], object]) -> float | None:
        """10^6 bytes that the allocator held at most during `run`, beyond those before; None on a CPU."""
        if self.on_cpu:
            return None
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        self.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)

    def free_bytes(self) -> int:
        """Memory that is free on the device; 0 on a CPU."""
        if self.on_cpu:
            return 0
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def sm_mhz(self) -> int | None:
        """The clock that the GPU runs at now."""
        found = None if self.on_cpu else _smi("clocks.sm")
        return int(found) if found and found.isdigit() else None


def kernels_of(machine: Machine, run: Callable[[], object], most: int = 3) -> str:
    """What `run` really ran: attention's op and the kernels that took longest, by the profiler.

    On a CPU, where kernels have no names of their own, attention's op alone, or the ops that took longest.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not machine.on_cpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    machine.synchronize()
    try:
        with torch.profiler.profile(activities=activities) as profile:
            run()
            machine.synchronize()
        found = profile.key_averages()
    except RuntimeError as error:  # as where a container may not count
        return f"unknown: the profiler failed ({str(error).splitlines()[0][:60]})"
    ops = {_attention_op(event.key) for event in found} - {""}
    if machine.on_cpu:
        if ops:
            return " + ".join(sorted(ops))
        least = 0.02 * sum(event.self_cpu_time_total for event in found)
        slow = [e for e in found if e.self_cpu_time_total > least and not e.key.startswith("autograd::")]
        slow.sort(key=lambda event: -event.self_cpu_time_total)
        keys = (e.key.removeprefix("aten::")[:70] for e in slow if not e.key.startswith(_NO_OPS))
        # Inductor's graphs are called by a hash.
        names = list(dict.fromkeys("compiled graph" if key.startswith("## Call") else key for key in keys))
    else:
        kernels = [e for e in found if e.device_type.name == "CUDA" and not e.key.startswith(_NO_KERNELS)]
        kernels.sort(key=lambda event: -event.self_device_time_total)
        names = list(dict.fromkeys(_short(event.key) for event in kernels))
    return " + ".join([*sorted(ops), *names[:most]]) or "the profiler saw none"


def _attention_op(key: str) -> str:
    """`aten::_scaled_dot_product_flash_attention` -> `sdpa:flash`; our own op as it is; empty for others."""
    if key.startswith("fastattn_cpu::") and key.endswith("attention_forward"):
        return key
    start = "aten::_scaled_dot_product_"
    if not key.startswith(start) or key.endswith("_backward"):
        return ""
    name = key.removeprefix(start).removesuffix("_for_cpu").removesuffix("_attention")
    return "sdpa:" + name.removeprefix("attention_")


def _short(kernel: str) -> str:
    return kernel.removeprefix("void ").partition("<")[0].partition("(")[0][:70]


def describe(dry_run: bool) -> dict[str, Any]:
    """The columns that all rows of a run share, without date."""
    if dry_run:
        machine, driver = "CPU in the place of a GPU", None
        cuda = None
    else:
        machine = torch.cuda.get_device_name()
        driver = _smi("driver_version")
        cuda = torch.version.cuda or f"hip {torch.version.hip}"
    return {
        "run": "dry-run" if dry_run else "gpu",
        "machine": machine,
        "driver": driver,
        "cuda": cuda,
        "torch": str(torch.__version__),
        "triton": next(
            filter(None, map(version, ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm"))),
            None,
        ),
        "fastattn": fastattn.__version__,
    }


def details(dry_run: bool) -> list[tuple[str, str]]:
    """What else there is to say of the device: its sizes, clocks and limits."""
    if dry_run:
        return [("device", "CPU, host timers: nothing here is a measurement of a GPU")]
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    lines = [
        ("processors", f"{found.multi_processor_count}"),
        ("memory", f"{found.total_memory / 2**30:.1f} GiB"),
        ("architecture", found.gcnArchName if torch.version.hip else f"sm_{found.major}{found.minor}"),
        ("L2", f"{getattr(found, 'L2_cache_size', 0) / 2**20:.0f} MiB"),
        ("cuDNN", str(torch.backends.cudnn.version() or "none")),
    ]
    for name, query in (
        ("clocks (SM, memory), MHz", "clocks.sm,clocks.mem"),
        ("highest clocks, MHz", "clocks.max.sm,clocks.max.mem"),
        ("power limit, W", "power.limit"),
        ("temperature, °C", "temperature.gpu"),
        ("clocks held back by", "clocks_event_reasons.active"),
    ):
        lines.append((name, _smi(query) or "unknown: nvidia-smi does not tell"))
    return lines


def version(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _smi(query: str) -> str | None:
    """What nvidia-smi says of the GPU that torch calls the first; None where it says nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    uuid = str(getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", ""))
    which = ["-i", f"GPU-{uuid}"] if uuid else []
    command = [tool, f"--query-gpu={query}", "--format=csv,noheader,nounits", *which]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = done.stdout.strip().splitlines()
    return found[0].strip() if found else None
