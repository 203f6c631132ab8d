"""How kernels are launched: device, block sizes, descriptors, and what is known when they are compiled."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastattn.ops.attention.triton import tuning
from fastattn.ops.attention.triton.arguments import Problem, Rows, Shape, rows
from fastattn.ops.gpu import power_of_two, precision

# Of an L2 cache whose size is not known: an H100's.
_CACHE: Final = 50 << 20


def width(dim: int) -> int:
    """`dim` padded to what tensor cores take."""
    return max(16, power_of_two(dim))


def config(kernel: str, q: Tensor, v: Tensor, problem: Problem, banded: bool) -> tuning.Config:
    """The tuned blocks of `kernel`."""
    arch = tuning.architecture(q.device)
    return tuning.config(kernel, arch, width(max(q.shape[3], v.shape[3])), q.dtype, banded, problem.rich)


def options(config: tuning.Config) -> dict[str, Any]:
    """What Triton compiles with, beside what the kernel is given."""
    return {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": True}


def by_tma(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator takes these ``[B, H, L, D]`` tensors with a unit last stride."""
    return _has_tma(tuning.architecture(tensors[0].device)) and all(
        x.data_ptr() % 16 == 0
        and x.numel() > 0
        and all(
            size == 1 or (step > 0 and step * x.element_size() % 16 == 0)
            for size, step in zip(x.shape[:3], x.stride()[:3], strict=True)
        )
        for x in tensors
    )


@cache
def _has_tma(arch: str) -> bool:
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) in (90, 100, 103)


def streamed(x: Tensor, block: int, tma: bool) -> Rows | TensorDescriptor:
    """``[B, H, L, D]`` for `fetch_rows` in tiles of `block` rows; a descriptor where `tma`."""
    if not tma:
        return rows(x)
    # A stride that is never stepped may be anything, but not for the accelerator.
    steps = [
        step if size > 1 else x.shape[3] * 16 // x.element_size()
        for size, step in zip(x.shape[:3], x.stride()[:3], strict=True)
    ]
    # Triton 3.6 launches no tuple that holds one.
    return TensorDescriptor(x, list(x.shape), [*steps, 1], [1, 1, block, width(x.shape[3])])


def together(x: Tensor, y: Tensor, heads: int) -> int:
    """How many heads to compute at a time, so that what they stream of x and y fits half the L2 cache.

    Args:
        x, y: ``[B, H_x, L, D]``.
        heads: of each batch that compute; each streams several of x's heads, or several of them the same.
    """
    of_batch = x.shape[1] * x.shape[2] * (x.shape[3] + y.shape[3]) * x.element_size()
    fitting = _cache_size(x.device) // 2 * heads // max(of_batch, 1)
    sharing = max(1, heads // x.shape[1])
    return min(max(1, fitting // sharing) * sharing, x.shape[0] * heads)


@cache
def _cache_size(device: torch.device) -> int:
    if device.type == "cpu":
        return _CACHE
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _CACHE


def shape(q: Tensor, v: Tensor, config: tuning.Config, problem: Problem, scale: float, tma: bool) -> Shape:
    """What a kernel in tiles of `config` is compiled for."""
    # Scores that are q kᵀ times a positive number are not multiplied before a row's largest is known.
    plain = problem.softcap is None and problem.bias is None and problem.relative is None and scale > 0
    plain = plain and float8(q) == "no"  # whose scale has factors that are not known here
    exact = q.dtype == torch.float32
    dims = (q.shape[3], v.shape[3], config.block_q, config.block_k)
    return _shape(*dims, tma, plain, exact, precision(q.dtype), float8(q))


@cache
def _shape(
    dim: int,
    v_dim: int,
    queries: int,
    keys: int,
    tma: bool,
    plain: bool,
    exact: bool,
    precision: str,
    float8: str,
) -> Shape:
    known = (dim, width(dim), v_dim, width(v_dim), queries, keys, tma, plain, exact, precision, float8)
    return Shape(*(tl.constexpr(x) for x in known))


def float8(x: Tensor) -> str:
    """How a kernel takes x where it is float8_e4m3fn, as `Shape` names it."""
    if x.dtype not in (torch.float8_e4m3fn, torch.uint8):
        return "no"
    return "bytes" if x.dtype == torch.uint8 else "native"


def multiplies_float8(device: torch.device, dim: int) -> bool:
    """Whether the device has products of float8_e4m3fn over `dim` elements."""
    arch = tuning.architecture(device)
    if dim <= 16:  # they are of 32
        return False
    return arch == "gfx950" or (arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 89)


def parts(device: torch.device, programs: int, most: int) -> int:
    """In how many parts, at most `most`, to split each of `programs` programs to keep the device busy."""
    return max(1, min(most, 2 * _processors(device) // max(programs, 1)))


@cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
