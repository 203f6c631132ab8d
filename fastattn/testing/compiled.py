"""Compile Triton kernels for a GPU that is not here, and read off the binary what became of them.

The host code runs as it is, on CPU tensors, so that a kernel is compiled for the very arguments that a GPU
would be given; a launch compiles and launches nothing. What is read: registers, spills, shared memory,
instructions. What can't be told this way: whether results are right, races, speed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from fastattn.ops.attention.triton import tuning

_SASS: Final = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_RESOURCES: Final = re.compile(r"REG:(\d+)\s+STACK:(\d+)")
_GCN: Final = re.compile(r"^\s+((?:s|v|ds|buffer|global|flat|scratch)_[a-z0-9_]+)", re.MULTILINE)


class Kernel(NamedTuple):
    """What one kernel was compiled to.

    Attributes:
        name: of the function.
        target: ``"sm_90"``, ``"gfx942"``, ...
        registers: 32-bit registers a thread.
        spills: loads and stores of registers that were one too many (AMD: registers spilled).
        stack: bytes a thread.
        shared_memory: bytes a program.
        tensor_memory: columns a program, of 512 (Blackwell's data-center parts).
        threads: threads a program, those of warp-specialised loads included.
        programs: how many fit on a multiprocessor at once, by registers, shared memory and warps; an
            estimate, and None where the limits are not known here.
        instructions: how many there are.
        opcodes: how often each occurs, without its modifiers.
    """

    name: str
    target: str
    registers: int
    spills: int
    stack: int
    shared_memory: int
    tensor_memory: int
    threads: int
    programs: int | None
    instructions: int
    opcodes: dict[str, int]

    def count(self, prefix: str) -> int:
        """How many instructions begin with `prefix`: ``"HGMMA"``, ``"v_mfma"``."""
        return sum(count for name, count in self.opcodes.items() if name.startswith(prefix))


def compile_kernels(
    target: str, call: Callable[[], object], names: Container[str] | None = None
) -> list[Kernel]:
    """Compile what `call` launches.

    Args:
        target: ``"sm_80"``, ``"sm_90"``, ``"sm_100"``, ``"gfx942"`` or any other that Triton compiles for.
        call: runs host code of the Triton backend on CPU tensors; what comes out is uninitialised memory.
        names: of the functions to read the binaries of; of all if None.

    Returns:
        One for each different kernel that was launched, in that order.

    Raises:
        RuntimeError: kernels run in Triton's interpreter in this process (TRITON_INTERPRET).
        ValueError: not the name of a GPU architecture.
    """
    with launches_compile(target) as launched:
        call()
    unique = {kernel.hash: kernel for kernel in launched if names is None or kernel.name in names}
    return [_read(kernel, target) for kernel in unique.values()]


@contextmanager
def launches_compile(target: str) -> Iterator[list[Any]]:
    """Inside, a launch of any Triton kernel compiles it for `target`, and launches nothing.

    Yields:
        The list that Triton's CompiledKernel of each launch is added to.

    Raises: as `compile_kernels` does.
    """
    import triton  # noqa: PLC0415 - importing this module needs no triton
    from triton.runtime.jit import JITFunction  # noqa: PLC0415

    if triton.knobs.runtime.interpret:
        raise RuntimeError("expected a process without TRITON_INTERPRET: the interpreter compiles nothing")
    drivers = triton.runtime.driver
    before, run, architecture = drivers._active, JITFunction.run, tuning.forced_architecture
    launched: list[Any] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if not target.startswith("gfx"):
            _write_launcher(kernel)
        launched.append(kernel)
        return kernel

    drivers.set_active(_Driver(target))
    JITFunction.run = compile_only
    tuning.forced_architecture = target
    try:
        yield launched
    finally:
        JITFunction.run = run
        drivers._active = before
        tuning.forced_architecture = architecture


def _write_launcher(kernel: Any) -> None:
    """What Triton does first at a launch: arguments that a kernel is compiled for may still not launch."""
    from triton.backends.nvidia import driver  # noqa: PLC0415

    # Later versions write no C for each kernel.
    make_launcher = getattr(driver, "make_launcher", None)
    if make_launcher is not None:
        src = kernel.src
        place = lambda x: (src.fn.arg_names.index(x),) if isinstance(x, str) else x  # noqa: E731
        constants = {place(key): value for key, value in src.constants.items()}
        make_launcher(constants, dict(src.signature), getattr(kernel.metadata, "tensordesc_meta", None))


class _Driver:
    """What Triton asks a driver when it compiles."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget  # noqa: PLC0415

        tuning.relatives(target)
        if target.startswith("gfx"):
            self.target = GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
        else:
            self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        # A JITFunction keeps what it compiled by device.
        return f"none: compiling for {self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0


def _read(kernel: Any, target: str) -> Kernel:
    facts = _read_amd(kernel) if target.startswith("gfx") else _read_nvidia(kernel)
    warp = kernel.metadata.target.warp_size
    programs = _programs(target, facts["registers"], kernel.metadata.shared, -(-facts["threads"] // warp))
    return Kernel(
        name=kernel.metadata.name,
        target=target,
        shared_memory=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        programs=programs,
        instructions=sum(facts["opcodes"].values()),
        **facts,
    )


def _read_nvidia(kernel: Any) -> dict[str, Any]:
    import triton  # noqa: PLC0415

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", binary)
        code = _output(tools / "nvdisasm", "-c", binary)
    resources = _RESOURCES.search(usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump: expected a line REG:… STACK:…, got {usage!r}")
    opcodes = Counter(_SASS.findall(code))
    del opcodes["NOP"]
    threads = re.search(r"\.reqntid (\d+)", kernel.asm["ptx"])
    return {
        "registers": int(resources[1]),
        "spills": opcodes["STL"] + opcodes["LDL"],
        "stack": int(resources[2]),
        "threads": int(threads[1]) if threads else 32 * kernel.metadata.num_warps,
        "opcodes": dict(opcodes),
    }


def _read_amd(kernel: Any) -> dict[str, Any]:
    code = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", code)
        if found is None:
            raise RuntimeError(f"amdgcn: expected a line .{name}: …, found none")
        return int(found[1])

    return {
        "registers": number("vgpr_count"),
        "spills": number("vgpr_spill_count"),  # those of scalars go to vector registers, not to memory
        "stack": number("private_segment_fixed_size"),
        "threads": number("max_flat_workgroup_size"),
        "opcodes": dict(Counter(_GCN.findall(code))),
    }


def _output(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(str(command[0])).name}: {done.stderr.strip()}")
    return done.stdout


def _programs(target: str, registers: int, shared: int, warps: int) -> int | None:
    """How many programs a multiprocessor (gfx9: a compute unit) holds at once."""
    if target.startswith("gfx"):
        if not target.startswith("gfx9"):
            return None
        # Four SIMDs of at most 8 waves, with 512 registers a lane, given out by eights.
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))
        return min(waves // warps, tuning.shared_memory(target) // max(1, shared))
    per_block = tuning.shared_memory(target)
    # 1 KiB of a multiprocessor's shared memory is the system's, for each block of threads.
    by_shared = (per_block + 1024) // (shared + 1024)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    warps_at_once = 48 if per_block == 99 * 1024 else 64  # of consumer parts, of data-center parts
    return min(warps_at_once // warps, by_registers, by_shared)
