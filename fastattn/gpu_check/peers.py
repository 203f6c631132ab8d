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
from fastattn.gpu_check.report import Absent
from fastattn.machine import version
from fastattn.ops.attention.biases import as_bias
from fastattn.ops.attention.masks import as_mask

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


# Attention under a mask by rule, with dropout or ALiBi, and under a bool tensor.
KINDS: Final = ("causal", "full", "dropout", "window", "alibi", "documents", "tril", "bool")
_SIMPLE: Final = ("causal", "full", "dropout")
_TENSORS: Final = ("tril", "bool")


@dataclass(frozen=True)
class Case:
    """One problem, self-attention of `heads` heads.

    Attributes:
        kind: ``causal``, ``full``, ``dropout`` (causal), ``window`` (causal, of `window` keys), ``alibi``
            (causal), ``documents`` (eight of one length, each causal), or a bool tensor [1, 1, L, L]:
            ``tril`` (causal) or ``bool`` (random, three in four kept).
        training: whether backward is timed as well.
        kv_heads: of keys and values; as `heads` if not given.
        v_dim: the size of a head of v and out; as `dim` if not given.
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
    kv_heads: int = 0
    v_dim: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        object.__setattr__(self, "v_dim", self.v_dim or self.dim)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """How many heads there are, and their size, of q, k, v and out."""
        kv = ((self.kv_heads, self.dim), (self.kv_heads, self.v_dim))
        return ((self.heads, self.dim), *kv, (self.heads, self.v_dim))

    @property
    def name(self) -> str:
        extra = {"window": f" {self.window}", "dropout": f" {self.dropout}", "documents": f" {self.count}"}
        heads = f", H {self.heads}:{self.kv_heads}" if self.kv_heads != self.heads else ""
        dim = f"{self.dim}x{self.v_dim}" if self.v_dim != self.dim else f"{self.dim}"
        return f"{self.kind}{extra.get(self.kind, '')}{heads}, D {dim}, L {self.length}"

    @property
    def columns(self) -> dict[str, Any]:
        """Those of a row that say what the problem is."""
        return {
            "case": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "length": self.length,
            "head_dim": self.dim,
        }

    @property
    def pairs(self) -> float:
        """Of query and key that attend, in one head; half of all for causal, as papers count."""
        n, w = self.length, min(self.window, self.length)
        if self.kind == "full":
            return n * n
        if self.kind == "bool":
            return 0.75 * n * n
        if self.kind == "window":
            return w * n - w * (w - 1) / 2
        if self.kind == "documents":
            return n * n / self.count / 2
        return n * n / 2

    def flops(self, passes: str) -> float:
        """Of the two matrix products forward and five backward."""
        forward, backward = 2 * (self.dim + self.v_dim), 2 * (3 * self.dim + 2 * self.v_dim)
        of_pair = {"forward": forward, "backward": backward, "both": forward + backward}[passes]
        return of_pair * self.pairs * self.heads * self.batch


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
        # as a model's projections leave them
        self.q, self.k, self.v, self.dout = (
            torch.randn(case.batch, case.length, *shape, generator=g, device=device)
            .to(case.dtype)
            .transpose(1, 2)
            for shape in case.shapes
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
        if case.kind in _TENSORS:
            return {"mask": self.keep}
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
    def keep(self) -> Tensor:
        """The mask that is a bool tensor, [1, 1, L, L]."""
        shape = (1, 1, self.case.length, self.case.length)
        if self.case.kind == "tril":
            return torch.ones(shape, dtype=torch.bool, device=self.device).tril()
        g = torch.Generator(self.device).manual_seed(1)
        return torch.rand(shape, generator=g, device=self.device) < 0.75

    @cached_property
    def hidden(self) -> Tensor:
        """bool, True where nothing attends: what model code has in a buffer."""
        if self.case.kind in _TENSORS:
            return ~self.keep
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
        options: dict[str, Any] = {"enable_gqa": True} if case.kv_heads != case.heads else {}
        if case.kind in _SIMPLE:
            options["is_causal"] = case.kind != "full"
        else:
            options["attn_mask"] = inputs.keep if case.kind in _TENSORS else inputs.additive
        if case.kind == "dropout":
            options["dropout_p"] = case.dropout

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, **options)

        def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert which is not None
            with sdpa_kernel(which):
                return attention(q, k, v)

        return attention if which is None else forced

    return make


def naive(inputs: Inputs, backend: str) -> Attention:
    """The equation, as model code writes it."""
    case = inputs.case
    scale, group = case.dim**-0.5, case.heads // case.kv_heads
    hidden = inputs.hidden if case.kind in ("causal", "dropout", *_TENSORS) else None
    added = None if hidden is not None or case.kind == "full" else inputs.additive

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
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
    kept = inputs.keep[0, 0] if case.kind in _TENSORS else None
    size = case.length // case.count

    def keep(b: Any, h: Any, i: Any, j: Any) -> Any:
        if kept is not None:
            return kept[i, j]
        if case.kind == "window":
            return (i >= j) & (i - j < case.window)
        if case.kind == "documents":
            return (i >= j) & (i // size == j // size)
        return i >= j

    def add(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return score - slopes[h] * (i - j)

    length = case.length
    mask = (
        None
        if case.kind == "full"
        else create_block_mask(keep, None, None, length, length, device=str(inputs.device))
    )
    function: Any = torch.compile(flex_attention, dynamic=False) if inputs.compiles else flex_attention
    options: dict[str, Any] = {"score_mod": add if case.kind == "alibi" else None, "block_mask": mask}
    if case.kv_heads != case.heads:
        options["enable_gqa"] = True
    if inputs.device.type == "cpu":
        # it has a gradient only on GPUs
        return lambda q, k, v: function(q.detach(), k.detach(), v.detach(), **options)
    return lambda q, k, v: function(q, k, v, **options)


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


def flash_attn(module: str, package: str) -> Make:
    """Tri Dao's, of one generation."""

    def make(inputs: Inputs, backend: str) -> Attention:
        case = inputs.case
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise Absent(f"{package} is not installed ({error})") from error
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
    if case.kind == "dropout":
        options["p"] = case.dropout
    return heads_last(ops.memory_efficient_attention, **options)


