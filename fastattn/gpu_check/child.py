"""`python -m fastattn.gpu_check.child ORDER`: runs steps one after another and tells of them (`report.py`).

ORDER is JSON: ``steps`` (names), ``seconds`` (for all of them), ``dry_run``, ``backend``, ``done`` (by step
the cases that were run before), ``lost`` (of these the ones that took their process with them) and ``memory``
(the share of the device's that it may take, or null).
"""

from __future__ import annotations

import gc
import json
import sys
import time
import traceback
from typing import Any

import torch

from fastattn.gpu_check.report import Report, reraise_if_lost, status_of
from fastattn.gpu_check.steps import steps
from fastattn.machine import Machine


def main(order: dict[str, Any]) -> None:
    """Run the steps of an order."""
    machine = Machine(order["dry_run"])
    if not machine.dry_run:
        # cuBLAS in its exact mode: the oracle's float32 is to be float32.
        torch.backends.cuda.matmul.allow_tf32 = False
        if order["memory"] is not None:
            torch.cuda.set_per_process_memory_fraction(order["memory"])
    known, end = steps(order["dry_run"]), time.monotonic() + order["seconds"]
    names = order["steps"]
    for i, name in enumerate(names):
        weights = [known[one].weight for one in names[i:]]
        seconds = max(end - time.monotonic(), 0.0) * weights[0] / sum(weights)
        print(f"@begin {name}", flush=True)
        report = Report(
            name, machine, order["backend"], seconds, order["done"].get(name, ()), order["lost"].get(name, ())
        )
        try:
            known[name].run(report)
        except Exception as failure:
            traceback.print_exc()
            status, note = status_of(failure)
            package = getattr(failure, "name", None) if isinstance(failure, ModuleNotFoundError) else None
            if package is not None and not package.startswith("fastattn"):
                status, note = "not run", f"{package} is not installed"
            report.row(case=name, implementation="fastattn", status=status, note=note)
            reraise_if_lost(failure)
        print(f"@end {name}", flush=True)
        gc.collect()
        if "torch._dynamo" in sys.modules:  # to import it takes seconds
            torch.compiler.reset()
        if not machine.dry_run:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
