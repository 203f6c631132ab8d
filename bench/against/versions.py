"""A checkout of another version beside this one, with its kernels built."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What a library is made of.
SOURCES = ("csrc", "fastattn/_build.py")


def git(*words: str) -> str:
    """What git says in this checkout.

    Raises:
        ValueError: it says no; with its message.
    """
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """A temporary worktree of a commit, branch or tag.

    Raises:
        ValueError: git knows none of that name.
    """
    commit = git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="fastattn-") as folder:
        root = Path(folder) / "checkout"
        git("worktree", "add", "--quiet", "--detach", str(root), commit)
        try:
            yield root
        finally:
            git("worktree", "remove", "--force", str(root))


def library(root: Path) -> Path:
    """The C++ library of a checkout, built once for each state of its sources and kept under build/against/.

    Raises:
        subprocess.CalledProcessError: it can't be built.
    """
    digest = hashlib.sha256()
    for name in SOURCES:
        top = root / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file():
                digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    kept = ROOT / "build" / "against" / f"{digest.hexdigest()[:16]}.so"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        # This checkout's own build is incremental.
        work = [] if root == ROOT else ["--work-dir", str(root / "build" / "work")]
        partial = kept.with_suffix(".partial.so")
        build = [sys.executable, "fastattn/_build.py", "--output", str(partial), *work]
        subprocess.run(build, cwd=root, check=True)
        partial.replace(kept)
    return kept


class Worker:
    """A process that runs one version."""

    def __init__(self, root: Path, built: Path) -> None:
        # A thread that waits for its turn leaves the cores to the other version.
        environment = os.environ | {"FASTATTN_LIBRARY": str(built), "OMP_WAIT_POLICY": "PASSIVE"}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "bench/against/worker.py"), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.calls: list[str] = self._read()["calls"]

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer.

        Raises:
            RuntimeError: it ended; what it said is on stderr.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a version's process ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        self.process.communicate(timeout=60)
