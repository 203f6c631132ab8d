"""Build csrc/ into one shared library. Imports neither torch nor fastattn: setup.py loads it by its path.

The source list, and the flags of each file, are here and nowhere else. No file is compiled for the machine it
is compiled on: the instruction sets have a file each, and the library picks one when it runs. In a source
tree `python fastattn/_build.py` brings fastattn/_C.abi3.so up to date.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

LIBRARY_NAME: Final = "_C.abi3.so"
MIN_TORCH: Final = (2, 10)  # the oldest with every part of the stable ABI that csrc/ uses

_AVX2: Final = ("-mavx2", "-mfma", "-mf16c")
_AVX512: Final = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2)
# Baseline files first: where two objects carry the same inline function, the linker keeps the first.
SOURCES: Final[dict[str, tuple[str, ...]]] = {
    "library.cpp": (),
    "attention/attention.cpp": (),
    "attention/scalar.cpp": (),
    "attention/avx2.cpp": _AVX2,
    "attention/avx512.cpp": _AVX512,
    "attention/wide.cpp": _AVX2,
    "layer_norm/layer_norm.cpp": (),
    "layer_norm/scalar.cpp": (),
    "layer_norm/avx2.cpp": _AVX2,
    "layer_norm/avx512.cpp": _AVX512,
    "layer_norm/wide.cpp": _AVX2,
    "linear/linear.cpp": (),
    "linear/scalar.cpp": (),
    "linear/avx2.cpp": _AVX2,
    "linear/avx512.cpp": _AVX512,
    "linear/wide.cpp": _AVX2,
    "rotary/rotary.cpp": (),
    "rotary/scalar.cpp": (),
    "rotary/avx2.cpp": _AVX2,
    "rotary/avx512.cpp": _AVX512,
    "rotary/wide.cpp": _AVX2,
    "cross_entropy/cross_entropy.cpp": (),
    "cross_entropy/scalar.cpp": (),
    "cross_entropy/avx2.cpp": _AVX2,
    "cross_entropy/avx512.cpp": _AVX512,
    "cross_entropy/wide.cpp": _AVX2,
    "adamw/adamw.cpp": (),
    "adamw/scalar.cpp": (),
    "adamw/avx2.cpp": _AVX2,
    "adamw/avx512.cpp": _AVX512,
    "adamw/wide.cpp": _AVX2,
    "embedding/embedding.cpp": (),
    "embedding/scalar.cpp": (),
    "embedding/avx2.cpp": _AVX2,
    "embedding/avx512.cpp": _AVX512,
    "embedding/wide.cpp": _AVX2,
}
# Not -ffast-math: it breaks masking by -inf. These three give the kernels what they need of it.
_MATH: Final = ("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
FLAGS: Final = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    *_MATH,
    "-Wall",
    "-Wno-psabi",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # MIN_TORCH
)
_X86: Final = ("x86_64", "AMD64")
_PROBE: Final = (
    "#include <concepts>\n#include <span>\ntemplate <std::integral T> T f(std::span<T> x) { return x[0]; }"
)
# A library tells by this string, among its bytes, what it was built from: it can't be parted from it.
_STAMP: Final = "fastattn source hash: "


class BuildError(RuntimeError):
    """The kernels can't be built here; the message says why and what would help."""


class ToolMissing(BuildError):
    """What a build needs is not installed: no fault of the sources."""


