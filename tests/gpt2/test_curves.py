"""Whole training runs on a small model: their curves, `longcontext --quality` and `compare training`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.gpt2 import curves, equivalence, longcontext, spread
from fastattn.gpt2.config import GPT2Config
from fastattn.gpt2.curves import Recipe, Run, held_out_losses, held_out_windows
from fastattn.gpt2.data import Corpus, load_tokens
from fastattn.gpt2.longcontext import quality
from fastattn.gpt2.optim import make_optimizer
from fastattn.ops.attention import attention
from fastattn.optim import AdamW
from fastattn.testing import force_isa

SMALL = GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2).with_dropout(0.0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"Attention, number {i}, is a weighted mean of values. " * 12)
    return folder


@pytest.fixture
def corpus(text: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    monkeypatch.setenv("FASTATTN_CACHE", str(text.parent / "cache"))
    return load_tokens(text, "bytes", validation=0.4)


def test_held_out_windows_have_the_same_targets_at_every_context(corpus: Corpus) -> None:
    short, long = (held_out_windows(corpus, context, 128) for context in (32, 128))
    assert torch.equal(short[:, 1:].flatten(), long[:, 1:].flatten())
    assert torch.equal(short[:, 0], long[:, :-1].unflatten(1, (4, 32))[:, :, 0].flatten())
    assert len(held_out_windows(corpus, 32, 128, most=3)) == 3 * 128 // 32
    two = held_out_windows(corpus, 64, 64, most=2)  # one of each document, which have nine
    for window, document in zip(two, corpus.validation_documents, strict=True):
        assert any(torch.equal(window, piece) for piece in document.long().unfold(0, 65, 64))
    with pytest.raises(ValueError, match="multiple of the context 48"):
        held_out_windows(corpus, 48, 128)
    with pytest.raises(ValueError, match="longest held-out document"):
        held_out_windows(corpus, 32, 32768)


def test_a_run_learns_and_is_decided_by_its_seed(corpus: Corpus) -> None:
    windows = held_out_windows(corpus, 32, 32)[:4]
    recipe = Recipe(SMALL.with_dropout(0.1), 32, 4, 12, lr=1e-2, evaluations=3)
    first, again, other = (Run(recipe, "fastattn", seed, corpus, windows) for seed in (1, 1, 2))
    untrained = sum(held_out_losses(first.model, windows, recipe))
    said: list[str] = []
    curve = first.finish(said.append)
    assert sorted(curve.held_out) == [4, 8, 12] and len(said) == 3
    assert curve.held_out[12] < curve.held_out[4] < untrained
    assert again.finish(said.append).losses == curve.losses
    assert other.finish(said.append).losses != curve.losses
    assert first.model.training


def test_implementations_start_and_go_alike(corpus: Corpus) -> None:
    windows = held_out_windows(corpus, 32, 32)[:4]
    recipe = Recipe(SMALL, 32, 2, 4, lr=1e-3, evaluations=1)
    losses = {}
    for name in ("standard", "fastattn"):
        losses[name] = torch.tensor(Run(recipe, name, 1, corpus, windows).finish(lambda _: None).losses)
    torch.testing.assert_close(losses["fastattn"], losses["standard"], rtol=1e-5, atol=1e-5)


def test_quality_trains_each_context_on_the_same_tokens(
    text: Path, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    longcontext.add_arguments(parser)
    words = ["--quality", "--contexts", "32,64,128", "--layers", "1", "--heads", "2", "--width", "16"]
    words += ["--data", str(text), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert longcontext.run(parser.parse_args([*words, "--tokens", "1024"])) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [(row["context"], row["tokens"], row["steps"]) for row in result["rows"]] == [
        (32, 1024, 8),
        (64, 1024, 8),
        (128, 1024, 8),
    ]
    assert all(row["finished"] and len(row["held_out"]) == 8 for row in result["rows"])
    assert (tmp_path / "out" / "quality.png").stat().st_size > 1000
    page, printed = (tmp_path / "out" / "quality.md").read_text(), capsys.readouterr().out
    assert result["verdict"] in page and result["verdict"] in printed
    assert f"{result['rows'][1]['held_out_loss']:.4f}" in page
    for row in result["rows"]:  # the same stretches at each context
        assert len(row["parts"]) == len(result["rows"][0]["parts"]) > 1
        assert sum(row["parts"]) / len(row["parts"]) == pytest.approx(row["held_out_loss"])
    assert len(result["differences"]) == 3

    assert longcontext.run(parser.parse_args([*words[:2], "32,48", *words[3:]])) == 2
    assert "divisors of the longest" in capsys.readouterr().err


def test_quality_chooses_its_steps_by_the_minutes(corpus: Corpus) -> None:
    settings = quality.Settings(contexts=(32, 64), layers=1, heads=2, width=16, held_out=3)
    windows = {c: held_out_windows(corpus, c, 64, settings.held_out) for c in settings.contexts}
    said: list[str] = []
    step, evaluation = quality.probe(settings, corpus, windows, said.append)
    assert step > 0 and evaluation > 0
    assert len(said) == 2 and all("tokens/s" in text and "held-out" in text for text in said)


@pytest.mark.parametrize("step, evaluation", [(1.0, 0.1), (1.0, 10.0), (1.0, 100.0), (50.0, 20.0)])
def test_held_out_losses_are_within_the_minutes_too(step: float, evaluation: float) -> None:
    steps, evaluations = quality.plan(1000.0, step, evaluation)
    assert 800 < steps * step + evaluations * evaluation <= 950
    assert evaluations == min(8, max(1, int(100 / evaluation)))


def quality_row(context: int, parts: list[float], *, finished: bool = True) -> dict[str, Any]:
    mean = sum(parts) / len(parts)
    return {
        "context": context,
        "tokens": 10**6,
        "held_out_loss": mean,
        "parts": parts,
        "finished": finished,
    }


def test_a_context_is_below_another_only_beyond_the_spread_of_stretches() -> None:
    # stretches differ a lot, the contexts on each of them little: pairs tell what means would not
    base = [1.2, 1.8, 1.5, 1.1]
    better = [x - d for x, d in zip(base, [0.05, 0.06, 0.05, 0.04], strict=True)]
    same = [x + d for x, d in zip(base, [0.05, -0.06, 0.05, -0.03], strict=True)]
    rows = [quality_row(256, base), quality_row(1024, better), quality_row(4096, same)]
    rows.append(quality_row(16_384, [9.0] * 4, finished=False))
    found = quality.differences(rows)
    assert [(one["contexts"], one["beyond"]) for one in found] == [
        ((256, 1024), True),
        ((256, 4096), False),
        ((1024, 4096), False),
    ]
    assert found[0]["difference"] == pytest.approx(-0.05)
    assert found[0]["standard_error"] == pytest.approx((2e-4 / 3 / 4) ** 0.5)
    text = quality.verdict(rows, found, seed=1)
    assert "1,024 is below 256 by 0.050 ± 0.004" in text and "4 held-out stretches" in text
    assert "Not told apart: 256 and 4,096" in text and "one seed, 1" in text and "16,384" not in text

    alone = [quality_row(256, [1.5]), quality_row(1024, [1.4])]
    assert quality.differences(alone) == []
    assert "one stretch" in quality.verdict(alone, [], seed=1)
    assert "nothing to compare" in quality.verdict(alone[:1], [], seed=1)


Compare = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def compare(text: Path, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """`fastattn compare training` of a small model without dropout: its status, and its result.json."""
    monkeypatch.setattr(equivalence, "config_of", lambda size: SMALL)
    parser = argparse.ArgumentParser()
    equivalence.add_arguments(parser)
    words = ["--context", "32", "--batch", "2", "--steps", "6", "--evaluations", "2", "--dropout", "0"]
    words += ["--data", str(text), "--device", "cpu", "--out", str(tmp_path / "out"), "--held-out", "8"]

    def run(*more: str) -> tuple[int, dict[str, Any]]:
        with force_isa("scalar"):
            status = equivalence.run(parser.parse_args([*words, *more]))
        return status, json.loads((tmp_path / "out" / "result.json").read_text())

    return run


# Without dropout only rounding is between the two: a margin far below what the broken ones below do.
ROUNDING = "1e-5"


def test_compare_training_finds_ours_equivalent(
    compare: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = compare("--margin", ROUNDING)
    assert (status, result["outcome"]) == (0, "equivalent")
    assert [(one["seed"], one["implementation"]) for one in result["runs"]] == [
        (seed, name) for seed in (1, 2, 3) for name in ("standard", "fastattn")
    ]
    assert result["last"]["spread"] > 100 * float(ROUNDING)  # seeds differ, their pairs do not
    assert (tmp_path / "out" / "training.png").stat().st_size > 1000
    page, printed = (tmp_path / "out" / "training.md").read_text(), capsys.readouterr().out
    assert result["verdict"] in page and result["verdict"] in printed
    assert result["verdict"].startswith("Equivalent")


def test_compare_training_tells_a_broken_attention(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = 1.1 * (SMALL.n_embd // SMALL.n_head) ** -0.5
    monkeypatch.setattr("fastattn.gpt2.model.tiled_attention", partial(attention, scale=scale))
    status, result = compare("--margin", ROUNDING)
    assert status == 1 and result["outcome"] != "equivalent"
    assert not result["verdict"].startswith("Equivalent")


def test_compare_training_tells_a_broken_optimizer(compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(parameters: Any, *, ours: bool, lr: float) -> torch.optim.AdamW:
        return make_optimizer(parameters, lr=lr, ours=ours, betas=(0.8, 0.95) if ours else (0.9, 0.95))

    monkeypatch.setattr(curves, "make_optimizer", slow)
    status, result = compare("--margin", ROUNDING)
    assert (status, result["outcome"]) == (1, "different")
    assert result["verdict"].startswith("DIFFERENT")


def test_a_seed_with_which_one_alone_diverges_is_a_difference(
    compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(self: Run) -> float:
        if self.seed == 2 and isinstance(self.optimizer, AdamW):
            raise FloatingPointError("expected a finite gradient, got gradient norm nan")
        return step(self)

    step = Run.step
    monkeypatch.setattr(Run, "step", diverge)
    status, result = compare()
    assert (status, result["outcome"]) == (1, "different")
    assert result["failed"] == [
        {
            "implementation": "fastattn",
            "seed": 2,
            "reason": "step 1: expected a finite gradient, got gradient norm nan",
        }
    ]
    assert "fastattn, seed 2: step 1" in result["verdict"] and result["last"]["pairs"] == 2


@pytest.mark.parametrize("words, message", [(("--seeds", "1"), "at least 2"), (("--margin", "0"), "margin")])
def test_options_of_compare_training(
    words: tuple[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    equivalence.add_arguments(parser)
    assert equivalence.run(parser.parse_args([*words, "--device", "cpu"])) == 2
    assert message in capsys.readouterr().err


def test_pairs_are_compared_with_a_margin() -> None:
    # by hand: differences 0.01, 0.02, 0.03: mean 0.02, standard error 0.01 / sqrt(3)
    base = [1.0, 2.0, 3.0]
    found = equivalence.compare(base, [1.01, 2.02, 3.03], margin=0.05)
    assert found["difference"] == pytest.approx(0.02)
    assert found["half_width"] == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert found["outcome"] == "equivalent" and found["spread"] == pytest.approx(1.0)
    outcomes = [
        equivalence.compare(base, [1.01, 2.02, 3.03], margin=margin)["outcome"] for margin in (0.044, 0.046)
    ]
    assert outcomes == ["not decided", "equivalent"]
    assert equivalence.compare(base, [1.1, 2.1, 3.11], margin=0.01)["outcome"] == "different"


def test_students_points_are_those_of_the_tables() -> None:
    points = [spread.student(freedom) for freedom in (1, 2, 3, 10, 30)]
    assert points == pytest.approx([12.706, 4.303, 3.182, 2.228, 2.042], abs=6e-4)
    points = [spread.student(freedom, 0.99) for freedom in (1, 4, 7)]
    assert points == pytest.approx([63.657, 4.604, 3.499], abs=6e-4)
    assert spread.student(10_000) == pytest.approx(1.96, abs=1e-3)
    with pytest.raises(ValueError, match="freedom of at least 1"):
        spread.student(0)
