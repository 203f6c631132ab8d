"""Calls of the Triton backend's host code that launch one kernel, for tensors on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fastattn.ops.attention import library
from fastattn.ops.attention.biases import as_bias
from fastattn.ops.attention.masks import as_mask
from fastattn.ops.attention.problem import Problem, resolve
from fastattn.ops.attention.triton import tuning
from fastattn.ops.attention.triton.tuning import Config
from fastattn.testing.cases import Sizes, options_of

Call = Callable[[], tuple[Tensor, ...]]
_GRADIENTS: Final = {
    name: library.WANTED[Problem._fields.index(name)] for name in ("bias", "relative", "sinks")
}
# Which gradients launch the kernel; `dkdv` and `dq` come together.
_WANTED: Final = {"dkdv": library.WANTED_QKV, "dq": library.WANTED_QKV, **_GRADIENTS}


class Case(NamedTuple):
    """What one row of the tuning table is for.

    Attributes:
        kernel: one of `tuning.KERNELS`.
        dim: head dim of q, k and v.
        dtype: of q, k and v.
        causal: with a causal mask, or with none.
        rich: with what takes more registers: dropout, a bias, a softcap, a dense mask.
    """

    kernel: str
    dim: int
    dtype: torch.dtype
    causal: bool
    rich: bool

    def __str__(self) -> str:
        words = [self.kernel, str(self.dtype).removeprefix("torch."), f"head dim {self.dim}"]
        words += ["causal"] * self.causal + ["rich"] * self.rich
        return " ".join(words)

    @property
    def variants(self) -> list[tuple[str, ...]]:
        """Lists of features, keys of `fastattn.testing.FEATURES`, that make it this case."""
        rich: tuple[tuple[str, ...], ...] = ((),)
        if self.rich:
            rich = (("alibi",), ("dense-mask-2d",), ("dropout",), ("bias-11QK",))
        own = {"bias": ("bias-1HQK",), "relative": ("alibi",)}.get(self.kernel, ())
        causal = ("causal",) * self.causal
        return [tuple(dict.fromkeys((*names, *own, *causal))) for names in rich]

    def call(self, sizes: Sizes, device: torch.device, features: Sequence[str]) -> Call:
        """A call that launches the kernel on tensors of `sizes`, whose head dims are the case's."""
        sizes = sizes._replace(dim=self.dim, v_dim=self.dim)
        return call(self.kernel, sizes, self.dtype, options_of(features, sizes, device=device), device)


def features_as_words(features: Sequence[str]) -> str:
    """`features` for people to read."""
    return " and ".join(features) or "no mask"


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Launch `kernel` with `config`, whatever the table says."""
    before = tuning.forced.get(kernel)
    tuning.forced[kernel] = config
    try:
        yield
    finally:
        del tuning.forced[kernel]
        if before is not None:
            tuning.forced[kernel] = before


def call(
    kernel: str, sizes: Sizes, dtype: torch.dtype, options: Mapping[str, Any], device: torch.device
) -> Call:
    """A call of the host code that launches `kernel`.

    Args:
        kernel: one of `tuning.KERNELS`.
        sizes: of q, k and v.
        dtype: of q, k and v.
        options: arguments of `attention`: mask, bias, softcap, sinks, dropout, seed, q_start, k_start.
        device: where the tensors are to be. Where it is no GPU, what forward would have saved for backward is
            uninitialised: launches are to compile only.

    Returns:
        What the host code returns: out and lse, or gradients.
    """
    from fastattn.ops.attention import triton  # noqa: PLC0415 - imports triton

    draw = torch.Generator(device).manual_seed(1)
    shapes = (
        (sizes.batch, sizes.heads, sizes.q_length, sizes.dim),
        (sizes.batch, sizes.kv_heads, sizes.k_length, sizes.dim),
        (sizes.batch, sizes.kv_heads, sizes.k_length, sizes.v_dim),
    )
    q, k, v = (torch.randn(shape, generator=draw, device=device).to(dtype) for shape in shapes)
    problem = _problem(q, k, options)
    if kernel == "forward":
        return lambda: triton.forward(q, k, v, *problem)
    if kernel == "decode":
        return lambda: triton.decode(q, k, v, None, None, None, *problem)
    if device.type == "cpu":
        out = library.new_heads_last(q, sizes.batch, sizes.heads, sizes.q_length, sizes.v_dim)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    else:
        out, lse = triton.forward(q, k, v, *problem)
    dout = torch.randn(out.shape, generator=draw, device=device).to(dtype)
    wanted = _WANTED[kernel]
    if options.get("sinks") is not None:
        wanted |= _GRADIENTS["sinks"]
    return lambda: triton.backward(dout, None, q, k, v, out, lse, *problem, wanted)


def _problem(q: Tensor, k: Tensor, options: Mapping[str, Any]) -> Problem:
    given = {
        "mask": None,
        "bias": None,
        "sinks": None,
        "seed": None,
        "q_start": None,
        "k_start": None,
        **options,
    }
    seed = given["seed"]
    if seed is not None and not isinstance(seed, Tensor):
        seed = torch.tensor([seed], dtype=torch.int64, device=q.device)
    return resolve(
        q,
        k,
        as_mask(given["mask"]),
        as_bias(given["bias"]),
        given["sinks"],
        seed,
        given["q_start"],
        given["k_start"],
        given.get("scale") or 1.0 / math.sqrt(q.shape[3]),
        given.get("softcap") or 0.0,
        given.get("dropout") or 0.0,
    )