class Compiler(NamedTuple):
    """A C++20 compiler: the command that runs it and what it calls itself."""

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler:
    """The compiler in ``$CXX``, else the first of c++, g++ and clang++ that does C++20.

    Raises:
        ToolMissing: none does, with what each of them said.
    """
    given = os.environ.get("CXX")
    candidates = [shlex.split(given)] if given else [["c++"], ["g++"], ["clang++"]]
    refused = []
    for command in candidates:
        path = shutil.which(command[0])
        if path is None:
            refused.append(f"{command[0]} not found")
            continue
        probe = subprocess.run(
            [*command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
            input=_PROBE,
            capture_output=True,
            text=True,
            check=False,
        )
        if probe.returncode == 0:
            about = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
            return Compiler((path, *command[1:]), about.stdout.split("\n")[0])
        said = (probe.stderr.strip() or f"exit status {probe.returncode}").split("\n")[0]
        refused.append(f"{path} does not compile C++20 ({said})")
    source = "$CXX: " if given else ""
    raise ToolMissing(
        f"no C++20 compiler: {source}{'; '.join(refused)}. Install g++ >= 11 or clang >= 14, or set CXX"
    )


def find_torch() -> Path:
    """The folder of an installed torch whose headers are new enough, found without importing it.

    Looks at ``$FASTATTN_TORCH_DIR``, else where this Python would import torch from, then where its
    site-packages lie: an isolated build imports from a folder of its own, but keeps the interpreter's paths.

    Raises:
        ToolMissing: there is none, with the folders looked at.
    """
    given = os.environ.get("FASTATTN_TORCH_DIR")
    refused = []
    for folder in [Path(given)] if given else _torch_folders():
        found = torch_version(folder)
        if found is None:
            refused.append(f"{folder} has no torch headers")
        elif found < MIN_TORCH:
            refused.append(f"{folder} is torch {found[0]}.{found[1]}")
        else:
            return folder
    wanted = ".".join(map(str, MIN_TORCH))
    raise ToolMissing(
        f"no torch >= {wanted} headers: {'; '.join(refused)}. Install torch first, or set FASTATTN_TORCH_DIR"
    )


def _torch_folders() -> Iterable[Path]:
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    roots = [sysconfig.get_path(key) for key in ("purelib", "platlib")]
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    roots += [sysconfig.get_path(key, vars=base) for key in ("purelib", "platlib")]
    roots.append(site.getusersitepackages())
    environment = os.environ.get(
        "VIRTUAL_ENV"
    )  # another's: some front ends build in an environment of their own
    if environment:
        roots.append(f"{environment}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages")
    for root in dict.fromkeys(roots):
        yield Path(root, "torch")


def torch_version(torch_dir: Path) -> tuple[int, int] | None:
    """(major, minor) of the torch whose headers are in `torch_dir`; None where there are none."""
    try:
        header = (torch_dir / "include/torch/headeronly/version.h").read_text()
    except OSError:
        return None
    found = [re.search(rf"#define TORCH_VERSION_{part} (\d+)", header) for part in ("MAJOR", "MINOR")]
    if found[0] is None or found[1] is None:
        return None
    return int(found[0][1]), int(found[1][1])


def source_hash(csrc: Path) -> str:
    """A hash of everything in `csrc` and of the flags it is compiled with."""
    digest = hashlib.sha256(repr((SOURCES, FLAGS)).encode())
    for path in sorted(csrc.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:32]


def built_from(library: Path) -> str | None:
    """The `source_hash` that `library` was built from; None if it isn't one of ours."""
    content = library.read_bytes()
    start = content.find(_STAMP.encode())
    if start < 0:
        return None
    start += len(_STAMP)
    return content[start : start + 32].decode("ascii", "replace")


def build(csrc: Path, torch_dir: Path, output: Path, *, work_dir: Path | None = None) -> None:
    """Compile `csrc` and link it to `output`, which is replaced in one step once it is whole.

    Args:
        csrc: the folder of the sources.
        torch_dir: the folder of an installed torch; its headers and its libtorch_cpu are used.
        output: the shared library to write.
        work_dir: where object files are kept, so that a second build compiles only what changed; a temporary
            folder if None.

    ``$CXX`` names the compiler and ``$FASTATTN_CXXFLAGS`` adds flags, for compiling and linking both.

    Raises:
        BuildError: no compiler, no ninja, or the compiler's errors.
    """
    _refuse_windows()
    if work_dir is None:
        with tempfile.TemporaryDirectory(prefix="fastattn-") as folder:
            return build(csrc, torch_dir, output, work_dir=Path(folder))
    compiler, ninja = find_compiler(), _find_ninja()
    output.parent.mkdir(parents=True, exist_ok=True)
    with _locked(work_dir):
        _build_locked(compiler, ninja, csrc, torch_dir, output, work_dir)
    return None


def _build_locked(
    compiler: Compiler, ninja: str, csrc: Path, torch_dir: Path, output: Path, work_dir: Path
) -> None:
    text = _STAMP + source_hash(csrc)
    stamp = f'extern "C" __attribute__((used)) const char fastattn_source_hash[] = "{text}";\n'
    _write_if_changed(work_dir / "stamp.cpp", stamp)
    _write_if_changed(work_dir / "build.ninja", _ninja_file(compiler, csrc.resolve(), torch_dir.resolve()))
    command = [ninja, "-C", str(work_dir)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"compiling {csrc} failed:\n{_tail(done.stdout)}")
    part = output.with_name(f".{output.name}.{os.getpid()}")
    shutil.copyfile(work_dir / LIBRARY_NAME, part)
    part.chmod(0o755)
    part.replace(output)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it against other processes and threads; a holder that dies lets go."""
    import fcntl  # noqa: PLC0415  (not on every platform)

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # between threads too: each has opened the file for itself
        yield


def _refuse_windows() -> None:
    if sys.platform == "win32":
        raise ToolMissing("the kernels do not build on Windows yet; in WSL they do")


def _find_ninja() -> str:
    spec = importlib.util.find_spec("ninja")
    if spec is not None:
        import ninja  # noqa: PLC0415

        path = shutil.which("ninja", path=ninja.BIN_DIR)
        if path is not None:
            return path
    path = shutil.which("ninja")
    if path is None:
        raise ToolMissing("ninja not found: pip install ninja")
    return path


def _ninja_file(compiler: Compiler, csrc: Path, torch_dir: Path) -> str:
    """One rule to compile, one to link, and for each file its own flags."""
    extra = shlex.split(os.environ.get("FASTATTN_CXXFLAGS", ""))
    include = [f"-I{csrc}", "-isystem", str(torch_dir / "include")]
    link = ["-shared", *extra]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    # Without this torch.ops.load_library can't resolve the symbols: torch's libraries are loaded RTLD_LOCAL.
    libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    lines = [
        f"# {compiler.version}",
        "rule compile",
        f"  command = {_shell(compiler.command)} -MMD -MF $out.d {_shell(FLAGS)} {_shell(include)} $isa "
        f"{_shell(extra)} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {_shell(compiler.command)} {_shell(link)} $in -o $out {_shell(libraries)}",
        "build stamp.o: compile stamp.cpp",
    ]
    objects = ["stamp.o"]
    for source, flags in SOURCES.items():
        name = source.replace("/", "_").replace(".cpp", ".o")
        objects.append(name)
        lines.append(f"build {name}: compile {_ninja_path(csrc / source)}")
        if flags and platform.machine() in _X86:
            lines.append(f"  isa = {_shell(flags)}")
    lines += [f"build {LIBRARY_NAME}: link {' '.join(objects)}", f"default {LIBRARY_NAME}", ""]
    return "\n".join(lines)


def _shell(words: Iterable[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _tail(text: str, lines: int = 30) -> str:
    """The compiler's first complaint and what follows, as far as `lines` go."""
    whole = text.strip().split("\n")
    start = next((i for i, line in enumerate(whole) if "error" in line or line.startswith("FAILED")), 0)
    return "\n".join(line[:400] for line in whole[start : start + lines])


def cache_root() -> Path:
    """Where libraries built on first use are kept: ``$FASTATTN_CACHE``, else in the user's cache folder."""
    given = os.environ.get("FASTATTN_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastattn"


def cache_key(csrc: Path, torch_dir: Path, torch_release: str) -> str:
    """What a cached library depends on, as a folder's name. Reading it runs no compiler."""
    given = shlex.split(os.environ.get("CXX", ""))
    candidates = [given[0]] if given else ["c++", "g++", "clang++"]
    paths = [Path(path).resolve() for path in map(shutil.which, candidates) if path]
    compilers = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    parts = (
        source_hash(csrc),
        str(torch_dir),
        torch_release,
        given,
        compilers,
        os.environ.get("FASTATTN_CXXFLAGS", ""),
        sysconfig.get_platform(),
    )
    return f"torch{torch_release}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}"


def build_in_cache(csrc: Path, torch_dir: Path, torch_release: str) -> Path:
    """The library of `csrc` in the user's cache; where it isn't, one process builds it and the others wait.

    Args:
        csrc: the folder of the sources.
        torch_dir: the folder of the running torch.
        torch_release: its version.

    Returns:
        The library's path.

    Raises:
        BuildError: it can't be built, or the cache can't be written.
    """
    _refuse_windows()
    try:
        folder = cache_root() / cache_key(csrc, torch_dir, torch_release)
        library = folder / LIBRARY_NAME
        if library.exists():
            return library
        with _locked(folder):
            if not library.exists():
                print(f"fastattn: building the CPU kernels into {folder}, once", file=sys.stderr, flush=True)
                build(csrc, torch_dir, library)
            return library
    except OSError as error:
        raise BuildError(
            f"the cache {cache_root()} can't be used ({error}); set FASTATTN_CACHE to a folder that can"
        ) from error


def main() -> None:
    """Build the library of a source tree in place."""
    package = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description="Build the CPU kernels of a source tree.")
    parser.add_argument("--output", type=Path, default=package / LIBRARY_NAME, help="default: %(default)s")
    parser.add_argument(
        "--work-dir", type=Path, default=package.parent / "build/kernels", help="keeps object files"
    )
    parser.add_argument("--if-possible", action="store_true", help="no error where there is no compiler")
    args = parser.parse_args()
    csrc = package.parent / "csrc"
    try:
        build(csrc, find_torch(), args.output, work_dir=args.work_dir)
    except ToolMissing as error:
        parser.exit(0 if args.if_possible else 1, f"fastattn: no kernels: {error}\n")
    except BuildError as error:
        parser.exit(1, f"fastattn: {error}\n")


if __name__ == "__main__":
    main()
