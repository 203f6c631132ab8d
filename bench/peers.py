"""Everyone that we are raced against: what each can do, how its users call it, and its version here.

`python -m bench.peers` prints the table. What really ran is never taken from it: the profiler tells.
"""

from __future__ import annotations

import importlib
import math
import operator
import platform
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastattn.gpu_check import peers
from fastattn.gpu_check.peers import CUDA, OURS, Attention, Inputs, Peer
from fastattn.gpu_check.report import Absent
from fastattn.machine import version

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
        forward=CUDA,
        backward=CUDA,
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


@dataclass(frozen=True)
class Other:
    """A peer of operations that are not attention.

    Attributes:
        how: what its users write.
        ops: the folders of bench/ that race it.
        devices: where it runs.
        usual: it is raced where none is named; what is compiled takes long before its first result.
    """

    how: str
    ops: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu", "cuda")
    usual: bool = True


_PLAIN = ("linear", "mlp", "cross_entropy", "layer_norm", "embedding")
OTHERS = {
    "torch": Other("torch.nn.functional, torch.optim.AdamW(fused=True)", ("attention", *_PLAIN, "adamw")),
    "torch compiled": Other("torch.compile of plain PyTorch", ("attention", *_PLAIN, "rotary"), usual=False),
    "transformers": Other("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", ("rotary",)),
    "liger": Other(
        "liger_kernel.transformers.functional",
        ("mlp", "cross_entropy", "layer_norm", "rotary"),
        devices=("cuda",),
    ),
}


@cache
def liger(name: str) -> Callable[..., Any]:
    """A function of Liger's by its name, such as ``liger_rms_norm``.

    Raises:
        Absent: it is not installed.
    """
    try:
        module = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError as error:
        raise Absent(f"liger-kernel is not installed ({error})") from error
    found: Callable[..., Any] = getattr(module, name)
    return found


def chosen_others(
    names: Collection[str], device: str, wanted: str | None = None, every: bool = False
) -> list[str]:
    """Those of an operation's implementations that are raced, ours always among them.

    Args:
        names: all that there are.
        device: ``cpu`` or ``cuda``.
        wanted: comma-separated; ``all``; or None for the usual ones.
        every: those that are compiled too, where `wanted` is None.

    Raises:
        ValueError: no peer of any operation is called that.
    """
    words = None if wanted in (None, "all") else [word.strip() for word in wanted.split(",")]
    known = dict.fromkeys((*names, *OTHERS, *PEERS))
    unknown = [word for word in words or () if word not in known]
    if unknown:
        raise ValueError(f"expected peers among {', '.join(known)}; got {', '.join(unknown)}")

    def takes(name: str) -> bool:
        other = OTHERS.get(name)
        if name.startswith(OURS) or (other is None and words is None):
            return True
        if other is not None and device not in other.devices:
            return False
        if words is not None:
            return name in words
        return every or wanted == "all" or other is None or other.usual

    return [name for name in names if takes(name)]


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
    unknown = [name for name in wanted if name not in PEERS and name not in OTHERS]
    if unknown:
        raise ValueError(f"expected peers among {', '.join(PEERS)}; got {', '.join(unknown)}")
    return {name: peer for name, peer in PEERS.items() if name in wanted}


def version_of(name: str) -> str:
    """The version of what a peer is part of; empty where it is not installed."""
    if name.startswith(OURS):
        return peers.version_of(OURS)
    if name == "python loop":
        return f"Python {platform.python_version()}"
    package = {"HF kernels": "kernels", "liger": "liger-kernel", "transformers": "transformers"}.get(name)
    return peers.version_of(name) if package is None else version(package) or ""


def main() -> None:
    """Print the table, in Markdown."""
    print("| peer | here | problems | forward | backward | called as |\n|---|---|---|---|---|---|")
    for name, peer in PEERS.items():
        more = [word for word, has in (("grouped heads", peer.grouped), ("v_dim", peer.wide)) if has]
        words = (", ".join(x) or "none" for x in ((*peer.can, *more), peer.forward, peer.backward))
        print(f"| {name} | {version_of(name) or 'no'} | {' | '.join(words)} | `{peer.how}` |")
    for name, other in OTHERS.items():
        words = (", ".join(x) for x in (other.ops, other.devices, other.devices))
        print(f"| {name} | {version_of(name) or 'no'} | {' | '.join(words)} | `{other.how}` |")


if __name__ == "__main__":
    main()
