"""Which backends are here, and if not, the reasons. The only file that asks the hardware.

The C++ library is looked for when it is first needed, never at import: the one installed with the package,
else one built from csrc/ into the user's cache, else none, and then one warning says what to do.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import threading
import warnings
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import torch

from fastattn import _build

# Best first: the order in which `attention` looks for one that can run.
NAMES: Final = ("cpu", "triton", "reference")
# The C++ kernels' instruction sets and their ids in csrc/common/isa.h, slowest first.
ISAS: Final = ("scalar", "avx2", "avx512", "wide")
# CPUs that have the instruction set and on which its kernels have passed the tests.
TESTED_ON: Final = {"scalar": "AMD Zen 5", "avx2": "AMD Zen 5", "avx512": "AMD Zen 5", "wide": "AMD Zen 5"}
_WIDE: Final = ISAS.index("wide")  # the 16-lane body on AVX2: for its results, never the default
# What the Triton kernels need: named tuples as arguments, and an NVIDIA GPU of sm_80 or any of AMD's.
TRITON: Final = (3, 6)
CAPABILITY: Final = (8, 0)
# What `gpu_architecture` calls Triton's interpreter, which runs the kernels in Python, for tests.
INTERPRETER: Final = "interpreter"

# Set to one of ISAS it takes the place of FASTATTN_ISA; see `fastattn.testing`.
isa_override: str | None = None

_PACKAGE: Final = Path(__file__).resolve().parent
_lock = threading.Lock()


class Library(NamedTuple):
    """The C++ library that was loaded, or why there is none.

    Attributes:
        path: what was loaded; None where nothing could be.
        origin: how it came here, in words.
        notes: what was tried before, and did not do.
    """

    path: Path | None
    origin: str
    notes: tuple[str, ...] = ()


_library: Library | None = None


def library() -> Library:
    """The C++ library, loaded at the first call; RuntimeWarning at that call where there is none."""
    global _library  # noqa: PLW0603
    if _library is None:
        with _lock:
            if _library is None:
                found = _find_library()
                if found.path is None:
                    _warn(found)
                _library = found
    return _library


def csrc() -> Path | None:
    """The kernels' sources: beside the package in a source tree, within it in an installed one."""
    return next(
        (folder for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if _is_csrc(folder)), None
    )


def _is_csrc(folder: Path) -> bool:
    return (folder / "library.cpp").is_file()


def _find_library() -> Library:
    given = os.environ.get("FASTATTN_LIBRARY")
    if given:
        failed = _load(Path(given))
        if failed:
            return Library(None, "none", (f"FASTATTN_LIBRARY: {failed}",))
        return Library(Path(given), "FASTATTN_LIBRARY")
    notes = []
    sources = csrc()
    prebuilt = _PACKAGE / _build.LIBRARY_NAME
    if not prebuilt.exists():
        notes.append(f"no library was installed ({prebuilt})")
    elif sources is not None and _build.built_from(prebuilt) != _build.source_hash(sources):
        notes.append(f"{prebuilt} was not built from what {sources} is now")
    else:
        failed = _load(prebuilt)
        if not failed:
            return Library(prebuilt, "installed with the package")
        notes.append(failed)

    if os.environ.get("FASTATTN_JIT") == "0":
        notes.append("FASTATTN_JIT=0: none is built on first use")
    elif sources is None:
        notes.append("there are no sources to build one from")
    else:
        torch_dir = Path(torch.__file__).parent
        try:
            built = _build.build_in_cache(sources, torch_dir, str(torch.__version__))
        except _build.BuildError as error:
            notes.append(str(error))
        else:
            failed = _load(built)
            if not failed:
                return Library(built, "built on first use", tuple(notes))
            notes.append(failed)
    return Library(None, "none", tuple(notes))


def _load(path: Path) -> str | None:
    """Load the library; what went wrong if it can't be."""
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"{path} does not load: {str(error).splitlines()[0]}"
    if not hasattr(torch.ops.fastattn_cpu, "isa_present"):
        return f"{path} is not a fastattn library"
    return None


def _warn(found: Library) -> None:
    warnings.warn(
        "fastattn: the CPU kernels are not here, so attention on CPU runs as plain PyTorch: slower, and with "
        f"the whole L×L matrix in memory. {'; '.join(found.notes)}. `python -m fastattn env` tells more",
        RuntimeWarning,
        stacklevel=2,
    )


