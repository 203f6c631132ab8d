"""The embedding's kernels against float64, and as a torch op; the module."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.ops import choice
from fastattn.testing import force_isa, present_isas

in_interpreter = pytest.mark.skipif(
    choice.explanation(torch.ones(1), "triton").backend is None, reason="Triton's interpreter is not here"
)
BACKENDS = [*present_isas(), pytest.param("triton", marks=in_interpreter), "reference"]
# ids' shape, columns, whether there are positions: none, the default, one for each id, one for each batch
CASES = [((2, 5), 257, "default"), ((1,), 1, "none"), ((3, 2, 4), 63, "each"), ((2, 7), 300, "batch")]


def on(backend: str) -> tuple[str, AbstractContextManager[None]]:
    """The backend's name, and what makes it run on its instruction set inside."""
    return ("cpu", force_isa(backend)) if backend in present_isas() else (backend, nullcontext())


def run(
    dtype: torch.dtype, backend: str, case: Any, tables: tuple[Tensor, Tensor], **options: Any
) -> list[Tensor]:
    """out, and the gradients of both tables."""
    shape, _, kind = case
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(9, shape, generator=g, dtype=torch.int32)
    weight, places = (x.detach().to(dtype).clone().requires_grad_() for x in tables)
    positions = {"each": torch.randint(8, shape, generator=g), "batch": torch.tensor([[3], [0]])}.get(kind)
    position_weight = None if kind == "none" else places
    out = fastattn.embedding(ids, weight, position_weight, positions, backend=backend, **options)
    assert out.shape == (*shape, weight.shape[1])
    assert out.dtype == dtype
    dout = torch.randn(out.shape, generator=g).bfloat16().to(dtype)
    out.backward(dout)
    return [out.detach(), *(x.grad for x in (weight, places) if x.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend: str, dtype: torch.dtype) -> None:
    name, isa = on(backend)
    with isa:
        for i, case in enumerate(CASES):
            options = {"dropout": (0.3, 0.0)[i % 2], "seed": 2**40 + 5, "padding_idx": (None, None, -5, 3)[i]}
            tables = tuple(torch.randn(rows, case[1]).to(dtype) for rows in (9, 8))
            ours = run(dtype, name, case, tables, **options)
            exact = run(torch.float64, "reference", case, tables, **options)
            assert len(ours) == len(exact)
            assert torch.equal(ours[0] == 0, exact[0].to(dtype) == 0), "the same elements are dropped"
            for found, want in zip(ours, exact, strict=True):
                band = torch.finfo(dtype).eps * want.abs() + 16 * torch.finfo(torch.float32).eps
                if name == "reference":  # torch adds a table's gradient up in its dtype
                    band = 8 * torch.finfo(dtype).eps * want.abs().clamp(min=1)
                assert bool(((found.double() - want).abs() <= band).all())


def test_strides_and_nothing_to_look_up() -> None:
    weight, places = torch.randn(6, 9).t(), torch.randn(9, 12)[:, ::2]
    ids = torch.randint(9, (5, 2)).t()
    found = fastattn.embedding(ids, weight, places, backend="cpu")
    torch.testing.assert_close(found, weight[ids] + places[:5])
    assert fastattn.embedding(torch.empty(2, 0, dtype=torch.long), weight, places).shape == (2, 0, 6)
    assert fastattn.embedding(torch.empty(0, 3, dtype=torch.long), weight, places).shape == (0, 3, 6)


def test_the_same_whatever_the_threads() -> None:
    ids, threads, grads = torch.randint(50, (4, 100)), torch.get_num_threads(), []
    for count in (1, 4):
        torch.set_num_threads(count)
        weight = torch.ones(50, 300, requires_grad=True)
        fastattn.embedding(ids, weight, dropout=0.2, seed=3).sin().sum().backward()
        grads.append(weight.grad)
    torch.set_num_threads(threads)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=in_interpreter)])
def test_opcheck(backend: str) -> None:
    ids, weight, places = torch.randint(9, (6,)), torch.randn(9, 5), torch.randn(4, 5)
    seed, ops = torch.tensor([7]), torch.ops.fastattn
    for position_weight, positions in ((None, None), (places, torch.randint(4, (3,)))):
        torch.library.opcheck(ops.embedding, (ids, weight, position_weight, positions, seed, 0.2, backend))
    torch.library.opcheck(ops.embedding_gradient, (torch.randn(6, 5), ids, 9, seed, 0.2, 2, backend))


