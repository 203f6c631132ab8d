"""How attention of `DTensor`s is sharded: over the batch, or over the heads, without communication."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch

# Where the tensors of a problem stand behind q, k and v; and its dropout.
_NAMES: Final = ("mask", "blocks", "ranges", "bias", "relative", "origin", "sinks", "seed")
_DROPOUT: Final = 17
_OPTIONS: Final = 11  # what follows the tensors, backend included
# The dimension of each that goes over the heads.
_HEADS: Final = {"mask": 1, "blocks": 1, "bias": 1, "relative": 1, "sinks": 1}
_BATCH: Final = {"mask": 0, "blocks": 0, "ranges": 0, "bias": 0, "relative": 0, "origin": 0}


@cache
def register_sharding() -> None:
    """Teach `DTensor` how attention is sharded, once in a process.

    Inputs sharded over the batch or over the heads, as tensor parallelism leaves them, are computed where
    they are; of grouped heads only where the devices share out the keys' heads evenly. Others are gathered
    first. So is everything where there is dropout, which goes by the place in the whole batch.

    Raises:
        RuntimeError: torch was built without `torch.distributed`.

    Source: the rules of `torch.distributed.tensor.experimental.register_sharding`.

    Example:
        >>> import torch, fastattn.distributed
        >>> if torch.distributed.is_available():
        ...     fastattn.distributed.register_sharding()
    """
    if not torch.distributed.is_available():
        raise RuntimeError("register_sharding: expected a torch with torch.distributed")
    from torch.distributed.tensor.experimental import register_sharding as register  # noqa: PLC0415

    register(torch.ops.fastattn.attention_forward.default)(_forward)
    register(torch.ops.fastattn.attention_backward.default)(_backward)


Rule = tuple[list[Any], list[Any]]


def _forward(q: Any, k: Any, v: Any, *problem: Any) -> list[Rule]:
    found = []
    for placement, dims in _ways(q, k, problem):
        own = [_own(placement, dims, name, x, q) for name, x in zip(_NAMES, problem, strict=False)]
        found.append(([placement] * 2, [placement] * 3 + own + [None] * _OPTIONS))
    return found


def _backward(dout: Any, dlse: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *problem: Any) -> list[Rule]:
    from torch.distributed.tensor import Partial, Replicate  # noqa: PLC0415

    found = []
    for placement, dims in _ways(q, k, problem):
        own = [_own(placement, dims, name, x, q) for name, x in zip(_NAMES, problem, strict=False)]
        wanted = problem[-1]
        grads: list[Any] = []
        for bit, name in ((1, "bias"), (2, "relative"), (4, "sinks")):
            given = own[_NAMES.index(name)]
            whole = not wanted & bit or isinstance(placement, Replicate)
            # The gradient of what is shared by the devices is the sum of theirs.
            grads.append(Replicate() if whole else given if given == placement else Partial())
        of_qkv = [placement if wanted & 8 else Replicate()] * 3
        saved = [placement, None if dlse is None else placement, *[placement] * 5]
        found.append((of_qkv + grads, saved + own + [None] * (_OPTIONS + 1)))
    return found


def _ways(q: Any, k: Any, problem: Sequence[Any]) -> list[tuple[Any, dict[str, int]]]:
    """How q is placed, and which dimension of the others goes with it."""
    from torch.distributed.tensor import Replicate, Shard  # noqa: PLC0415

    ways: list[tuple[Any, dict[str, int]]] = [(Replicate(), {})]
    if problem[_DROPOUT] > 0:
        return ways
    devices = q.mesh.size()
    if q.tensor_meta.shape[0] % devices == 0:
        ways.append((Shard(0), _BATCH))
    if k.tensor_meta.shape[1] % devices == 0:
        ways.append((Shard(1), _HEADS))
    return ways


def _own(placement: Any, dims: dict[str, int], name: str, x: Any, q: Any) -> Any:
    """How a tensor of the problem is placed: as q where it has q's size there."""
    from torch.distributed.tensor import Replicate, Shard  # noqa: PLC0415

    if x is None:
        return None
    dim = dims.get(name)
    if dim is None or isinstance(placement, Replicate):
        return Replicate()
    along = x.tensor_meta.shape[dim]
    return Shard(dim) if along > 1 and along == q.tensor_meta.shape[placement.dim] else Replicate()
