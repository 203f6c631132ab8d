"""One version of the package, timing calls when it is told to.

    python bench/against/worker.py ROOT

imports fastattn from the checkout ROOT, and `bench.calls` from the checkout that this file is of, so that
both versions run the same calls. A line of JSON on stdin is answered by one on stdout: ``{"call", "size",
"pass"}`` prepares a call, and with ``"save"`` writes there what came out of its second run; ``{"repeat"}``
runs it so often and answers the seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    sys.path[0] = str(root)
    import fastattn

    assert Path(fastattn.__file__).is_relative_to(root), (
        f"expected fastattn of {root}, got {fastattn.__file__}"
    )
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from bench import calls

    prepared: Callable[[], Any] = lambda: None  # noqa: E731
    print(json.dumps({"calls": calls.here(), "version": fastattn.__version__}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "repeat" in order:
            start = time.perf_counter()
            for _ in range(order["repeat"]):
                prepared()
            answer: dict[str, Any] = {"seconds": time.perf_counter() - start}
        else:
            call = calls.make(order["call"], order["size"])
            prepared = call.forward if order["pass"] == "forward" else call.both
            prepared()
            found = prepared()
            if "save" in order:
                torch.save([x.detach() for x in found] if isinstance(found, list) else [found], order["save"])
            answer = {}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
