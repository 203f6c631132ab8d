"""`optimize`, `revert`, the report and `fastattn explain-model`."""

from __future__ import annotations

import copy
import json
import pickle
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastattn
import fastattn.compiler
from fastattn import cli
from fastattn.compiler import backend as backends
from tests.compiler.models import NanoBlock

EAGER = {"then": "eager"}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    fastattn.compiler.reset_report()


def test_optimize_and_revert(capsys: pytest.CaptureFixture[str]) -> None:
    model = NanoBlock().train()
    before = copy.deepcopy(model.state_dict())
    parameters, x = list(model.parameters()), torch.randn(2, 12, 32)
    naive = model(x)
    assert fastattn.optimize(model, verbose=True, options=EAGER) is model
    assert capsys.readouterr().out == ""
    torch.testing.assert_close(model(x), naive)
    said = capsys.readouterr().out
    assert "fastattn: 1 of 1 attention sites rewritten" in said
    assert "models.py:" in said and "att = F.softmax(att, dim=-1)" in said
    model(x)
    assert capsys.readouterr().out == ""
    assert fastattn.compiler.report().rewritten == 1
    assert list(model.state_dict()) == list(before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))

    assert fastattn.compiler.revert(model) is model
    fastattn.compiler.reset_report()
    assert torch.equal(model(x), naive)
    model(torch.randn(3, 7, 32))
    assert fastattn.compiler.report().seen == 0


def test_revert_leaves_a_model_s_own_compilation() -> None:
    model = NanoBlock()
    model.compile(backend="eager")
    own = model._compiled_call_impl
    assert fastattn.compiler.revert(model)._compiled_call_impl is own
    for _ in range(2):
        fastattn.optimize(model, verbose=True, options=EAGER)
    assert fastattn.compiler.revert(model)._compiled_call_impl is own


def test_many_models_of_one_class_share_their_code() -> None:
    models = [fastattn.optimize(NanoBlock().eval(), options=dict(EAGER)) for _ in range(12)]
    for model in models:
        model(torch.randn(2, 12, 32))
    assert fastattn.compiler.report().seen == 1


def test_optimized_model_is_copied_and_pickled() -> None:
    model = fastattn.optimize(NanoBlock(), verbose=True, options=EAGER)
    x = torch.randn(2, 12, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x))


def test_optimize_takes_a_module() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        fastattn.optimize(lambda x: x)


def test_options_of_another_backend_are_refused() -> None:
    model = fastattn.optimize(NanoBlock(), mode="max-autotune", options=EAGER)
    with pytest.raises(Exception, match="expected no mode and no options for 'eager'"):
        model(torch.randn(2, 12, 32))


def test_explain_model_changes_nothing() -> None:
    class Normed(NanoBlock):
        def __init__(self) -> None:
            super().__init__(dropout=0.5)
            self.norm = nn.BatchNorm1d(12)
            self.register_buffer("steps", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.steps = self.steps + 1
            return super().forward(self.norm(x))

    model = Normed().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    found = fastattn.compiler.explain_model(model, torch.randn(2, 12, 32, generator=torch.Generator()))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    (record,) = found.records
    assert (record.rewritten, record.shape, record.dropout) == (True, (2, 4, 12, 12), 0.5)
    assert record.saved_bytes == 2 * 4 * 12 * 12 * (4 + 1 + 4)


MODULE = """
import torch

class Naive(torch.nn.Module):
    def __init__(self, over=-1):
        super().__init__()
        self.over = over

    def forward(self, x):
        return ((x @ x.mT) * 0.1).softmax(self.over) @ x

def with_input():
    return Naive(over=-2), torch.randn(2, 9, 8)
"""


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "naive_model.py"
    path.write_text(MODULE)
    assert cli.main(["explain-model", f"{path}:Naive", "--input", "2x9x8:float32"]) == 0
    assert "1 of 1 attention sites rewritten" in capsys.readouterr().out
    torch._dynamo.reset()
    assert cli.main(["explain-model", f"{path}:with_input", "--json", "--eval"]) == 3
    (record,) = json.loads(capsys.readouterr().out)["records"]
    assert not record["rewritten"]
    assert record["reason"] == "the softmax does not run over the axis that the values are summed over"
    assert record["location"].startswith(f"{path}:10")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "expected package.module:name"),
        (["no.such.module:f"], "there is no module no.such.module"),
        (["no/such/file.py:f"], "there is no file no/such/file.py"),
        (["torch:no_such_name"], "there is no 'no_such_name' in torch"),
        (["torch:get_num_threads"], "expected a torch.nn.Module, got int"),
        (["torch.nn:Identity", "--input", "2y3"], "expected a shape as 2x1024"),
        (["torch.nn:Identity"], "--input SHAPE for each"),
    ],
)
def test_command_says_what_is_wrong(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["explain-model", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_entry_point() -> None:
    (found,) = {x for x in entry_points(group="torch_dynamo_backends") if x.name == "fastattn"}
    assert found.load() is backends.backend
    assert "fastattn" in torch.compiler.list_backends()
