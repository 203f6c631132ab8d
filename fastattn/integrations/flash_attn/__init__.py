"""flash-attn's functions by their own signatures, on fastattn's kernels: on CPU, on GPU, and in float32.

Swap the import, or let code that imports `flash_attn` have these: `install`.

>>> import torch
>>> from fastattn.integrations.flash_attn import explain, flash_attn_func
>>> q, k, v = (torch.randn(2, 5, 4, 8, dtype=torch.float64) for _ in range(3))
>>> flash_attn_func(q, k, v, causal=True, window_size=(2, 0)).shape
torch.Size([2, 5, 4, 8])
>>> explain(flash_attn_func, q, k, v, causal=True, window_size=(2, 0)).backend
'reference'

Each is one call: of `fastattn.attention` with ``q.transpose(1, 2)``, a mask and ``bias=alibi(slopes)``; in
the packed functions with a batch of one and ``documents(cu_seqlens_q, cu_seqlens_k)``; and of
`fastattn.attention_with_kv_cache`. What is more than flash-attn has: any device and dtype, head_dim up to
512, dropout with softcap, gradients for alibi_slopes and softmax_lse, pages of any size, left padding with
pages.

What differs, beyond rounding: softmax_lse of a query with nothing to attend to is -inf (flash-attn 2: +inf),
and with `causal` and `alibi_slopes` it is that of the scores as documented (flash-attn's is shifted by row);
S_dmask has the documented shape and holds probabilities (flash-attn pads it to multiples of 128, and does not
normalise); dropout draws its seed from torch's generator and zeroes other elements than flash-attn would.
"""

from fastattn.integrations.flash_attn.cache import flash_attn_with_kvcache
from fastattn.integrations.flash_attn.explanation import explain
from fastattn.integrations.flash_attn.functions import flash_attn_func, flash_attn_varlen_func
from fastattn.integrations.flash_attn.install import VERSION as __version__
from fastattn.integrations.flash_attn.install import install, uninstall
from fastattn.integrations.flash_attn.packed import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "__version__",
    "explain",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
    "uninstall",
]
