"""What is raced: the cases, the implementations, and how much work each is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn


@dataclass(frozen=True)
class Case:
    """One attention problem and the passes that are timed.

    Attributes:
        passes: ``forward``, ``backward`` or ``both``.
        mask: ``none``, ``causal``, ``tril`` (the same as a bool tensor [1, 1, L, L]), or ``bool`` (random, of
            the same shape, three in four kept).
        peers: names in `IMPLEMENTATIONS`.
        short: part of the short run.
    """

    passes: str
    length: int
    mask: str = "causal"
    dtype: torch.dtype = torch.float32
    heads: int = 12
    dim: int = 64
    v_dim: int = 64
    dropout: float = 0.0
    peers: tuple[str, ...] = ("sdpa",)
    short: bool = False

    def __str__(self) -> str:
        extra = f"-p{self.dropout}" if self.dropout else ""
        dims = f"{self.dim}" if self.dim == self.v_dim else f"{self.dim}x{self.v_dim}"
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.passes}-{name}-{self.mask}-H{self.heads}-L{self.length}-D{dims}{extra}"

    @property
    def flops(self) -> float:
        """Of the two (forward) and five (backward) matrix products, halved where the mask is causal."""
        matmul = 2 * self.heads * self.length**2 * (self.dim + self.v_dim) / 2
        products = {"forward": 2, "backward": 5, "both": 7}[self.passes]
        return products * matmul / (2 if self.mask in ("causal", "tril") else 1)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v, the gradient of out, and the bool mask where one is needed."""
        g = torch.Generator().manual_seed(0)
        shape = (1, self.heads, self.length)
        q, k = (torch.randn(*shape, self.dim, generator=g).to(self.dtype).requires_grad_() for _ in range(2))
        v, dout = (torch.randn(*shape, self.v_dim, generator=g).to(self.dtype) for _ in range(2))
        mask = None
        if self.mask == "bool":
            mask = torch.rand(1, 1, self.length, self.length, generator=g) < 0.75
        if self.mask == "tril" or (self.mask == "causal" and "naive" in self.peers):
            mask = torch.ones(1, 1, self.length, self.length, dtype=torch.bool).tril()
        return q, k, v.requires_grad_(), dout, mask


LENGTHS = (512, 1024, 2048, 4096)
CASES = [
    *(Case("forward", n, peers=("sdpa",), short=n == 1024) for n in LENGTHS),
    *(Case("both", n, short=n == 1024) for n in LENGTHS),
    *(Case("both", n, mask="none") for n in LENGTHS),
    *(Case("forward", 1024, dtype=d) for d in (torch.bfloat16, torch.float16)),
    *(Case("backward", 1024, dtype=d) for d in (torch.bfloat16, torch.float16)),
    Case("both", 1024, dropout=0.1, short=True),
    Case("both", 4096, dropout=0.1),
    Case("both", 2048, mask="bool", v_dim=32),
    Case("both", 2048, mask="tril", v_dim=32),
    Case("both", 8192, heads=1),
    Case("both", 4096, peers=("sdpa", "naive")),
    Case("both", 1024, dim=128, v_dim=128),
]

Attention = Callable[[Tensor, Tensor, Tensor, Case, Tensor | None], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, case: Case, mask: Tensor | None) -> Tensor:
    """`fastattn.attention`."""
    keep = fastattn.causal() if case.mask == "causal" else mask
    found = fastattn.attention(q, k, v, mask=keep, dropout=case.dropout)
    assert isinstance(found, Tensor)
    return found


def sdpa(q: Tensor, k: Tensor, v: Tensor, case: Case, mask: Tensor | None) -> Tensor:
    """torch's, on the kernel it picks itself."""
    causal = case.mask == "causal"
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if causal else mask, dropout_p=case.dropout, is_causal=causal
    )


def naive(q: Tensor, k: Tensor, v: Tensor, case: Case, mask: Tensor | None) -> Tensor:
    """Softmax of a matrix of scores, as a model's eager attention writes it; the mask is made beforehand."""
    scores = q @ k.transpose(-1, -2) / case.dim**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(torch.softmax(scores, -1), case.dropout) @ v


IMPLEMENTATIONS: dict[str, Attention] = {"fastattn": ours, "sdpa": sdpa, "naive": naive}


def sdpa_kernel(case: Case) -> str:
    """Which kernel torch's sdpa really runs for the case."""
    q, k, v, _, mask = case.tensors()
    kernel = kernel_of(lambda: sdpa(q, k, v, case, mask))
    assert kernel != "eager", f"sdpa ran none of the known kernels: {case}"
    return kernel


def kernel_of(run: Callable[[], object]) -> str:
    """``flash`` or ``math``, where `run` calls torch's sdpa, read off the profiler; ``eager`` otherwise."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = {event.key for event in profile.key_averages()}
    for name, kernel in (("flash_attention", "flash"), ("attention_math", "math")):
        if any(name in key for key in names):
            return kernel
    return "eager"
