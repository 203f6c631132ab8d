"""`torch.nn.functional.scaled_dot_product_attention` on fastattn's kernels, the code that calls it as it is.

>>> from fastattn.integrations import torch_override
>>> with torch_override.override():  # doctest: +SKIP
...     model(inputs)  # every call of it on CPU tensors, in Python and in C++, compiled and not
>>> torch_override.enable()  # doctest: +SKIP
>>> torch_override.disable()  # doctest: +SKIP

While it is on, kernels of ours stand in torch's dispatcher in place of its own; off, torch's are there again,
bit for bit. What still runs on torch's own path, as if this were off (`explain` tells which, and why):
tensors that are not on CPU; float64; nested tensors and tensor subclasses; forward-mode derivatives; a
dropout of 1; a head_dim over 512; calls under ``sdpa_kernel`` without FLASH_ATTENTION; what `torch.func.vmap`
and DTensor make of other calls than of torch's flash kernel; and arguments `fastattn.attention` refuses, of
which torch says itself what is wrong.

Two things differ from torch. Dropout drops other elements, of the same seed and distribution. There is no
second derivative, which torch has where it does without its flash kernel; taking one raises.

A function that was compiled while this was off calls our kernel from when it is on, wherever torch had chosen
its flash kernel; its other calls keep torch's path until it is compiled anew (`torch.compiler.reset`). Where
a function is compiled while this is on, and has such other calls, turning it off resets the compiler.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.autograd import forward_ad

from fastattn.integrations.torch_sdpa import arguments
from fastattn.ops.attention import attention, attention_backward, causal
from fastattn.ops.attention import explain as explain_attention
from fastattn.ops.choice import Explanation

_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 512
# What the compiler traces with, in place of plain tensors.
_TRACED = ("FakeTensor", "FunctionalTensor")

_lock = threading.Lock()
# Who wants it on, and with which backend: the last one's is taken.
_holders: list[tuple[object, str]] = []
_switch = object()
_installed: _Installed | None = None


def enable(backend: str = "cpu") -> None:
    """Run every call of `torch.nn.functional.scaled_dot_product_attention` on CPU tensors on our kernels.

    Holds for all threads, until `disable`. Enabling twice is the same as once.

    Args:
        backend: as in `fastattn.attention`.

    Raises:
        NotImplementedError: the backend is not here, with the reasons.
        RuntimeError: this torch does not have what it takes.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> query = torch.randn(1, 2, 5, 8)
        >>> plain = F.scaled_dot_product_attention(query, query, query)
        >>> enable(backend="reference")
        >>> torch.allclose(F.scaled_dot_product_attention(query, query, query), plain, atol=1e-6)
        True
        >>> disable()
        >>> torch.equal(F.scaled_dot_product_attention(query, query, query), plain)
        True
    """
    _check(backend)
    _take(_switch, backend)


def disable() -> None:
    """Give `torch.nn.functional.scaled_dot_product_attention` back its own kernels.

    What `override` contexts and torch's `activate_flash_attention_impl` have turned on stays on for them.
    """
    _release(_switch)


@contextmanager
def override(backend: str = "cpu") -> Iterator[None]:
    """`enable` for the extent of a ``with`` block, in all threads.

    Args:
        backend: as in `fastattn.attention`.

    Raises: as `enable` does.

    Example:
        >>> import torch, torch.nn.functional as F
        >>> query = torch.randn(1, 2, 5, 8)
        >>> with override(backend="reference"):
        ...     out = F.scaled_dot_product_attention(query, query, query, is_causal=True)
    """
    handle = _hold(backend)
    try:
        yield
    finally:
        handle.remove()


def register(name: str = "FASTATTN", backend: str = "cpu") -> None:
    """Make fastattn one of the implementations of torch's own registry.

    `torch.nn.attention.activate_flash_attention_impl(name)` then does what `enable` does, and
    `torch.nn.attention.restore_flash_attention_impl()` undoes it.

    Args:
        name: what to pass to `activate_flash_attention_impl`.
        backend: as in `fastattn.attention`.

    Raises:
        RuntimeError: this torch has no such registry.

    Example:
        >>> import torch.nn.attention
        >>> register()
        >>> "FASTATTN" in torch.nn.attention.list_flash_attention_impls()
        True
    """
    import torch.nn.attention as registry  # noqa: PLC0415

    if not hasattr(registry, "register_flash_attention_impl"):
        raise RuntimeError(
            "torch.nn.attention.register_flash_attention_impl: expected a torch that has it (2.11 or later), "
            f"got {torch.__version__}; use fastattn.integrations.torch_override.enable()"
        )
    registry.register_flash_attention_impl(name, register_fn=lambda: _hold(backend))


def is_enabled() -> bool:
    """Whether calls of `torch.nn.functional.scaled_dot_product_attention` come to our kernels now."""
    return bool(_holders)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Explanation:
    """What runs a call of `torch.nn.functional.scaled_dot_product_attention` with these arguments now.

    Args: those of `torch.nn.functional.scaled_dot_product_attention`. Nothing is computed.

    Returns:
        An `Explanation` whose backend is one of fastattn's, or ``"torch"`` where torch's own path runs, with
        the reason under fastattn's.

    Example:
        >>> import torch
        >>> query = torch.randn(1, 2, 5, 8, dtype=torch.float64)
        >>> print(explain(query, query, query))
        backend: torch
          not cpu: the override is off: call fastattn.integrations.torch_override.enable()
        >>> with override(backend="reference"):
        ...     print(explain(query, query, query))
        backend: torch
          not reference: expected float32, bfloat16 or float16, got torch.float64
    """
    if not _holders:
        why = "the override is off: call fastattn.integrations.torch_override.enable()"
        return Explanation("torch", {"cpu": [why]})
    backend = _holders[-1][1]
    why_not = _torchs(query, key, value, attn_mask, dropout_p)
    if why_not is None:
        try:
            _, tensors, options = arguments(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
            return explain_attention(*tensors, **options, backend=backend)
        except (NotImplementedError, TypeError, ValueError) as error:
            why_not = str(error)
    return Explanation("torch", {backend: [why_not]})


class _Handle:
    """Holds the override on until it is removed; what torch's registry expects of an implementation."""

    def remove(self) -> None:
        _release(self)


