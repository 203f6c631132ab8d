"""What every operation does first: autocast's dtype, dropout's seed, the backend and why it is that one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fastattn import _backends

HALVES: Final = (torch.bfloat16, torch.float16)


class Explanation(NamedTuple):
    """What `fastattn.explain` found out.

    Attributes:
        backend: the backend that would run, or None where none can.
        reasons: for every backend that would not run, why; a backend that could run but is not the best
            says which one is taken before it.
        isa: what the kernels that would run are compiled for: of the `cpu` backend the instruction set, of
            `triton` the GPU's architecture (``"sm_90"``, ``"gfx942"``), or ``"interpreter"``.
        notes: what else is known of how it would run.
    """

    backend: str | None
    reasons: dict[str, list[str]]
    isa: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = "none can run this" if self.backend is None else self.backend
        lines = [f"backend: {head}" + (f" ({self.isa})" if self.isa else "")]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  not {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        return "\n".join(lines)


class _Question(NamedTuple):
    """Given as `backend`: which one would it be, were it given `asked`?"""

    asked: str | None


class _Answer(Exception):
    def __init__(self, found: Explanation) -> None:
        self.found = found


def explain(
    operation: Callable[..., Any], *args: Any, backend: str | None = None, **options: Any
) -> Explanation:
    """Which backend an operation would run with these arguments, and why the others would not.

    Args:
        operation: a function of this package that takes `backend`.
        args, backend, options: its arguments. Nothing is computed.

    Returns:
        An `Explanation`; printing it gives a line for each backend.

    Raises:
        ValueError, TypeError: for arguments no backend takes, as the operation does.
    """
    if not getattr(operation, "__module__", "").startswith("fastattn.ops."):
        raise TypeError(f"operation: expected a function of fastattn that takes backend=, got {operation!r}")
    try:
        operation(*args, backend=_Question(backend), **options)
    except _Answer as answer:
        return answer.found
    raise TypeError(f"operation: expected one that chooses a backend, got {operation!r}")


class Against(NamedTuple):
    """What only the operation knows to say against a backend.

    Attributes:
        backend: its name.
        reason: what it would need, or why another is better.
        for_all: it can't run this; else it does not where it is not asked for by name.
    """

    backend: str
    reason: str
    for_all: bool = True


def choose(
    x: Tensor,
    backend: str | _Question | None,
    against: Sequence[Against] = (),
    notes: Callable[[], tuple[str, ...]] = tuple,
) -> str:
    """The backend to run on: the first that can, or the one asked for.

    Args:
        x: any of the operation's tensors: they agree in device and dtype.
        backend: the one asked for, or None.
        against: what the operation has to say against backends.
        notes: for `explain`: what else is to be said where the `cpu` or `triton` backend runs.

    Raises:
        ValueError: there is no such backend.
        NotImplementedError: the one asked for can't run this; with every reason.
    """
    if isinstance(backend, _Question):  # `explain` asks
        found = explanation(x, backend.asked, against)
        raise _Answer(found if found.backend in (None, "reference") else found._replace(notes=notes()))
    if backend is not None:
        _check_name(backend)
        reasons = _unsupported(backend, x, against, asked=True)
        if reasons:
            raise NotImplementedError(f"backend={backend!r} can't run this: {'; '.join(reasons)}")
        return backend
    return next(name for name in _backends.NAMES if not _unsupported(name, x, against, asked=False))


def explanation(x: Tensor, backend: str | None, against: Sequence[Against] = ()) -> Explanation:
    """What `choose` would return, and why not the others."""
    if backend is not None:
        _check_name(backend)
    reasons = {name: _unsupported(name, x, against, asked=name == backend) for name in _backends.NAMES}
    if backend is not None:
        chosen = None if reasons[backend] else backend
        taken = f"backend={backend!r} was asked for"
    else:
        chosen = next((name for name in _backends.NAMES if not reasons[name]), None)
        taken = f"{chosen} comes first"
    why = {name: found or [taken] for name, found in reasons.items() if name != chosen}
    isa = None
    if chosen == "cpu":
        isa = _backends.cpu_isa()
    elif chosen == "triton":
        isa = _backends.gpu_architecture(x.device)
    return Explanation(chosen, why, isa)


def _check_name(backend: str) -> None:
    if backend not in _backends.NAMES:
        raise ValueError(f"backend: expected one of {list(_backends.NAMES)}, got {backend!r}")


def _unsupported(backend: str, x: Tensor, against: Sequence[Against], *, asked: bool) -> list[str]:
    """Every reason why `backend` can't do this, or does not where it was not `asked` for by name."""
    reasons = [one.reason for one in against if one.backend == backend and (one.for_all or not asked)]
    if backend == "reference":
        return reasons
    device = x.device.type
    if backend == "cpu" and device != "cpu":
        reasons.append(f"expected tensors on cpu, got {x.device}")
    if backend == "triton" and device not in (("cuda", "cpu") if asked else ("cuda",)):
        hint = "" if asked or device != "cpu" else ", where its interpreter runs if asked for"
        reasons.append(f"expected tensors on a GPU (cuda), got {x.device}{hint}")
    if x.dtype == torch.float64:
        reasons.append("expected float32, bfloat16 or float16, got torch.float64")
    if not reasons:
        reasons += _backends.unavailable(backend) if backend == "cpu" else _backends.unavailable_on(x.device)
    return reasons


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors, under autocast in its dtype: floating ones of the first's device, but for float64."""
    device = next(x for x in tensors if x is not None).device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(
            x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)
            for x in tensors
        )
    return tensors


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, matrix products of float32 are float32's: autocast would round what is between them."""
    enabled = device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


def require_tensors(**tensors: object) -> None:
    """Raise TypeError naming the first that is no tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def check_tensors(**tensors: object) -> None:
    """Raise TypeError naming the first that is neither a tensor nor None."""
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def check_dropout(dropout: float) -> None:
    """Raise ValueError unless 0 <= dropout < 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")


def check_seed(seed: object, device: torch.device) -> None:
    """Raise unless it is an int in [0, 2^63), an int64 tensor [1] or None."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            raise ValueError(
                f"seed: expected an int64 tensor [1] on {device}, "
                f"got {seed.dtype} {list(seed.shape)} on {seed.device}"
            )
    elif seed is not None:
        if not isinstance(seed, (int, torch.SymInt)):
            got = seed if isinstance(seed, float) else type(seed).__name__
            raise TypeError(f"seed: expected an int or an int64 tensor, got {got}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed: expected an int in [0, 2^63), got {seed}")


def as_seed(seed: int | Tensor | None, dropout: float, device: torch.device) -> Tensor | None:
    """int64 ``[1]``, drawn from torch's generator where none is given; None without dropout."""
    check_seed(seed, device)
    if dropout == 0:
        return None
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)