def test_gradients_of_gradients() -> None:
    ids = torch.tensor([[1, 1, 3]])
    tables = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    for x in tables:
        x.requires_grad_()
    options: dict[str, Any] = {"dropout": 0.25, "seed": 11}
    assert torch.autograd.gradcheck(lambda w, p: fastattn.embedding(ids, w, p, **options), tables)

    def second(backend: str) -> Tensor:
        w = tables[0].detach().float().requires_grad_()
        loss = fastattn.embedding(ids, w, padding_idx=3, backend=backend, **options).pow(3).sum()
        (grad,) = torch.autograd.grad(loss, w, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), w)[0]

    torch.testing.assert_close(second("cpu"), second("reference"))


def test_compile_fullgraph_with_dynamic_lengths() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    weight, places = torch.randn(9, 5, requires_grad=True), torch.randn(40, 5, requires_grad=True)
    counter = CompileCounterWithBackend("aot_eager")

    def f(ids: Tensor) -> Tensor:
        return fastattn.embedding(ids, weight, places, dropout=0.5, seed=3).sin()

    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
    for length in (4, 9, 17):
        ids = torch.randint(9, (2, length))
        grads = []
        for run in (compiled, f):
            weight.grad = None
            run(ids).sum().backward()
            grads.append(weight.grad)
        assert torch.equal(*grads)
        assert torch.equal(compiled(ids), f(ids))
    assert counter.frame_count == 1
    with pytest.raises(RuntimeError, match="expected indices from 0 to 8, got 9"):
        compiled(torch.full((2, 6), 9))


def test_explain() -> None:
    ids, weight = torch.zeros(3, dtype=torch.long), torch.randn(4, 5)
    assert fastattn.explain(fastattn.embedding, ids, weight).backend == "cpu"
    assert fastattn.explain(fastattn.embedding, ids, weight.double()).backend == "reference"


def test_module() -> None:
    module = fastattn.nn.TokenPositionEmbedding(10, 6, 4, dropout=0.5, padding_idx=0)
    assert set(module.state_dict()) == {"token.weight", "position.weight"}
    ids = torch.tensor([[1, 0, 3]])
    want = module.token(ids) + module.position(torch.arange(3))
    assert (module(ids) == 0).any()
    torch.testing.assert_close(module.eval()(ids), want)
    torch.testing.assert_close(
        module(ids, torch.tensor([2, 1, 0])), module.token(ids) + module.position.weight[:3].flip(0)
    )
    with pytest.raises(ValueError, match="dropout: expected a probability"):
        fastattn.nn.TokenPositionEmbedding(10, 6, 4, dropout=1.0)


IDS, TABLE = torch.zeros(2, 3, dtype=torch.long), torch.zeros(4, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((IDS + 4, TABLE), {}, IndexError, "ids: expected indices from 0 to 3, got 4 to 4"),
        ((IDS - 1, TABLE), {}, IndexError, "got -1 to -1"),
        ((IDS, TABLE, TABLE[:2]), {}, IndexError, "positions: expected indices from 0 to 1, got 0 to 2"),
        ((IDS.float(), TABLE), {}, TypeError, "ids: expected integers, got torch.float32"),
        ((IDS, IDS), {}, TypeError, "weight: expected a floating dtype"),
        ((IDS, TABLE[0]), {}, ValueError, "weight: expected .rows, 5., got .5."),
        ((IDS, TABLE, TABLE[:, :3]), {}, ValueError, "position_weight: expected .rows, 5., got .4, 3."),
        ((IDS, TABLE, TABLE.double()), {}, ValueError, "position_weight: expected torch.float32"),
        ((IDS, TABLE, None, IDS), {}, ValueError, "positions: expected with position_weight"),
        ((IDS, TABLE, TABLE, IDS.t()), {}, ValueError, "broadcasts to .2, 3., got .3, 2."),
        ((IDS[0, 0], TABLE), {}, ValueError, "ids: expected"),
        ((IDS, TABLE), {"padding_idx": 4}, ValueError, "padding_idx: expected an index into 4 rows"),
        ((IDS, TABLE), {"dropout": 1.0}, ValueError, "dropout: expected a probability"),
        ((IDS, None), {}, TypeError, "weight: expected a tensor, got NoneType"),
    ],
)
def test_errors(arguments: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastattn.embedding(*arguments, **options)


def test_gradients_of_each_sample() -> None:
    weight, ids = torch.randn(5, 6), torch.randint(5, (3, 4))
    found, want = (
        torch.func.vmap(torch.func.grad(lambda w, i, f=f: f(i, w).square().sum()), (None, 0))(weight, ids)
        for f in (fastattn.embedding, torch.nn.functional.embedding)
    )
    torch.testing.assert_close(found, want)
