"""AdamW: the kernels against float64, the optimizer against torch's with clipping."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastattn
from fastattn.ops import choice
from fastattn.ops.adamw import adamw_step, total_norm
from fastattn.testing import force_isa, present_isas

in_interpreter = pytest.mark.skipif(
    choice.explanation(torch.ones(1), "triton").backend is None, reason="Triton's interpreter is not here"
)
BACKENDS = [*present_isas(), pytest.param("triton", marks=in_interpreter), "reference"]
SHAPES = [(1,), (63,), (257, 3), (40, 100), (70, 500), (0, 4)]
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def state(dtype: torch.dtype) -> list[list[Tensor]]:
    """params, grads, exp_avgs, exp_avg_sqs."""
    made = [[torch.randn(shape).to(dtype) for shape in SHAPES] for _ in range(4)]
    made[3] = [x.square() for x in made[3]]
    made[1][3] = torch.randn(100, 40).to(dtype).t()  # of other strides than its parameter
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_step_against_float64(backend: str, dtype: torch.dtype) -> None:
    given = state(dtype)
    exact = [[x.double() for x in tensors] for tensors in given]
    steps = [torch.tensor(float(3 + i)) for i in range(len(SHAPES))]
    grads = [x.clone() for x in given[1]]
    with force_isa(backend) if backend in present_isas() else nullcontext():
        name = "cpu" if backend in present_isas() else backend
        adamw_step(*given, steps, **OPTIONS, factor=0.3, backend=name)
    adamw_step(*exact, steps, **OPTIONS, factor=0.3, backend="reference")
    for i in (0, 2, 3):
        for found, want in zip(given[i], exact[i], strict=True):
            band = torch.finfo(dtype).eps * want.abs() + 16 * torch.finfo(torch.float32).eps * (
                1 + want.abs()
            )
            assert bool(((found.double() - want).abs() <= band).all())
    assert all(torch.equal(a, b) for a, b in zip(given[1], grads, strict=True)), "gradients are only read"


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm(backend: str) -> None:
    tensors = [torch.randn(shape) for shape in SHAPES] + [torch.full((3,), 1e3).bfloat16()]
    exact = torch.cat([x.double().flatten() for x in tensors]).norm()
    with force_isa(backend) if backend in present_isas() else nullcontext():
        name = "cpu" if backend in present_isas() else backend
        found = total_norm(tensors, backend=name)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def train(
    make: Callable[..., Any], dtype: torch.dtype, max_norm: float | None, clip: bool, **options: Any
) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 50), nn.LayerNorm(50), nn.Linear(50, 7)).to(dtype)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-3},
    ]
    optimizer = make(
        groups, lr=0.01, **options, **({} if clip or max_norm is None else {"max_norm": max_norm})
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    x, norms = torch.randn(16, 30).to(dtype), []
    for _ in range(6):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if clip and max_norm is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
        if not clip and max_norm is not None:
            norms.append(optimizer.grad_norm)
        schedule.step()
    return model, optimizer, norms


@pytest.mark.parametrize("max_norm", [None, 0.05, 1e3])
@pytest.mark.parametrize("options", [{}, {"maximize": True}, {"fused": True}, {"foreach": True}], ids=str)
def test_optimizer_is_torchs(options: dict[str, Any], max_norm: float | None) -> None:
    ours, optimizer, norms = train(fastattn.optim.AdamW, torch.float32, max_norm, False, **options)
    assert optimizer.path == "cpu"
    plain, _, _ = train(torch.optim.AdamW, torch.float32, max_norm, True, **options)
    exact, _, wanted = train(torch.optim.AdamW, torch.float64, max_norm, True, **options)
    for a, b, c in zip(ours.parameters(), plain.parameters(), exact.parameters(), strict=True):
        budget = 2 * (b.double() - c).abs().max() + 1e-6
        assert (a.double() - c).abs().max() <= budget
    torch.testing.assert_close(
        [x.double() for x in norms], [x.double() for x in wanted], rtol=1e-4, atol=1e-6
    )
    assert (optimizer.grad_norm is None) == (max_norm is None)
    # Its state is torch's.
    fresh = torch.optim.AdamW([{"params": g["params"]} for g in optimizer.param_groups])
    fresh.load_state_dict(optimizer.state_dict())
    assert set(fresh.state_dict()["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("options", "dtype", "why"),
    [
        ({"amsgrad": True}, torch.float32, "amsgrad=True"),
        ({}, torch.float64, "torch.float64"),
        ({}, torch.complex64, "torch.complex64"),
    ],
)
def test_what_torch_does(options: dict[str, Any], dtype: torch.dtype, why: str) -> None:
    found = []
    for make, own in ((fastattn.optim.AdamW, {"max_norm": 0.5}), (torch.optim.AdamW, {})):
        torch.manual_seed(0)
        p = torch.randn(5, dtype=dtype).requires_grad_()
        optimizer = make([p], **own, **options)
        hooks: list[int] = []
        optimizer.register_step_post_hook(lambda *_, hooks=hooks: hooks.append(1))
        p.grad = torch.randn(5, dtype=dtype)
        if not own:
            nn.utils.clip_grad_norm_([p], 0.5)
        optimizer.step()
        assert hooks == [1]
        found.append(p.detach())
        if own:
            assert why in optimizer.path
            assert optimizer.path.startswith("torch: ")
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_norm_that_is_not_finite_is_seen_and_skips_the_step(dtype: torch.dtype) -> None:
    p = torch.ones(3, dtype=dtype, requires_grad=True)
    p.grad = torch.tensor([1.0, float("inf"), 0.0], dtype=dtype)
    optimizer = fastattn.optim.AdamW([p], max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.isinf()
    assert torch.equal(p.detach(), torch.ones(3, dtype=dtype))
    assert not optimizer.state


def test_betas_near_1() -> None:
    found = {}
    for make, dtype in ((fastattn.optim.AdamW, torch.float32), (torch.optim.AdamW, torch.float64)):
        torch.manual_seed(0)
        p = torch.zeros(100, dtype=dtype, requires_grad=True)
        optimizer = make([p], lr=1.0, betas=(0.9, 0.99999), weight_decay=0.0)
        g = torch.randn(100, dtype=torch.float32).to(dtype)
        for _ in range(3):
            p.grad = g.clone()
            optimizer.step()
        found[dtype] = p.detach().double()
    torch.testing.assert_close(found[torch.float32], found[torch.float64], rtol=0, atol=1e-5)


def test_a_step_counts_as_a_change() -> None:
    p = torch.ones(3, requires_grad=True)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    fastattn.optim.AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(how: Callable[[Any], Any]) -> None:
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    copied = how(fastattn.optim.AdamW([p], max_norm=0.5))
    for q in copied.param_groups[0]["params"]:
        q.grad = torch.ones(3)
    copied.step()
    assert copied.max_norm == 0.5
    torch.testing.assert_close(copied.grad_norm, torch.tensor(3.0).sqrt())


def test_state_of_other_strides_or_steps_is_torchs() -> None:
    found = []
    for make in (fastattn.optim.AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        p = torch.randn(4, 3, 2, 2, requires_grad=True)
        optimizer = make([p])
        p.grad = torch.randn(4, 3, 2, 2)
        optimizer.step()
        p.data = p.data.to(memory_format=torch.channels_last)
        p.grad = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
        optimizer.step()
        found.append(p.detach())
    torch.testing.assert_close(*found)
    try:
        torch.set_default_dtype(torch.float64)
        p = torch.ones(3, dtype=torch.float32, requires_grad=True)
        p.grad = torch.ones(3, dtype=torch.float32)
        fastattn.optim.AdamW([p]).step()
    finally:
        torch.set_default_dtype(torch.float32)


def test_closure_scaler_and_nothing_to_do() -> None:
    p = torch.ones(3, requires_grad=True)
    optimizer = fastattn.optim.AdamW([p], fused=True, max_norm=1.0)
    assert optimizer.step() is None

    def closure() -> Tensor:
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = p.detach().clone()
    p.grad = torch.full((3,), float("inf"))
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert torch.equal(p.detach(), before)


def test_the_same_whatever_the_threads() -> None:
    tensors, threads = [torch.randn(300_000)], torch.get_num_threads()
    norms = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            norms.append(total_norm(tensors))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*norms)


def test_errors() -> None:
    p = torch.ones(3)
    with pytest.raises(ValueError, match="max_norm: expected a number above 0"):
        fastattn.optim.AdamW([p.requires_grad_()], max_norm=0.0)
    p = p.detach()
    with pytest.raises(ValueError, match=r"grads: expected 1 tensors, as params, got 0"):
        adamw_step([p], [], [p], [p], [p], **OPTIONS)
    with pytest.raises(ValueError, match=r"exp_avgs: expected \[3\] of torch.float32 .* got \[2\]"):
        adamw_step([p], [p], [p[:2]], [p], [p], **OPTIONS)
    with pytest.raises(ValueError, match="expected one or more, got none"):
        total_norm([])
    with pytest.raises(NotImplementedError, match="without holes"):
        adamw_step(*([torch.ones(4, 2)[:, 0]] for _ in range(4)), [torch.ones(())], **OPTIONS, backend="cpu")