def unavailable(backend: str) -> list[str]:
    """Why `backend` is not here; empty where it is."""
    if backend == "cpu":
        found = library()
        return list(found.notes) if found.path is None else []
    if backend == "triton":
        return [*_triton_reasons(), *_gpu_reasons()]
    return []


# What torch.compiler.assume_constant_result does. Calling it would import torch._dynamo, and sympy with it:
# 1.7 s at `import fastattn`.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable_on(device: torch.device) -> list[str]:
    """Why the `triton` backend can't run on `device`, one of type cpu or cuda; empty where it can."""
    return list(_reasons_on(device, interpreting()))


unavailable_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def interpreting() -> bool:
    """Whether Triton's interpreter is to run the kernels: the environment has TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def gpu_architecture(device: torch.device) -> str:
    """What Triton compiles for on `device`: ``"sm_90"``, ``"gfx942"``; ``"interpreter"`` where it interprets.

    Raises:
        ValueError: neither a GPU nor, for the interpreter, a CPU.
    """
    if device.type == "cpu" or interpreting():
        return INTERPRETER
    if device.type != "cuda":
        raise ValueError(f"device: expected one of type cpu or cuda, got {device}")
    return _architecture(torch.cuda.current_device() if device.index is None else device.index)


gpu_architecture._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _architecture(index: int) -> str:
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(index).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


@cache
def _triton_version() -> str | None:
    """Of the module `triton`, without importing it; None where there is none."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:  # nothing, or a folder of that name
        return None
    # It has other names where it comes with torch for AMD or a nightly torch.
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(importlib.import_module("triton").__version__)


def _triton_reasons() -> list[str]:
    version = _triton_version()
    wanted = ".".join(str(part) for part in TRITON)
    if version is None:
        return [f"triton is not installed: pip install 'triton>={wanted}'"]
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < TRITON:
        return [f"expected triton {wanted} or newer, got {version}"]
    return []


def _gpu_reasons() -> list[str]:
    if interpreting() or torch.cuda.is_available():
        return []
    return [f"torch {torch.__version__} sees no GPU"]


@cache
def _reasons_on(device: torch.device, interpreted: bool) -> tuple[str, ...]:
    reasons = _triton_reasons()
    if interpreted:
        return tuple(reasons)
    if device.type == "cpu":
        return (*reasons, "expected TRITON_INTERPRET=1 in the environment with tensors on cpu")
    reasons += _gpu_reasons()
    if not reasons and torch.version.hip is None:
        found = torch.cuda.get_device_capability(device)
        if found < CAPABILITY:
            reasons.append(f"expected a GPU of sm_80 or newer, got {gpu_architecture(device)} ({device})")
    return tuple(reasons)


def require(backend: str) -> None:
    """Raise RuntimeError where `backend` is not here."""
    reasons = unavailable(backend)
    if reasons:
        raise RuntimeError(f"backend={backend!r} is not here: {'; '.join(reasons)}")


@cache
def isas_present() -> tuple[str, ...]:
    """The instruction sets that this CPU can run and the library has kernels for.

    Raises:
        RuntimeError: there is no library.
    """
    require("cpu")
    present: int = torch.ops.fastattn_cpu.isa_present()
    return tuple(name for bit, name in enumerate(ISAS) if present >> bit & 1)


def cpu_isa() -> str:
    """Name of the instruction set the C++ kernels run on.

    Raises:
        ValueError: FASTATTN_ISA, or `isa_override`, is none of those present.
    """
    return ISAS[cpu_isa_id()]


def cpu_isa_id() -> int:
    """Its id in csrc/common/isa.h."""
    return _pick_isa(isa_override)


@cache
def _pick_isa(override: str | None) -> int:
    present = isas_present()
    wanted = override or os.environ.get("FASTATTN_ISA")
    if wanted:
        if wanted not in present:
            source = "isa_override" if override else "FASTATTN_ISA"
            raise ValueError(f"{source}: expected one of {list(present)} (present here), got {wanted!r}")
        return ISAS.index(wanted)
    return max(ISAS.index(name) for name in present if ISAS.index(name) != _WIDE)
