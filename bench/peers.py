"""Everyone that attention is raced against: what each can do, how its users call it, and its version here.

`python -m bench.peers` prints the table. What really ran is never taken from it: the profiler tells.
"""

from __future__ import annotations

import importlib
import math
import operator
import platform
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastattn.gpu_check import peers
from fastattn.gpu_check.machine import version
from fastattn.gpu_check.peers import ON_GPUS, OURS, Attention, Inputs, Peer
from fastattn.gpu_check.report import Absent

LOOP_LENGTH = 64
HF_KERNELS = "kernels-community/flash-attn2"


def python_loop(inputs: Inputs, backend: str) -> Attention:
    """The equation over Python's numbers, for perspective; forward, of one batch and head at a time."""
    case = inputs.case
    if case.length > LOOP_LENGTH:
        raise Absent(f"a Python loop is raced up to length {LOOP_LENGTH} alone")
    causal = case.kind == "causal"

    def one_head(q: list[list[float]], k: list[list[float]], v: list[list[float]]) -> list[list[float]]:
        out = []
        for i, row in enumerate(q):
            keys = k[: i + 1] if causal else k
            scores = [sum(a * b for a, b in zip(row, key, strict=True)) / math.sqrt(case.dim) for key in keys]
            top = max(scores)
            weights = [math.exp(score - top) for score in scores]
            whole = sum(weights)
            columns = zip(*v[: len(keys)], strict=True)
            out.append([sum(map(operator.mul, weights, column)) / whole for column in columns])
        return out

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = zip(*(x.detach().flatten(0, 1).tolist() for x in (q, k, v)), strict=True)
        return torch.tensor([one_head(*head) for head in heads], dtype=q.dtype).view(*q.shape[:3], -1)

    return attention


def hf_kernels(inputs: Inputs, backend: str) -> Attention:
    """flash-attn as Hugging Face's `kernels` has it, from what was downloaded before."""
    case = inputs.case
    try:
        kernels, hub = importlib.import_module("kernels"), importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise Absent(f"kernels is not installed ({error})") from error
    try:
        with patch.object(hub.constants, "HF_HUB_OFFLINE", True):
            found = kernels.get_kernel(HF_KERNELS)
    except Exception as error:
        raise Absent(f"{HF_KERNELS} was not downloaded before ({type(error).__name__})") from error
    options = {"dropout_p": case.dropout} if case.kind == "dropout" else {}
    return peers.heads_last(found.flash_attn_func, causal=case.kind != "full", **options)


PEERS: dict[str, Peer] = {
    **peers.PEERS,
    "sdpa math": peers.forced(SDPBackend.MATH),
    "HF kernels": Peer(
        hf_kernels,
        f'kernels.get_kernel("{HF_KERNELS}").flash_attn_func(q, k, v, causal=True)',
        ("causal", "full", "dropout"),
        wide=False,
        **ON_GPUS,
    ),
    "python loop": Peer(
        python_loop,
        "three nested loops over floats",
        ("causal", "full"),
        grouped=False,
        forward=("cpu",),
        backward=(),
    ),
}
# What is raced where nothing else is asked for. On a CPU torch has one fused kernel, which is its default;
# what is compiled takes most of a minute before its first result.
SHORT = {
    "cpu": (OURS, "sdpa default", "naive", "python loop"),
    "cuda": tuple(name for name in PEERS if name != "python loop"),
}
EVERY = {
    "cpu": (OURS, "sdpa default", "sdpa math", "naive", "naive compiled", "flex compiled", "python loop"),
    "cuda": SHORT["cuda"],
}
# Peers of the operations that are not attention, by the package that has them.
OTHERS = {
    "cross_entropy": {"liger": "liger_kernel.transformers.functional.liger_cross_entropy"},
    "linear_cross_entropy": {
        "liger": "liger_kernel.transformers.functional.liger_fused_linear_cross_entropy"
    },
    "layer_norm": {"liger": "liger_kernel.transformers.functional.liger_layer_norm"},
    "rms_norm": {"liger": "liger_kernel.transformers.functional.liger_rms_norm"},
    "rotary": {"liger": "liger_kernel.transformers.functional.liger_rope"},
    "mlp": {"liger": "liger_kernel.transformers.functional.liger_swiglu"},
}


def chosen(names: str | None, device: str, every: bool = False) -> dict[str, Peer]:
    """The peers to race, ours first.

    Args:
        names: comma-separated; ``all``; or None for the usual ones of the device.
        device: ``cpu`` or ``cuda``.
        every: all that run on the device, where `names` is None.

    Raises:
        ValueError: no peer is called that.
    """
    if names is None:
        wanted = EVERY[device] if every else SHORT[device]
    else:
        wanted = tuple(PEERS) if names == "all" else (OURS, *names.split(","))
    unknown = [name for name in wanted if name not in PEERS]
    if unknown:
        raise ValueError(f"expected peers among {', '.join(PEERS)}; got {', '.join(unknown)}")
    return {name: peer for name, peer in PEERS.items() if name in wanted}


def version_of(name: str) -> str:
    """The version of what a peer is part of; empty where it is not installed."""
    if name == "python loop":
        return f"Python {platform.python_version()}"
    package = {"HF kernels": "kernels", "liger": "liger-kernel"}.get(name)
    return peers.version_of(name) if package is None else version(package) or ""


def main() -> None:
    """Print the table, in Markdown."""
    print("| peer | here | problems | forward | backward | called as |\n|---|---|---|---|---|---|")
    for name, peer in PEERS.items():
        more = [word for word, has in (("grouped heads", peer.grouped), ("v_dim", peer.wide)) if has]
        words = (", ".join(x) or "none" for x in ((*peer.can, *more), peer.forward, peer.backward))
        print(f"| {name} | {version_of(name) or 'no'} | {' | '.join(words)} | `{peer.how}` |")
    for op, others in OTHERS.items():
        for name, path in others.items():
            print(f"| {name} | {version_of(name) or 'no'} | {op} | cuda | cuda | `{path}` |")


if __name__ == "__main__":
    main()
