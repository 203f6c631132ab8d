"""DTensor and FSDP2 on two processes: the same results and gradients as on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)

PROGRAM = """
import sys, warnings
import torch, torch.distributed as dist
import fastattn, fastattn.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
fastattn.distributed.register_sharding()
fastattn.distributed.register_sharding()

def close(ours, theirs, what):
    ours = ours.full_tensor() if isinstance(ours, DTensor) else ours
    torch.testing.assert_close(ours, theirs, msg=lambda m: f"{what}: {m}")

torch.manual_seed(0)
shapes = [(2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8), (1, 4, 9, 9), (4,)]
plain = [torch.randn(s, requires_grad=True) for s in shapes]
for place, rest in ((Shard(0), Replicate()), (Shard(1), Shard(1)), (Replicate(), Replicate())):
    sinks = Shard(0) if place == Shard(1) else Replicate()
    places = [place, place, place, rest, sinks]
    ours = [
        distribute_tensor(x.detach(), mesh, [p]).requires_grad_() for x, p in zip(plain, places)
    ]
    def call(q, k, v, bias, sinks):
        return fastattn.attention(q, k, v, mask=fastattn.causal(), bias=bias, sinks=sinks, return_lse=True)
    with CommDebugMode() as comm:
        out, lse = call(*ours)
    assert comm.get_total_counts() == 0, (place, comm.get_comm_counts())
    assert out.placements == lse.placements == (place,), (place, out.placements)
    exact = call(*plain)
    close(out, exact[0], ("out", place))
    close(lse, exact[1], ("lse", place))
    grads = torch.autograd.grad(out.full_tensor().square().sum(), ours)
    wanted = torch.autograd.grad(exact[0].square().sum(), plain)
    for name, a, b in zip("q k v bias sinks".split(), grads, wanted):
        close(a, b, (name, place))

# Uneven heads are gathered, and right.
few = [torch.randn(2, n, 9, 8) for n in (3, 1, 1)]
out = fastattn.attention(*(distribute_tensor(x, mesh, [Replicate()]) for x in few))
close(out, fastattn.attention(*few), "uneven")

# FSDP2 around our modules.
torch.manual_seed(1)
block = lambda: fastattn.CausalSelfAttention(n_embd=32, n_head=4, dropout=0.0)
model = torch.nn.Sequential(block(), block())
x = torch.randn(2, 11, 32)
wanted = model(x).square().mean()
wanted.backward()
exact = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
for block in model:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
loss = model(x).square().mean()
loss.backward()
close(loss, wanted, "fsdp loss")
for p, b in zip(model.parameters(), exact):
    close(p.grad, b, "fsdp grad")
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
