"""`fastattn.mlp`: checks what it is given, chooses a backend, and calls it. Speaks to people."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops import choice
from fastattn.ops.activations import activation_id
from fastattn.ops.linear.api import as_rows, check_linear
from fastattn.ops.mlp import library, reference


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str = "gelu",
    *,
    gate: Tensor | tuple[Tensor, Tensor | None] | None = None,
    residual: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``residual + dropout(f(x w1ᵀ + b1) w2ᵀ + b2)``, the activation within the matrix products.

    With `gate` the activation is of a third layer, ``f(x gateᵀ + gate_bias) · (x w1ᵀ + b1)``: SwiGLU is that
    with ``"silu"``, GeGLU with ``"gelu"``. Of the hidden layer backward keeps what goes into the activation;
    what comes out of it is made again there, on the way.

    Args:
        x: ``[..., in_features]``; float32, bfloat16, float16, or float64 for the reference.
        w1: ``[hidden_features, in_features]``, and all weights of x's dtype, of any strides.
        b1: ``[hidden_features]`` or None.
        w2: ``[out_features, hidden_features]``.
        b2: ``[out_features]`` or None.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"relu"`` or ``"relu2"`` (ReLU squared).
        gate: ``[hidden_features, in_features]``, alone or with its bias ``[hidden_features]``, or None.
        residual: ``[..., out_features]`` of x's dtype or float32, added to the result, or None; left as it is
            by autocast.
        dropout: probability in [0, 1) that an element of the second layer's output is zeroed; the others grow
            by 1 / (1 - dropout). Taken in 65,536ths.
        seed: of the dropout, an int in [0, 2^63) or an int64 tensor [1]; drawn from torch's generator if
            None. The same seed drops the same elements on every backend.
        recompute: keep nothing of the hidden layer: backward makes what goes into the activation again from
            x, a matrix product more to six, and ``hidden_features`` numbers a row less memory.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; the best that can if None. See `explain`.

    Returns:
        ``[..., out_features]`` in x's dtype, or the residual's where that has more digits.

    Raises:
        TypeError: not tensors.
        ValueError: shapes, dtypes, devices or options that do not fit; what was expected and given.
        NotImplementedError: the backend asked for can't run this.

    Source: Hendrycks & Gimpel, "Gaussian Error Linear Units", 2016; Shazeer, "GLU Variants Improve
    Transformer", 2020; So et al., "Primer", 2021 (ReLU squared).

    Example:
        >>> import torch, fastattn
        >>> w1, w2 = torch.randn(32, 8), torch.randn(8, 32)
        >>> fastattn.mlp(torch.randn(2, 5, 8), w1, None, w2, None, "relu2").shape
        torch.Size([2, 5, 8])
    """
    w3, b3 = gate if isinstance(gate, tuple) else (gate, None)
    choice.check_tensors(x=x, w1=w1, b1=b1, w2=w2, b2=b2, gate=w3, gate_bias=b3, residual=residual)
    x, w1, b1, w2, b2, w3, b3 = choice.autocast(x, w1, b1, w2, b2, w3, b3)
    check_linear(x, w1, b1, "w1")
    check_linear(x[..., :1].expand(*x.shape[:-1], w1.shape[0]), w2, b2, "w2")
    if w3 is not None:
        check_linear(x, w3, b3, "gate")
        if w3.shape != w1.shape:
            raise ValueError(f"gate: expected w1's {list(w1.shape)}, got {list(w3.shape)}")
    elif b3 is not None:
        raise ValueError("gate: expected a weight with its bias, got None")
    shape = (*x.shape[:-1], w2.shape[0])
    wide = torch.promote_types(x.dtype, torch.float32)
    if residual is not None and (residual.shape != shape or residual.dtype not in (x.dtype, wide)):
        kinds = " or ".join(str(dtype) for dtype in dict.fromkeys((x.dtype, wide)))
        got = f"{residual.dtype} {list(residual.shape)}"
        raise ValueError(f"residual: expected {kinds} {list(shape)}, got {got}")
    activation_id(activation)
    choice.check_dropout(dropout)
    chosen = choice.choose(x, backend)
    seed = choice.as_seed(seed, dropout, x.device)
    rows, layers = as_rows(x), (w1, b1, w2, b2, w3, b3)
    # A residual of more digits is added behind, in its own.
    alike = residual is not None and residual.dtype == x.dtype
    added = as_rows(residual) if residual is not None and alike else None
    needed = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, *layers))
    options = (float(dropout), activation, recompute or not needed)
    if chosen == "reference":
        with choice.no_autocast(x.device):
            out = reference.mlp(rows, *layers, added, seed, *options)
    else:
        out, _, _ = library.MLP.apply(rows, *layers, added, seed, *options, chosen)
    out = out.reshape(shape)
    return out if residual is None or alike else residual + out
