"""Every attention that can be had on the machine, as its users call it, and what each can't do."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.gpu_check.machine import version
from fastattn.gpu_check.report import Absent
from fastattn.ops.attention.biases import as_bias
from fastattn.ops.attention.masks import as_mask

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One problem, self-attention of `heads` heads.

    Attributes:
        kind: ``causal``, ``full``, ``dropout`` (causal), ``window`` (causal, of `window` keys), ``alibi``
            (causal) or ``documents`` (eight of one length, each causal).
        training: whether backward is timed as well.
    """

    kind: str
    batch: int
    heads: int
    length: int
    dim: int
    dtype: torch.dtype = torch.bfloat16
    training: bool = True
    window: int = 512
    dropout: float = 0.1
    count: int = 8

    @property
    def name(self) -> str:
        extra = {"window": f" {self.window}", "dropout": f" {self.dropout}", "documents": f" {self.count}"}
        return f"{self.kind}{extra.get(self.kind, '')}, D {self.dim}, L {self.length}"

    @property
    def pairs(self) -> float:
        """Of query and key that attend, in one head; half of all for causal, as papers count."""
        n, w = self.length, self.window
        if self.kind == "full":
            return n * n
        if self.kind == "window":
            return w * n - w * (w - 1) / 2
        if self.kind == "documents":
            return n * n / self.count / 2
        return n * n / 2

    def flops(self, passes: str) -> float:
        """Of the two matrix products forward and five backward."""
        return {"forward": 1, "backward": 2.5, "both": 3.5}[passes] * (
            4 * self.pairs * self.dim * self.heads * self.batch
        )


class Inputs:
    """A case's tensors on a device, and what the peers want beside them, made when first asked for.

    Args:
        case: which problem.
        device: where the tensors are.
        compiles: whether peers that are compiled really are; as on GPUs if not given.
    """

    def __init__(self, case: Case, device: torch.device, compiles: bool | None = None) -> None:
        self.case, self.device = case, device
        self.compiles = device.type != "cpu" if compiles is None else compiles
        g = torch.Generator(device).manual_seed(0)
        shape = (case.batch, case.length, case.heads, case.dim)
        # as a model's projections leave them
        self.q, self.k, self.v, self.dout = (
            torch.randn(shape, generator=g, device=device).to(case.dtype).transpose(1, 2) for _ in range(4)
        )
        self.leaves = [x.requires_grad_() for x in (self.q, self.k, self.v)]
        self.slopes = 2.0 ** (-8 / case.heads * torch.arange(1, case.heads + 1, device=device))
        self.bounds = torch.arange(case.count + 1, device=device, dtype=torch.int32) * (
            case.length // case.count
        )

    @property
    def options(self) -> dict[str, Any]:
        """Of `fastattn.attention`; without dropout."""
        case = self.case
        if case.kind == "full":
            return {}
        if case.kind == "window":
            return {"mask": fastattn.sliding_window(case.window - 1, 0)}
        if case.kind == "documents":
            return {"mask": fastattn.documents(self.bounds) & fastattn.causal()}
        if case.kind == "alibi":
            return {"mask": fastattn.causal(), "bias": fastattn.alibi(self.slopes)}
        return {"mask": fastattn.causal()}

    @cached_property
    def additive(self) -> Tensor:
        """The mask, and ALiBi's bias, as one tensor in the case's dtype, broadcastable to [B, H, L, L]."""
        length, options = self.case.length, self.options
        found = torch.zeros(1, 1, length, length, dtype=self.case.dtype, device=self.device)
        keep = as_mask(options.get("mask")).to_dense(
            batch=1, q_length=length, k_length=length, device=self.device
        )
        bias = as_bias(options.get("bias")).to_dense(q_length=length, k_length=length)
        if bias is not None:
            found = bias.to(self.case.dtype)
        return found if keep is None else found.masked_fill(~keep, float("-inf"))

    @cached_property
    def hidden(self) -> Tensor:
        """bool [L, L], True above the diagonal: what model code has in a buffer."""
        length = self.case.length
        return torch.ones(length, length, dtype=torch.bool, device=self.device).triu(1)


Make: TypeAlias = Callable[[Inputs, str], Attention]


def ours(inputs: Inputs, backend: str) -> Attention:
    options = inputs.options
    if inputs.case.kind == "dropout":
        options |= {"dropout": inputs.case.dropout, "seed": 7}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = fastattn.attention(q, k, v, backend=backend, **options)
        assert isinstance(found, Tensor)
        return found

    return attention


def sdpa(which: SDPBackend | None) -> Make:
    def make(inputs: Inputs, backend: str) -> Attention:
        case = inputs.case
        simple = case.kind in ("causal", "full", "dropout")
        options: dict[str, Any] = {"is_causal": case.kind != "full"} if simple else {}
        if case.kind == "dropout":
            options["dropout_p"] = case.dropout

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            mask = None if simple else inputs.additive
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)

        def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert which is not None
            with sdpa_kernel(which):
                return attention(q, k, v)

        return attention if which is None else forced

    return make


def naive(inputs: Inputs, backend: str) -> Attention:
    """The equation, as model code writes it."""
    case = inputs.case
    scale = case.dim**-0.5
    hidden = inputs.hidden if case.kind in ("causal", "dropout") else None
    added = None if hidden is not None or case.kind == "full" else inputs.additive

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * scale
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        elif added is not None:
            scores = scores + added
        probs = torch.softmax(scores, -1)
        return F.dropout(probs, case.dropout if case.kind == "dropout" else 0.0) @ v

    return attention