def _hold(backend: str) -> _Handle:
    _check(backend)
    handle = _Handle()
    _take(handle, backend)
    return handle


def _take(holder: object, backend: str) -> None:
    """Make it the last holder, or leave all as it was where that fails."""
    with _lock:
        before = list(_holders)
        _holders[:] = [one for one in before if one[0] is not holder]
        _holders.append((holder, backend))
        try:
            _settle()
        except BaseException:
            _holders[:] = before
            _settle()
            raise


def _release(holder: object) -> None:
    with _lock:
        _holders[:] = [one for one in _holders if one[0] is not holder]
        _settle()


def _check(backend: str) -> None:
    probe = torch.zeros(1, 1, 1, 1)
    found = explain_attention(probe, probe, probe, backend=backend)
    if found.backend is None:
        raise NotImplementedError(
            f"backend={backend!r} can't run here: {'; '.join(found.reasons[backend])}; torch keeps its own"
        )
    if not hasattr(torch.library, "get_kernel"):
        raise RuntimeError(f"torch.library.get_kernel: expected a torch that has it, got {torch.__version__}")


def _settle() -> None:
    """Put the dispatcher in the state that the holders want. The lock is held."""
    global _installed  # noqa: PLW0603
    wanted = _holders[-1][1] if _holders else None
    if _installed is not None and _installed.backend != wanted:
        _installed.remove()
        _installed = None
    if wanted is not None and _installed is None:
        _installed = _Installed(wanted)


