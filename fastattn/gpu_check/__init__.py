"""`fastattn gpu-check`: one command that finds out whether fastattn is right and fast on this machine's GPU.

Every feature forward and backward against float64, then compute-sanitizer, then the benchmarks against every
attention that is installed. Needs torch and triton. Each step runs in a process of its own (`child.py`), so
that a crash or a hang costs that step alone; rows are written as they are measured (`rows.py`).
"""

from fastattn.gpu_check.command import add_arguments, run

__all__ = ["add_arguments", "run"]
