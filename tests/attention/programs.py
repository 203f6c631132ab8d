"""What each program of a Triton kernel reads and writes, address by address, in the interpreter.

There programs run one after another: that one writes or reads what is another's shows in no result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from torch import Tensor


@dataclass
class Program:
    """Addresses of the elements that one program loaded and stored."""

    loads: list[np.ndarray] = field(default_factory=list)
    stores: list[np.ndarray] = field(default_factory=list)


@dataclass
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: its name.
        tensors: those among its arguments.
        by_descriptor: whether some of them come as descriptors of the tensor memory accelerator.
        programs: in the order in which they ran.
    """

    kernel: str
    tensors: list[Tensor]
    by_descriptor: bool
    programs: list[Program] = field(default_factory=list)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Every launch inside, as it is interpreted."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    call, set_program = interpreter.GridExecutor.__call__, builder.set_grid_idx
    load, store = builder.create_masked_load, builder.create_masked_store
    launches: list[Launch] = []

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = list(_arguments((*args, *kwargs.values())))
        described = [x.base for x in given if hasattr(x, "block_shape")]
        tensors = [x for x in given if isinstance(x, Tensor)] + described
        launches.append(Launch(self.fn.__name__, tensors, by_descriptor=len(described) > 0))
        return call(self, *args, **kwargs)

    def next_program(self: Any, *index: int) -> None:
        launches[-1].programs.append(Program())
        set_program(self, *index)

    def recording_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        launches[-1].programs[-1].loads.append(_addresses(pointers, mask))
        return load(self, pointers, mask, *rest, **options)

    def recording_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        launches[-1].programs[-1].stores.append(_addresses(pointers, mask))
        return store(self, pointers, value, mask, *rest, **options)

    def atomic(*args: Any) -> None:
        raise AssertionError("expected no atomic operation: their order differs from run to run")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        patch.setattr(builder, "set_grid_idx", next_program)
        patch.setattr(builder, "create_masked_load", recording_load)
        patch.setattr(builder, "create_masked_store", recording_store)
        patch.setattr(builder, "create_atomic_rmw", atomic)
        patch.setattr(builder, "create_atomic_cas", atomic)
        yield launches


def check(launch: Launch) -> None:
    """Raise AssertionError unless the launch's programs could run in any order, or at once.

    Every address is that of an element of a tensor given to the kernel, none is stored to twice, and no
    program loads what another stores.
    """
    name = launch.kernel
    known = np.unique(np.concatenate([_elements(x) for x in launch.tensors]))
    stores = [_joined(program.stores) for program in launch.programs]
    everything = _joined(stores)
    assert np.isin(everything, known).all(), f"{name}: stores outside of its tensors"
    distinct, counts = np.unique(everything, return_counts=True)
    assert (counts == 1).all(), f"{name}: {(counts > 1).sum()} addresses are stored to more than once"
    for number, (program, own) in enumerate(zip(launch.programs, stores, strict=True)):
        loads = np.unique(_joined(program.loads))
        assert np.isin(loads, known).all(), f"{name}: program {number} loads outside of its tensors"
        of_others = np.setdiff1d(distinct, own)
        assert not np.isin(loads, of_others).any(), f"{name}: program {number} loads what another stores"


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _addresses(pointers: Any, mask: Any) -> np.ndarray:
    return np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)].astype(np.int64).ravel()


def _elements(x: Tensor) -> np.ndarray:
    at = np.array(x.data_ptr(), dtype=np.int64)
    for size, step in zip(x.shape, x.stride(), strict=True):
        at = at[..., None] + np.arange(size) * step * x.element_size()
    return at.ravel()


def _arguments(args: Any) -> Iterator[Any]:
    """Those in named tuples too."""
    for x in args:
        if isinstance(x, tuple):
            yield from _arguments(x)
        else:
            yield x
