"""Builds the CPU kernels into the wheel; makes a pure one without a C++20 compiler or torch's headers.

Everything else about the package is in pyproject.toml. FASTATTN_SKIP_BUILD=1 asks for the pure wheel; its
kernels are then built on first use.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def load_build() -> ModuleType:
    """fastattn/_build.py by its path: importing the package would import torch, which may be absent."""
    spec = importlib.util.spec_from_file_location("fastattn_build", ROOT / "fastattn/_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildPy(build_py):
    """Adds csrc/ (a wheel without kernels builds them on first use) and the library to the package."""

    def run(self) -> None:
        package = ROOT / "fastattn"
        if not self.editable_mode:
            package = Path(self.build_lib, "fastattn")
            shutil.rmtree(package, ignore_errors=True)  # else a removed module of an older build comes along
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc", package / "csrc")
        self.distribution.has_kernels = self.build_kernels(package)

    def build_kernels(self, package: Path) -> bool:
        """Whether the library could be built into `package`; prints why where not."""
        if os.environ.get("FASTATTN_SKIP_BUILD") == "1":
            print("fastattn: FASTATTN_SKIP_BUILD=1, a wheel without kernels", file=sys.stderr)
            return False
        build = load_build()
        work_dir = ROOT / "build/kernels" if self.editable_mode else None
        try:
            build.build(ROOT / "csrc", build.find_torch(), package / build.LIBRARY_NAME, work_dir=work_dir)
        except build.BuildError as error:
            print(f"fastattn: a wheel without kernels, they are built on first use: {error}", file=sys.stderr)
            return False
        return True


class BdistWheel(bdist_wheel):
    """Tags the wheel by what is in it: the library has no Python symbols, one wheel serves every Python 3."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_kernels
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return tag if self.root_is_pure else ("py3", "none", tag[2])


class FastattnDistribution(Distribution):
    """Knows whether the kernels were built."""

    has_kernels = False

    def has_ext_modules(self) -> bool:
        return self.has_kernels


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel}, distclass=FastattnDistribution)