def naive_compiled(inputs: Inputs, backend: str) -> Attention:
    eager = naive(inputs, backend)
    return torch.compile(eager, dynamic=False) if inputs.compiles else eager


def flex(inputs: Inputs, backend: str) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: PLC0415

    case, slopes = inputs.case, inputs.slopes
    if case.kind == "dropout":
        raise Absent("FlexAttention has no dropout")
    size = case.length // case.count

    def keep(b: Any, h: Any, i: Any, j: Any) -> Any:
        if case.kind == "window":
            return (i >= j) & (i - j < case.window)
        if case.kind == "documents":
            return (i >= j) & (i // size == j // size)
        return i >= j

    def add(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score - slopes[h] * (i - j)

    on_cpu = inputs.device.type == "cpu"
    length = case.length
    mask = (
        None
        if case.kind == "full"
        else create_block_mask(keep, None, None, length, length, device=str(inputs.device))
    )
    function: Any = torch.compile(flex_attention, dynamic=False) if inputs.compiles else flex_attention
    change = add if case.kind == "alibi" else None
    if on_cpu:
        # it has a gradient only on GPUs
        return lambda q, k, v: function(q.detach(), k.detach(), v.detach(), score_mod=change, block_mask=mask)
    return lambda q, k, v: function(q, k, v, score_mod=change, block_mask=mask)


def heads_last(function: Callable[..., Any], **options: Any) -> Attention:
    """A function of [B, L, H, D]."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    return attention


def _packed(function: Callable[..., Any], inputs: Inputs, **options: Any) -> Attention:
    """A function of packed documents, [total, H, D]; those of the batch are one behind the other."""
    case = inputs.case
    size = case.length // case.count
    bounds = torch.arange(case.batch * case.count + 1, device=inputs.device, dtype=torch.int32) * size
    given = options | {
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "max_seqlen_q": size,
        "max_seqlen_k": size,
    }

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        found = function(*flat, **given)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        whole: Tensor = out.view(case.batch, case.length, *out.shape[1:])
        return whole.transpose(1, 2)

    return attention


def flash_attn(module: str, package: str, can: tuple[str, ...]) -> Make:
    """Tri Dao's, of one generation; `can` are the kinds it has."""

    def make(inputs: Inputs, backend: str) -> Attention:
        case = inputs.case
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise Absent(f"{package} is not installed ({error})") from error
        if case.kind not in can:
            raise Absent(f"{package} has no {case.kind}")
        options: dict[str, Any] = {"causal": case.kind != "full"}
        if case.kind == "documents":
            return _packed(found.flash_attn_varlen_func, inputs, **options)
        if case.kind == "window":
            options["window_size"] = (case.window - 1, 0)
        elif case.kind == "alibi":
            options["alibi_slopes"] = inputs.slopes
        elif case.kind == "dropout":
            options["dropout_p"] = case.dropout
        return heads_last(found.flash_attn_func, **options)

    return make


def xformers(inputs: Inputs, backend: str) -> Attention:
    case = inputs.case
    try:
        ops = importlib.import_module("xformers.ops")
        kinds = importlib.import_module("xformers.ops.fmha.attn_bias")
    except ImportError as error:
        raise Absent(f"xformers is not installed ({error})") from error
    options: dict[str, Any] = {}
    if case.kind in ("causal", "dropout"):
        options["attn_bias"] = kinds.LowerTriangularMask()
    elif case.kind == "window":
        options["attn_bias"] = kinds.LocalAttentionFromBottomRightMask(case.window - 1, 0)
    elif case.kind != "full":
        raise Absent(f"{case.kind}: not raced with xformers")
    if case.kind == "dropout":
        options["p"] = case.dropout
    return heads_last(ops.memory_efficient_attention, **options)


OURS: Final = "fastattn"
PEERS: Final[dict[str, Make]] = {
    OURS: ours,
    "sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa default": sdpa(None),
    "flex compiled": flex,
    "naive": naive,
    "naive compiled": naive_compiled,
    "flash-attn 2": flash_attn(
        "flash_attn", "flash-attn", ("causal", "full", "dropout", "window", "alibi", "documents")
    ),
    "flash-attn 3": flash_attn(
        "flash_attn_interface", "flash-attn-3", ("causal", "full", "window", "documents")
    ),
    "flash-attn 4": flash_attn("flash_attn.cute", "flash-attn-4", ("causal", "full", "window", "documents")),
    "xformers": xformers,
}
_PACKAGES: Final = {
    "flash-attn 2": ("flash-attn",),
    "flash-attn 3": ("flash-attn-3", "flash_attn_3"),
    "flash-attn 4": ("flash-attn-4", "flash_attn_4"),
    "xformers": ("xformers",),
    OURS: ("fastattn",),
}


def version_of(name: str) -> str:
    """The version of what a peer is part of."""
    found = next((v for package in _PACKAGES.get(name, ()) if (v := version(package))), None)
    if name == "sdpa cudnn":
        return f"cuDNN {torch.backends.cudnn.version() or 'none'}"
    if name == OURS:
        return fastattn.__version__
    return found or (f"torch {torch.__version__}" if name not in _PACKAGES else "")