class _Installed:
    """Our kernels in torch's dispatcher."""

    def __init__(self, backend: str) -> None:
        import torch.compiler.config as compiler  # noqa: PLC0415

        self.backend = backend
        self.traced = False  # whether calls of ours went into compiled functions, which outlive the override
        self.forward_kernel = torch.library.get_kernel(f"aten::{_FORWARD}", "CPU")
        self.backward_kernel = torch.library.get_kernel(f"aten::{_BACKWARD}", "CPU")
        self.library = torch.library.Library("aten", "IMPL")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Warning only once for all operators")
                for key in ("AutogradCPU", "CPU"):
                    self.library.impl("scaled_dot_product_attention", self.attention, key)
                self.library.impl(_FORWARD, self.flash_forward, "CPU", with_keyset=True)
                self.library.impl(_BACKWARD, self.flash_backward, "CPU", with_keyset=True)
        except BaseException:
            self.library._destroy()
            raise
        finally:
            _forget_dispatch()
        # Compiled code is kept on disk under a key that this is a part of.
        self.tag = f";fastattn-{backend}"
        compiler.cache_key_tag += self.tag

    def remove(self) -> None:
        import torch.compiler.config as compiler  # noqa: PLC0415

        self.library._destroy()
        _forget_dispatch()
        compiler.cache_key_tag = compiler.cache_key_tag.replace(self.tag, "")
        if self.traced:
            torch.compiler.reset()

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        """``aten::scaled_dot_product_attention``."""
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        if _torchs(query, key, value, attn_mask, dropout_p) is None:
            traced = type(query).__name__ in _TRACED
            # Torch makes a call of its flash kernel of these, which is ours for as long as this is on.
            if not (traced and _is_flash(query, key, value, attn_mask, dropout_p)):
                try:
                    lead, tensors, ours = arguments(
                        query, key, value, attn_mask, dropout_p, is_causal, **options
                    )
                    out = attention(*tensors, **ours, backend=self.backend)
                except (NotImplementedError, TypeError, ValueError):
                    pass  # torch says what is wrong with it, or computes it
                else:
                    assert isinstance(out, Tensor)
                    self.traced = self.traced or traced
                    return out if len(lead) == 2 else out.reshape(*lead, *out.shape[2:])
        return _SDPA.decompose(query, key, value, attn_mask, dropout_p, is_causal, **options)

    def flash_forward(
        self,
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        """``aten::_scaled_dot_product_flash_attention_for_cpu``."""
        if query.dtype in _DTYPES and dropout_p == 0 and query.shape[-1] == value.shape[-1] <= _MAX_HEAD_DIM:
            options = _flash_options(query, is_causal, attn_mask, scale, self.backend)
            with torch.no_grad():  # its derivative is the op below
                found = attention(query, key, value, **options, return_lse=True)
            assert isinstance(found, tuple)
            # Torch has 0 for a row without keys.
            lse = found[1].masked_fill(found[1] == float("-inf"), 0.0)
            return _laid_out_as(query, found[0]), lse.transpose(1, 2).contiguous().transpose(1, 2)
        options = {"attn_mask": attn_mask, "scale": scale}
        return self.forward_kernel.call_boxed(keys, query, key, value, dropout_p, is_causal, **options)

    def flash_backward(
        self,
        keys: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        """``aten::_scaled_dot_product_flash_attention_for_cpu_backward``."""
        if query.dtype in _DTYPES and dropout_p == 0 and query.shape[-1] <= _MAX_HEAD_DIM:
            options = _flash_options(query, is_causal, attn_mask, scale, self.backend)
            lse = logsumexp.contiguous()
            with torch.no_grad(), _above_autograd():
                grads = attention_backward(grad_out, query, key, value, out, lse, **options)
            # Torch takes them to lie in memory as [B, L, H, D].
            return tuple(grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in grads)
        given = (grad_out, query, key, value, out, logsumexp, dropout_p, is_causal)
        return self.backward_kernel.call_boxed(keys, *given, attn_mask=attn_mask, scale=scale)


def _forget_dispatch() -> None:
    """Tracing remembers which kernel an op has: a stale one would have no gradient."""
    for op in (_SDPA, getattr(torch.ops.aten, _FORWARD).default, getattr(torch.ops.aten, _BACKWARD).default):
        op._dispatch_cache.clear()


def _torchs(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float
) -> str | None:
    """Why torch's own path runs this; None where ours does."""
    for x in (query, key, value, attn_mask):
        if x is None:
            continue
        if x.is_nested:
            return "expected dense tensors, got a nested one"
        if type(x) not in (Tensor, torch.nn.Parameter) and type(x).__name__ not in _TRACED:
            return f"expected plain tensors, got {type(x).__name__}"
        if x.device.type != "cpu":
            return f"expected tensors on cpu, got {x.device}"
    if query.dtype not in _DTYPES:
        return f"expected float32, bfloat16 or float16, got {query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > _MAX_HEAD_DIM:
        return f"expected a head_dim of at most {_MAX_HEAD_DIM}, got {query.shape[-1]} and {value.shape[-1]}"
    if dropout_p >= 1:
        return f"expected a dropout below 1, got {dropout_p}"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "expected FLASH_ATTENTION among the backends of sdpa_kernel, got none"
    if forward_ad._current_level >= 0:
        return "expected no forward-mode derivatives, got dual_level()"
    return None


def _is_flash(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float) -> bool:
    """Whether torch chooses its flash kernel on CPU; to be wrong here costs speed, or a compilation."""
    shapes = [x.shape for x in (query, key, value)]
    if (
        dropout_p > 0
        or any(len(shape) != 4 for shape in shapes)
        or (attn_mask is not None and attn_mask.requires_grad)
    ):
        return False
    alike = all(shape[:2] == shapes[0][:2] and shape[3] == shapes[0][3] for shape in shapes)
    return bool(alike and all(x.stride(-1) == 1 and x.shape[2] > 0 for x in (query, key, value)))


def _flash_options(
    query: Tensor, is_causal: bool, attn_mask: Tensor | None, scale: float | None, backend: str
) -> dict[str, Any]:
    """The arguments of `fastattn.attention`; torch has made its mask a floating one before."""
    bias = attn_mask if attn_mask is None else attn_mask[(None,) * (4 - attn_mask.dim())]
    mask = causal("top_left") if is_causal else None
    return {"mask": mask, "bias": bias, "scale": scale, "backend": backend}


def _above_autograd() -> Any:
    """Torch calls its kernels where autograd is out of the way; the reference's backward is made of it."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (DispatchKey.AutogradFunctionality, DispatchKey.AutogradOther, DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)


def _laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """`x` with the strides torch takes the output to have."""
    wanted = torch.empty_like(like)
    return x if x.stride() == wanted.stride() else wanted.copy_(x)
