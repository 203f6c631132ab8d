"""One version of the package, timing calls when it is told to.

    python bench/against/worker.py ROOT

imports fastattn from the checkout ROOT, and `bench.calls` from the checkout that this file is of, so that
both versions run the same calls. A line of JSON on stdin is answered by one on stdout: ``{"call", "size",
"pass"}`` prepares and answers what came out; ``{"repeat"}`` runs that so often and answers the seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
            tensors = found if isinstance(found, list) else [found]
            answer = {"norms": [float(x.double().norm()) for x in tensors]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
