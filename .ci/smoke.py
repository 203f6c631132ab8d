"""The installed wheel does its work: its library, loaded from site-packages, agrees with the reference."""

import sys
import warnings
from pathlib import Path

import torch

import fastattn
from fastattn import _backends

warnings.simplefilter("error", RuntimeWarning)
package = Path(fastattn.__file__).parent
assert package.is_relative_to(sys.prefix), f"expected the installed package, got {package}"
assert (package / "py.typed").is_file()
assert (package / "csrc/library.cpp").is_file()
library = _backends.library()
assert library.path is not None, library.notes
assert library.path.parent == package, library

torch.manual_seed(0)
inputs = [torch.randn(2, 4, 257, 48) for _ in range(3)]
dout = torch.randn(2, 4, 257, 48)
results = []
for backend in ("cpu", "reference"):
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    out = fastattn.attention(q, k, v, mask=fastattn.causal(), dropout=0.1, seed=3, backend=backend)
    assert isinstance(out, torch.Tensor)
    out.backward(dout)
    results.append([out, q.grad, k.grad, v.grad])
for ours, theirs in zip(*results, strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
assert fastattn.explain(*inputs).backend == "cpu"
print(
    f"fastattn {fastattn.__version__} from {package}: forward and backward on {_backends.cpu_isa()} are right"
)
