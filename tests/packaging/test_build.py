"""How the library is compiled: flags, stamps, and what must not be in it."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn import _build

ROOT = Path(__file__).resolve().parents[2]
COMPILER = _build.Compiler(("/usr/bin/c++", "-pipe"), "c++ 1.0")


def commands(text: str) -> dict[str, str]:
    """For each source of a build.ninja the instruction-set flags it is compiled with."""
    found = {}
    source = ""
    for line in text.split("\n"):
        if ": compile " in line:
            source = line.split(": compile ")[1]
            found[Path(source).name] = ""
        elif line.startswith("  isa = "):
            found[Path(source).name] = line.removeprefix("  isa = ")
    return found


def test_flags_are_per_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    text = _build._ninja_file(COMPILER, Path("/csrc"), Path("/torch"))
    isa = commands(text)
    assert isa["library.cpp"] == isa["attention.cpp"] == isa["scalar.cpp"] == ""
    assert isa["avx2.cpp"] == isa["wide.cpp"] == "-mavx2 -mfma -mf16c"
    assert "-mavx512f" in isa["avx512.cpp"]
    assert "-march" not in text
    assert "-ffast-math" not in text
    assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in text


def test_other_processors_get_no_x86_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    text = _build._ninja_file(COMPILER, Path("/csrc"), Path("/torch"))
    assert set(commands(text)) >= {"avx2.cpp", "scalar.cpp"}  # compiled all the same: to nothing
    assert "-mavx" not in text


def test_extra_flags_compile_and_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTATTN_CXXFLAGS", "-g '-DWHO=a b'")
    text = _build._ninja_file(COMPILER, Path("/csrc"), Path("/torch"))
    assert text.count("-g '-DWHO=a b'") == 2


def test_every_source_is_listed() -> None:
    listed = set(_build.SOURCES)
    assert listed == {path.relative_to(ROOT / "csrc").as_posix() for path in (ROOT / "csrc").rglob("*.cpp")}


@pytest.mark.usefixtures("compiler")
def test_build_stamps_the_library(tree: Path, tmp_path: Path) -> None:
    output, work_dir = tmp_path / "out dir" / "_C.abi3.so", tmp_path / "work"
    _build.build(tree / "csrc", _build.find_torch(), output, work_dir=work_dir)
    assert _build.built_from(output) == _build.source_hash(tree / "csrc")
    compiled = (work_dir / "library.o").stat().st_mtime_ns

    (tree / "csrc/attention/scalar.cpp").write_text("// changed\n")
    assert _build.built_from(output) != _build.source_hash(tree / "csrc")
    _build.build(tree / "csrc", _build.find_torch(), output, work_dir=work_dir)
    assert _build.built_from(output) == _build.source_hash(tree / "csrc")
    assert (work_dir / "library.o").stat().st_mtime_ns == compiled  # only what changed


@pytest.mark.usefixtures("compiler")
def test_compile_error_is_told_and_leaves_the_old_library(tree: Path, tmp_path: Path) -> None:
    output = tmp_path / "_C.abi3.so"
    output.write_text("old")
    (tree / "csrc/library.cpp").write_text("int broken = nonsense;\n")
    with pytest.raises(_build.BuildError, match="nonsense"):
        _build.build(tree / "csrc", _build.find_torch(), output)
    assert output.read_text() == "old"
    assert [path.name for path in tmp_path.glob("*.so*")] == [output.name]


def test_find_compiler_takes_cxx_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(_build.ToolMissing, match=r"\$CXX: no-such-compiler not found"):
        _build.find_compiler()
    monkeypatch.setenv("CXX", shutil.which("false") or "false")
    with pytest.raises(_build.BuildError, match=r"does not compile C\+\+20"):
        _build.find_compiler()


def test_find_torch_names_what_it_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    header = tmp_path / "include/torch/headeronly/version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 9\n")
    monkeypatch.setenv("FASTATTN_TORCH_DIR", str(tmp_path))
    with pytest.raises(_build.ToolMissing, match=r"no torch >= 2\.10 headers: .* is torch 2\.9"):
        _build.find_torch()
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 10\n")
    assert _build.find_torch() == tmp_path


def test_make_goes_on_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    for arguments, status in (["--if-possible"], 0), ([], 1):
        monkeypatch.setattr(sys, "argv", ["_build.py", *arguments])
        with pytest.raises(SystemExit) as stopped:
            _build.main()
        assert stopped.value.code == status
        assert "no-such-compiler not found" in capsys.readouterr().err


def nm(*arguments: str) -> list[list[str]]:
    done = subprocess.run(["nm", *arguments], capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.split("\n")]


needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
needs_library = pytest.mark.skipif(
    not (ROOT / "fastattn" / _build.LIBRARY_NAME).exists() or sys.platform != "linux",
    reason="no library was built in the source tree",
)


@needs_nm
@needs_library
def test_library_has_no_python_symbols() -> None:
    names = [words[-1] for words in nm("-D", str(ROOT / "fastattn" / _build.LIBRARY_NAME)) if words]
    assert [name for name in names if "aoti_torch" in name]
    assert not [name for name in names if name.startswith(("Py", "_Py"))]


@needs_nm
@needs_library
@pytest.mark.parametrize("source", [source for source, flags in _build.SOURCES.items() if flags])
def test_no_inline_function_leaks_an_instruction_set(source: str) -> None:
    # The linker keeps one copy of a weak function for the whole library: one compiled for AVX-512 would then
    # run, and crash, on every machine.
    path = ROOT / "build/kernels" / source.replace("/", "_").replace(".cpp", ".o")
    if not path.exists():
        pytest.skip("no object files in build/kernels")
    weak = [words[-1] for words in nm("--defined-only", str(path)) if len(words) == 3 and words[1] in "WVuwv"]
    assert not weak