@dataclass(frozen=True)
class Peer:
    """One implementation of attention, and what it is raced in.

    Attributes:
        make: of a problem's inputs and our backend, the call; raises `Absent` where it is not installed.
        how: what its users write.
        can: the kinds of problems.
        grouped: whether keys may have fewer heads.
        wide: whether v may have heads of another size.
        forward, backward: the devices on which it has them.
    """

    make: Make
    how: str
    can: tuple[str, ...] = KINDS
    grouped: bool = True
    wide: bool = True
    forward: tuple[str, ...] = ("cpu", "cuda")
    backward: tuple[str, ...] = ("cpu", "cuda")

    def lacks(self, case: Case) -> str | None:
        """What of the case it has not; None where it has all."""
        if case.kind not in self.can:
            return f"has no {case.kind}" if case.kind not in _TENSORS else "takes no mask that is a tensor"
        if case.kv_heads != case.heads and not self.grouped:
            return "has no fewer heads of keys"
        if case.v_dim != case.dim and not self.wide:
            return "has no v of another head size"
        return None

    def refuses(self, device: str, whole: str) -> str | None:
        """Why it does not run ``forward``, or ``both``, on a device; None where it does."""
        found = self.forward if whole == "forward" else self.backward
        what = "forward" if whole == "forward" else "backward"
        return None if device in found else f"has no {what} on {device}"


OURS: Final = "fastattn"
CUDA: Final = ("cuda",)
_NO_DROPOUT: Final = tuple(kind for kind in KINDS if kind != "dropout")
_DAO: Final = ("causal", "full", "window", "documents")
_SDPA: Final = "F.scaled_dot_product_attention(q, k, v, is_causal=True)"


def forced(backend: SDPBackend, devices: tuple[str, ...] = ("cpu", "cuda")) -> Peer:
    """torch's, on one kernel; what is not causal or full is a dense mask, which some refuse."""
    return Peer(sdpa(backend), f"sdpa_kernel({backend.name}): {_SDPA}", forward=devices, backward=devices)


PEERS: Final[dict[str, Peer]] = {
    OURS: Peer(ours, "fastattn.attention(q, k, v, mask=fastattn.causal())"),
    "sdpa flash": forced(SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": forced(SDPBackend.CUDNN_ATTENTION, CUDA),
    "sdpa efficient": forced(SDPBackend.EFFICIENT_ATTENTION, CUDA),
    "sdpa default": Peer(sdpa(None), _SDPA),
    "flex compiled": Peer(
        flex,
        "torch.compile(flex_attention)(q, k, v, block_mask=create_block_mask(...))",
        _NO_DROPOUT,
        backward=CUDA,
    ),
    "naive": Peer(naive, "softmax(q @ k.mT * scale + mask) @ v"),
    "naive compiled": Peer(naive_compiled, "torch.compile(naive)"),
    "flash-attn 2": Peer(
        flash_attn("flash_attn", "flash-attn"),
        "flash_attn.flash_attn_func(q, k, v, causal=True)",
        (*_SIMPLE, "window", "alibi", "documents"),
        wide=False,
        forward=CUDA,
        backward=CUDA,
    ),
    "flash-attn 3": Peer(
        flash_attn("flash_attn_interface", "flash-attn-3"),
        "flash_attn_interface.flash_attn_func(q, k, v, causal=True)",
        _DAO,
        wide=False,
        forward=CUDA,
        backward=CUDA,
    ),
    "flash-attn 4": Peer(
        flash_attn("flash_attn.cute", "flash-attn-4"),
        "flash_attn.cute.flash_attn_func(q, k, v, causal=True)",
        _DAO,
        wide=False,
        forward=CUDA,
        backward=CUDA,
    ),
    "xformers": Peer(
        xformers,
        "xformers.ops.memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask())",
        (*_SIMPLE, "window"),
        grouped=False,
        forward=CUDA,
        backward=CUDA,
    ),
}
_PACKAGES: Final = {
    "flash-attn 2": ("flash-attn",),
    "flash-attn 3": ("flash-attn-3", "flash_attn_3"),
    "flash-attn 4": ("flash-attn-4", "flash_attn_4"),
    "xformers": ("xformers",),
}


def version_of(name: str) -> str:
    """The version of what a peer is part of."""
    found = next((v for package in _PACKAGES.get(name, ()) if (v := version(package))), None)
    if name == "sdpa cudnn":
        return f"cuDNN {torch.backends.cudnn.version() or 'none'}"
    if name == OURS:
        return fastattn.__version__
    return found or (f"torch {torch.__version__}" if name not in _PACKAGES else "")
