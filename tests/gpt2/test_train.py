"""Training: losses that agree, runs that go on exactly where they ended, checkpoints no kill can tear."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.gpt2 import checkpoint, config, optim, plan, progress
from fastattn.gpt2 import train as training
from fastattn.gpt2.checkpoint import latest_run, load_model, read_state
from fastattn.gpt2.config import GPT2Config
from fastattn.gpt2.data import Batches, load_tokens
from fastattn.gpt2.model import GPT2
from fastattn.gpt2.options import FUSED, Options
from fastattn.gpt2.train import train

pytest.importorskip("safetensors")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents with something to learn, of real words."""
    folder = tmp_path_factory.mktemp("text")
    words = [line for line in Path(training.__file__).read_text().split("\n") if line.strip()]
    for i in range(6):
        (folder / f"{i}.txt").write_text("\n".join(words[i * 30 : i * 30 + 40]))
    return folder


@pytest.fixture
def options(text: Path, tmp_path: Path) -> Options:
    return Options(
        size="tiny",
        data=str(text),
        tokenizer="bytes",
        context=33,
        batch=2,
        steps=10,
        dtype="float32",
        device="cpu",
        eval_every=5,
        eval_batches=1,
        save_every=4,
        out=str(tmp_path / "run"),
    )


def losses(out: str) -> dict[int, float]:
    """Of each step, what the log said of it last."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


def weights(folder: Path | None) -> dict[str, torch.Tensor]:
    assert folder is not None
    return load_model(folder).state_dict()


def test_attention_kinds_train_alike_over_30_steps(options):
    """Without dropout the kinds differ by rounding alone, which a step grows a little: 1e-4 is wide."""
    runs = {}
    for kind in ("standard", "sdpa", "fastattn"):
        out = f"{options.out}-{kind}"
        train(replace(options, attention=kind, steps=30, dropout=0.0, eval_every=0, out=out))
        runs[kind] = losses(out)
    assert len(runs["standard"]) == 30
    assert runs["standard"][30] < 0.75 * runs["standard"][1], "it learns"
    for kind in ("sdpa", "fastattn"):
        for step, expected in runs["standard"].items():
            assert runs[kind][step] == pytest.approx(expected, rel=1e-4), (kind, step)


@pytest.mark.parametrize("fused", ["optimizer", "embedding,norm,linear,mlp,loss"])
def test_what_is_fused_trains_as_plain_pytorch_does(options, fused, capsys):
    runs = {}
    for name in ("none", fused):
        out = f"{options.out}-{name[:4]}"
        train(replace(options, fused=name, dropout=0.0, clip=0.5, eval_every=0, out=out))
        runs[name] = losses(out)
        assert f"fused: {name.replace(',', ', ')}" in capsys.readouterr().out
    for step, expected in runs["none"].items():
        assert runs[fused][step] == pytest.approx(expected, rel=1e-4), step


def test_the_optimizer_of_a_run_is_the_one_that_was_chosen(options):
    assert options.fused_names == FUSED and replace(options, attention="sdpa").fused_names == ()
    assert replace(options, fused="norm,optimizer").model_fused == ("norm",)
    model = GPT2(GPT2Config(vocab_size=9, n_embd=8, n_head=2, n_layer=1))
    assert type(optim.make_optimizer(model, lr=1e-3)) is torch.optim.AdamW
    assert type(optim.make_optimizer(model, lr=1e-3, ours=True)) is fastattn.optim.AdamW


@pytest.mark.parametrize("ours", [False, True])
def test_clipping_gives_the_norm_and_refuses_one_that_is_not_finite(ours):
    weight = torch.nn.Linear(2, 1, bias=False)
    optimizer = optim.make_optimizer(weight, lr=1.0, weight_decay=0.0, ours=ours)
    weight.weight.grad = torch.tensor([[3.0, 4.0]])
    assert optim.clip_and_step(weight, optimizer, math.inf) == pytest.approx(5.0)
    weight.weight.grad[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match="got gradient norm inf"):
        optim.clip_and_step(weight, optimizer, 1.0)


def test_a_run_that_ends_in_the_middle_goes_on_exactly(options, monkeypatch):
    whole = train(replace(options, accumulate=2))
    broken = replace(options, accumulate=2, out=options.out + "-broken")
    step = progress.Progress.step

    def fail(self, done, **values):
        step(self, done, **values)
        if done == 7:
            raise RuntimeError("the machine is gone")

    monkeypatch.setattr(progress.Progress, "step", fail)
    with pytest.raises(RuntimeError, match="gone"):
        train(broken)
    monkeypatch.undo()
    assert read_state(latest_run(Path(broken.out) / "checkpoints"))["step"] == 4
    resumed = train(replace(broken, resume=True))

    assert resumed.step == 10 and not resumed.interrupted
    assert losses(broken.out) == losses(options.out)
    assert resumed.validation_loss == whole.validation_loss
    expected, given = weights(whole.checkpoint), weights(resumed.checkpoint)
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())


def start(options: Options, **environment: str) -> subprocess.Popen[str]:
    words = [
        word
        for name in (
            *("size", "data", "tokenizer", "context", "batch", "steps", "dtype", "device", "save_every"),
            *("out", "eval_every"),
        )
        for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ]
    command = [sys.executable, "-m", "fastattn", "train", *words, *(["--resume"] if options.resume else [])]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        command,
        env=os.environ | threads | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_for_step(process: subprocess.Popen[str], out: str, step: int) -> None:
    path, end = Path(out) / "log.jsonl", time.monotonic() + 120
    while not (path.is_file() and f'"step": {step},' in path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no progress in two minutes"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_losses_of_one_that_was_not(options):
    options = replace(options, steps=40, save_every=3, eval_every=0)
    process = start(options)
    wait_for_step(process, options.out, 14)
    process.kill()
    process.communicate()
    reached = max(losses_of_torn_log(options.out))
    saved = read_state(latest_run(Path(options.out) / "checkpoints"))["step"]
    assert reached - saved <= 2 * options.save_every, (
        "no more is lost than the steps since the last checkpoint"
    )

    train(replace(options, resume=True))
    train(replace(options, out=options.out + "-whole"))
    assert losses(options.out) == losses(options.out + "-whole")


def losses_of_torn_log(out: str) -> list[int]:
    """Steps a killed run logged; its last line may be torn."""
    steps = []
    for line in (Path(out) / "log.jsonl").read_text().split("\n")[:-1]:
        event = json.loads(line)
        if event["event"] == "step":
            steps.append(event["step"])
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(options, number):
    options = replace(options, steps=100_000, save_every=100_000, eval_every=0)
    process = start(options)
    wait_for_step(process, options.out, 2)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted; --resume goes on" in out and "Traceback" not in errors
    folder = latest_run(Path(options.out) / "checkpoints")
    done = read_state(folder)["step"]
    assert done == max(losses(options.out)) >= 2
    assert load_model(folder)(torch.zeros(1, 1, dtype=torch.int64)).shape == (1, 1, 257)


@pytest.mark.parametrize("dies_at", range(1, 13))
def test_dying_at_any_point_of_a_save_leaves_a_whole_checkpoint(dies_at, tmp_path, monkeypatch):
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = GPT2(config)
    optimizer = optim.make_optimizer(model, lr=1e-2)

    def advance() -> None:
        model.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
        optimizer.step()

    advance()
    checkpoint.save_run(tmp_path, model, optimizer, {"step": 1}, keep=1)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    advance()

    calls = 0

    def dying(function):
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == dies_at:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return called

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_flush", dying(checkpoint._flush))
        patch.setattr(checkpoint, "_save_tensors", dying(checkpoint._save_tensors))
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr(Path, "replace", dying(Path.replace))
        try:
            checkpoint.save_run(tmp_path, model, optimizer, {"step": 2}, keep=1)
        except KeyboardInterrupt:
            pass
        else:
            pytest.fail(f"expected more than {calls} points to die at")

    folder = checkpoint.latest_run(tmp_path)
    step = checkpoint.read_state(folder)["step"]
    expected = first if step == 1 else model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())

    again = checkpoint.save_run(tmp_path, model, optimizer, {"step": 2}, keep=1)
    assert checkpoint.latest_run(tmp_path) == again
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights(again).items())
    assert {path.name for path in tmp_path.iterdir()} <= {"latest", "step-00000001", "step-00000002"}


def test_old_checkpoints_go_and_the_optimizer_comes_back(options):
    train(replace(options, steps=9, save_every=2, keep=3))
    folder = Path(options.out) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "latest",
        "step-00000006",
        "step-00000008",
        "step-00000009",
    ]
    model = load_model(folder / "step-00000008")
    optimizer = optim.make_optimizer(model, lr=1.0)
    checkpoint.load_optimizer(folder / "step-00000008", model, optimizer)
    state = optimizer.state[model.transformer.h[0].attn.c_attn.weight]
    assert float(state["step"]) == 8 and state["exp_avg"].shape == (128, 384)
    other = GPT2(GPT2Config(vocab_size=257, n_embd=128, n_layer=1, n_head=4))
    with pytest.raises(ValueError, match="expected the state of"):
        checkpoint.load_optimizer(folder / "step-00000008", other, optim.make_optimizer(other, lr=1.0))


def test_steps_by_pieces_is_the_mean_of_their_gradients(options, text):
    options = replace(options, accumulate=3, dropout=0.0, clip=0.0).resolved()
    corpus = load_tokens(text, "bytes")
    batches = Batches(corpus, options.batch, options.context, options.seed)
    torch.manual_seed(0)
    model = GPT2(replace(GPT2Config(n_embd=32, n_layer=1, n_head=2).with_dropout(0.0), vocab_size=257))
    trainer = training._Trainer(model, options, torch.float32, corpus, batches)
    loss = trainer.gradients(step=2)
    summed = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    x, y = (torch.cat(parts) for parts in zip(*(batches.at(i) for i in (6, 7, 8)), strict=True))
    whole = model.loss(x, y)
    whole.backward()
    assert loss == pytest.approx(float(whole.detach()), rel=1e-6)
    for ours, parameter in zip(summed, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def test_less_memory_changes_no_loss(options):
    train(options)
    train(
        replace(options, gradient_checkpointing=True, loss_chunk=20, out=options.out + "-less"),
    )
    expected = losses(options.out)
    for step, loss in losses(options.out + "-less").items():
        assert loss == pytest.approx(expected[step], rel=1e-4)


def test_starts_from_a_checkpoint_and_keeps_its_dropout(options):
    first = train(replace(options, dropout=0.2))
    assert first.checkpoint is not None
    second = train(
        replace(
            options,
            size=None,
            init=str(first.checkpoint),
            steps=1,
            eval_every=1,
            lr=0.0,
            out=options.out + "2",
        )
    )
    assert second.validation_loss == first.validation_loss
    assert load_model(second.checkpoint).config.attn_pdrop == 0.2
    assert losses(options.out + "2")[1] < losses(options.out)[1]


def test_context_beyond_the_published_positions_from_scratch(options, tmp_path):
    (tmp_path / "long.txt").write_text("word " * 700)
    result = train(replace(options, data=str(tmp_path / "long.txt"), context=1500, batch=1, steps=1))
    assert load_model(result.checkpoint).config.n_positions == 1500
    log = (Path(options.out) / "log.jsonl").read_text()
    assert '"event": "validation"' in log, (
        "held-out text shorter than the context is measured at its own length"
    )


def test_a_sample_and_the_plan_are_printed(options, capsys):
    train(replace(options, steps=1, eval_every=0, sample="import ", sample_tokens=5))
    out = capsys.readouterr().out
    for part in (
        "parameters",
        "tokens per parameter",
        "FLOPs",
        "GiB expected",
        "a step, measured",
        "import ",
    ):
        assert part in out


def test_a_dry_run_writes_nothing(options):
    result = train(replace(options, dry_run=True))
    assert result.step == 0 and result.checkpoint is None and not Path(options.out).exists()


def test_bfloat16_autocast_trains(options):
    train(replace(options, dtype="bfloat16", steps=12, eval_every=0))
    values = losses(options.out)
    assert values[12] < 0.9 * values[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 32}, "context: expected 33, .* got 32"),
        ({"seed": 9}, "seed: expected 1, .* got 9"),
        ({"dropout": 0.3}, r"dropout: expected None, .* got 0\.3"),
        ({"resume": False}, "holds a run already; go on with --resume"),
    ],
)
def test_a_run_resumes_only_as_what_it_was(options, change, message):
    train(replace(options, steps=1, eval_every=0))
    with pytest.raises(ValueError, match=message):
        train(replace(options, **({"resume": True} | change)))


def test_a_run_does_not_resume_on_changed_text(options, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc " * 100)
    train(replace(options, data=str(path), steps=1, eval_every=0))
    path.write_text("abd " * 100)
    with pytest.raises(ValueError, match="another or has changed"):
        train(replace(options, data=str(path), resume=True))


def test_a_run_resumes_on_the_same_text_and_size_by_other_names(options, tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("abc " * 100)
    monkeypatch.setitem(config._ALIASES, "little", "tiny")
    train(replace(options, data=str(path), size="little", steps=1, eval_every=0))
    state = latest_run(Path(options.out) / "checkpoints") / "state.json"
    assert '"size": "tiny"' in state.read_text()
    state.write_text(state.read_text().replace('"size": "tiny"', '"size": "little"'))  # as once written
    monkeypatch.chdir(tmp_path)
    again = replace(options, data="text.txt", size="tiny", steps=2, eval_every=0, resume=True)
    assert train(again).step == 2
    assert train(replace(again, size="little", steps=3)).step == 3
    with pytest.raises(ValueError, match=r"size: expected 'tiny', .* got 'mini'"):
        train(replace(again, size="mini"))


def test_a_run_may_be_made_longer_or_found_done(options, capsys):
    train(replace(options, steps=3, eval_every=0))
    done = train(replace(options, steps=3, eval_every=0, resume=True))
    assert done.step == 3 and not done.interrupted and done.loss is None
    assert train(replace(options, steps=5, eval_every=0, resume=True)).step == 5
    assert sorted(losses(options.out)) == [1, 2, 3, 4, 5]
    assert "; changed: steps 3 → 5\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"lr": -1.0}, "lr: expected at least 0, got -1.0"),
        ({"lr": math.nan}, "lr: expected at least 0, got nan"),
        ({"dtype": "float16"}, "dtype: expected auto, float32 or bfloat16, got 'float16'"),
        ({"init": "folder"}, "one of size and init, got 'tiny' and 'folder'"),
        ({"attention": "flash"}, "attention: expected one of .* got 'flash'"),
        ({"fused": "norm,flash"}, "fused: expected all, none or some of .* got 'norm,flash'"),
        ({"size": "huge"}, "size: expected one of .* got 'huge'"),
        ({"dropout": 1.0}, r"^dropout: expected a probability in \[0, 1\), got 1\.0"),
        ({"dropout": 1.5}, r"^dropout: expected a probability in \[0, 1\), got 1\.5"),
        ({"device": "foo"}, "^device: expected cpu, cuda or cuda:N, got 'foo'"),
        ({"device": "mps"}, "^device: expected cpu, cuda or cuda:N, got 'mps'"),
        ({"device": "cuda:99"}, "^device: expected a GPU .* got 'cuda:99'"),
        ({"context": 100_000}, "context: expected at most .* got 100000"),
    ],
)
def test_bad_options_are_told(options, change, message):
    with pytest.raises(ValueError, match=message):
        train(replace(options, **change))


def test_a_checkpoint_that_does_not_fit_the_data_is_told(options, tmp_path):
    checkpoint.save_model(GPT2(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=1)), tmp_path / "a")
    with pytest.raises(ValueError, match="vocabulary of 257 or more, got 100"):
        train(replace(options, size=None, init=str(tmp_path / "a")))
    config = GPT2Config(vocab_size=300, n_positions=32, n_embd=8, n_layer=1, n_head=1)
    checkpoint.save_model(GPT2(config), tmp_path / "b")
    with pytest.raises(ValueError, match=r"context: expected at most 32, .* got 33"):
        train(replace(options, size=None, init=str(tmp_path / "b")))


def test_a_loss_that_is_not_finite_ends_the_run_before_it_spoils_the_weights(options):
    with pytest.raises(FloatingPointError, match="expected a finite loss and gradient"):
        train(replace(options, lr=1e30, warmup=0, clip=0.0, save_every=1, steps=50))
    saved = latest_run(Path(options.out) / "checkpoints")
    assert all(torch.isfinite(tensor).all() for tensor in weights(saved).values())


def test_command_line(options, text, capsys):
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    words = ["--data", str(text), "--tokenizer", "bytes", "--size", "tiny", "--steps", "1", "--context", "20"]
    args = parser.parse_args(
        [*words, "--out", options.out, "--dtype", "float32", "--eval-every", "0", "--sample"]
    )
    assert args.sample == "\n" and args.batch == 4 and args.lr is None
    assert training.run(args) == 0
    assert training.run(args) == 1
    assert "fastattn train: out: " in capsys.readouterr().err


def test_a_system_without_resource_trains(options, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(os, "sysconf")
    read = Path.read_text

    def read_text(path: Path, *rest: Any, **named: Any) -> str:
        if str(path) == "/proc/meminfo":
            raise FileNotFoundError(path)
        return read(path, *rest, **named)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert plan.peak_memory("cpu") is None and plan.available_memory("cpu") is None
    train(replace(options, steps=1, eval_every=0))
    said = capsys.readouterr().out
    assert "expected, unknown what is available" in said and "tokens/s  0:00 left" in said


def test_learning_rate_warms_up_and_falls_to_its_floor():
    rates = [optim.learning_rate(s, peak=2.0, warmup=10, steps=100, floor=0.1) for s in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[-1] == pytest.approx(0.2) and all(a >= b for a, b in pairwise(rates[9:]))


def test_biases_and_norms_do_not_decay():
    model = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    decayed, others = optim.parameter_groups(model, 0.1)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0


def test_a_torn_last_line_of_the_log_stays_by_itself(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "step", "step": 1}\n{"event": "st')
    with progress.Progress(tmp_path, steps=3, done=1) as reports:
        reports.record("step", step=2)
    lines = (tmp_path / "log.jsonl").read_text().split("\n")
    assert lines[1] == '{"event": "st' and json.loads(lines[2])["step"] == 2


def test_a_terminal_gets_a_live_bar(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with progress.Progress(tmp_path, steps=2) as reports:
        assert reports._bar is not None
        reports.step(1, loss=1.5, lr=0.1, grad_norm=1.0, seconds=2.0, tokens=10, memory=2**30)
        reports.say("a line [not markup]")
        text = reports._bar.tasks[0].fields["info"]
    assert text == "loss 1.5000  5 tokens/s  1.00 GiB  0:02 left"
    assert "a line [not markup]" in capsys.readouterr().out
