"""`torch.export`, AOTInductor and functorch with our ops and with the pass."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastattn
import fastattn.compiler
from fastattn.compiler.backend import backend
from tests.compiler.spellings import SPELLINGS


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    fastattn.compiler.reset_report()


class Called(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return SPELLINGS[self.name][0](q, k, v)


def tensors(length: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 4, length, 16) for _ in range(3))


LENGTH = torch.export.Dim("length", min=2, max=64)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "name",
    [
        "matmul_scale_after",
        "where_of_lowest",
        "repeat_kv",
        "einsum_length_first",
        "softcapped",
        "causal_with_padding",
    ],
)
def test_pass_on_exported_program(name: str, dynamic: bool) -> None:
    shapes = tuple({2: LENGTH} for _ in range(3)) if dynamic else None
    model, given = Called(name), tensors(13)
    exported = torch.export.export(model, given, dynamic_shapes=shapes)
    for program in (exported, exported.run_decompositions({})):
        module = program.module()
        (record,) = fastattn.compiler.replace_attention(module)
        assert record.rewritten, record.reason
        assert record.mask == SPELLINGS[name][1]
        for x in (given, tensors(21)) if dynamic else (given,):
            torch.testing.assert_close(module(*x), model(*x))


@pytest.mark.slow
def test_ahead_of_time(tmp_path: Path) -> None:
    class Ours(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return fastattn.attention(q, k, v, mask=fastattn.causal())

    shapes = tuple({2: LENGTH} for _ in range(3))
    with torch.no_grad():
        exported = torch.export.export(Ours(), tensors(13), dynamic_shapes=shapes)
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for length in (13, 21):
            given = tensors(length)
            torch.testing.assert_close(loaded(*given), Ours()(*given))


def test_functorch_around_a_compiled_function() -> None:
    function = SPELLINGS["tril_masked_fill"][0]
    q, k, v = tensors(13)

    def loss(q: Tensor) -> Tensor:
        return function(q, k, v).square().sum()

    for transform in (torch.func.grad, lambda f: torch.func.vmap(f, in_dims=0)):
        call = (
            transform(loss) if transform is torch.func.grad else transform(lambda q: function(q[None], k, v))
        )
        compiled = torch.compile(call, backend=partial(backend, then="aot_eager"))
        torch.testing.assert_close(compiled(q), call(q))
    assert "it is inside a functorch transform" in str(fastattn.compiler.report())
    assert fastattn.compiler.report().rewritten == 0
