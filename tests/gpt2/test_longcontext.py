"""`fastattn longcontext`: what a search tries and finds, its options, and real processes on a small model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fastattn.gpt2 import longcontext
from fastattn.gpt2.longcontext.result import times_longer, verdict
from fastattn.gpt2.longcontext.search import Found, Point, above, fit, grain, longest_within, on_grid, search
from fastattn.gpt2.longcontext.settings import Settings, memory_size, settings_of
from fastattn.gpt2.longcontext.worker import Trainer
from fastattn.gpt2.model import GPT2

GB = 10**9


def probe_of(a: float, b: float, c: float, budget: int, tried: list[int]) -> Callable[[int], Point]:
    """A step that holds a + b T + c T² bytes and takes a microsecond for each byte beyond a."""

    def probe(context: int) -> Point:
        tried.append(context)
        peak = int(a + b * context + c * context**2)
        if peak > budget:
            return Point(context, "out of memory", None, budget, None, "too much")
        return Point(context, "trained", (peak - a) / 1e6, peak, 1.0)

    return probe


# (bytes a token, bytes a pair of tokens): the activations of GPT-2 124M, and a standard attention beside them
@pytest.mark.parametrize("b, c", [(600e3, 1500.0), (600e3, 0.0), (150e3, 0.0), (1e9, 0.0), (0.0, 9000.0)])
def test_a_search_finds_the_edge_in_few_steps(b: float, c: float) -> None:
    budget, tried = 16 * 2**30, []
    found = Found(budget, 131_072)
    search(probe_of(2.5e9, b, c, budget, tried), found, 512, lambda: 1e9)
    edge = max(
        (t for t in map(on_grid, range(64, 131_073, 64)) if 2.5e9 + b * t + c * t * t <= budget), default=0
    )
    assert (found.longest.context if found.longest else 0) == edge
    assert found.edge == ("run" if edge else "none")
    assert len(tried) <= 9 and len(set(tried)) == len(tried)


def test_what_does_not_follow_the_fit_is_halved_down() -> None:
    def probe(context: int) -> Point:  # a wall that no fit sees coming
        if context > 5000:
            return Point(context, "out of memory", None, GB, None, "a wall")
        return Point(context, "trained", 1.0, 1000 * context, 1.0)

    found = search(probe, Found(GB, 100_000), 512, lambda: 1e9)
    assert found.longest is not None and found.refused is not None
    assert found.longest.context <= 5000 < found.refused.context == above(found.longest.context)


def test_short_of_time_the_longest_affordable_is_run_and_the_edge_is_only_predicted() -> None:
    budget, tried = 16 * 2**30, []
    found = Found(budget, 131_072)
    # a microsecond a byte: the edge would take 14,700 ms
    search(probe_of(2.5e9, 600e3, 0, budget, tried), found, 512, lambda: 6.0)
    assert found.longest is not None
    assert 9_000 <= found.longest.context <= 10_000
    assert found.edge == "extrapolated"
    assert found.predicted == on_grid((budget - 2.5e9) / 600e3)
    assert found.points[-1].status == "not run (time)"


def test_the_search_ends_at_the_longest_asked_for_and_at_a_failure() -> None:
    tried: list[int] = []
    found = search(probe_of(0, 1, 0, GB, tried), Found(GB, 4096), 512, lambda: 1e9)
    assert found.edge == "run" and found.longest is not None and found.longest.context == 4096

    # what is asked for need not be on the grid: 49,152 is the last context below 50,000
    found = search(probe_of(0, 1, 0, GB, tried), Found(GB, 50_000), 512, lambda: 1e9)
    assert found.edge == "run" and found.longest is not None and found.longest.context == 49_152

    found = search(lambda t: Point(t, "failed", reason="why"), Found(GB, 4096), 512, lambda: 1e9)
    assert found.edge == "none" and len(found.points) == 1


def test_the_grid_has_sixteen_steps_an_octave() -> None:
    context, steps = 2048, []
    while context < 4096:
        steps.append(context)
        context = above(context)
    assert len(steps) == 16 and context == 4096
    assert all(on_grid(t) == t and on_grid(t + grain(t) - 1) == t for t in steps)
    assert on_grid(63) == 0


def test_the_fit_is_of_measured_peaks() -> None:
    a, b, c = fit({512: 1e9 + 3e5 * 512, 1024: 1e9 + 3e5 * 1024, 2048: 1e9 + 3e5 * 2048})
    assert (a, b) == (pytest.approx(1e9), pytest.approx(3e5))
    assert c == pytest.approx(0.0, abs=1e-3)
    assert longest_within({1: 5.0, 2: 5.0, 3: 5.0}, 4.0, 99) == 0
    with pytest.raises(ValueError, match="at least 3"):
        fit({1: 1.0, 2: 2.0})


def parse(*words: str) -> Settings:
    parser = argparse.ArgumentParser()
    longcontext.add_arguments(parser)
    return settings_of(parser.parse_args(words))


def test_options() -> None:
    settings = parse("--model", "124M", "--memory", "12GB", "--max-context", "64k", "--device", "cpu")
    assert (settings.memory, settings.max_context, settings.first) == (12 * GB, 65536, 512)
    assert settings.implementations == ("standard", "sdpa", "fastattn", "fastattn+checkpoint")
    assert settings.config(4096).n_positions == 4096 and settings.config(64).n_positions == 1024
    assert memory_size("1.5") == 3 * 2**29
    with pytest.raises(argparse.ArgumentTypeError, match="16GiB"):
        memory_size("plenty")
    for words, message in [
        (("--implementations", "flash"), "expected some of"),
        (("--implementations", "sdpa,sdpa"), "each once"),
        (("--dropout", "1"), "probability"),
        (("--minutes", "0"), "more than 0"),
        (("--model", "gpt5"), "expected one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse(*words)


@pytest.mark.parametrize(
    "words, message",
    [(("--quality", "--memory", "8GiB"), "without --quality"), (("--width", "64"), "with --quality")],
)
def test_an_option_that_would_change_nothing_is_refused(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    longcontext.add_arguments(parser)
    assert longcontext.run(parser.parse_args(words)) == 2
    assert f"expected {message} alone" in capsys.readouterr().err


def test_a_ratio_needs_a_baseline_that_was_run_to_its_edge() -> None:
    rows = {
        "standard": {"edge": "run", "longest": 1000},
        "fastattn": {"edge": "extrapolated", "longest": 8000},
    }
    assert times_longer({"implementations": rows}, "fastattn") == 8.0
    rows["standard"]["edge"] = "extrapolated"
    assert times_longer({"implementations": rows}, "fastattn") is None


def test_real_processes_and_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = tmp_path / "text.bin"
    ids = list(("Attention is a weighted mean of values. " * 20).encode())
    text.write_bytes(torch.tensor(ids, dtype=torch.uint16).numpy().tobytes())
    common = {"model": "tiny", "first": 64, "at": (), "data": str(text), "tokenizer": "bytes"}
    settings = Settings(**common, implementations=("fastattn+checkpoint",), max_context=128)
    assert longcontext.find(settings, tmp_path / "out") == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    row = result["implementations"]["fastattn+checkpoint"]
    assert (row["longest"], row["edge"]) == (128, "run")
    assert row["peak_bytes"] > row["model"]["model_bytes"] > 0 and row["ms"] > 0
    assert row["model"]["kernel"] == "cpu: fastattn_cpu::attention_forward"
    assert "dropout 0.1" in result["verdict"]
    assert [point["context"] for point in result["points"]] == [64, 128]
    page = (tmp_path / "out" / "longcontext.md").read_text()
    assert result["verdict"] in page and "128" in capsys.readouterr().out

    # not even the libraries fit: a result, not a crash
    settings = Settings(**common, implementations=("standard",), max_context=64, memory=50 * 2**20)
    assert longcontext.find(settings, tmp_path / "none") == 1
    result = json.loads((tmp_path / "none" / "result.json").read_text())
    assert {point["status"] for point in result["points"]} == {"out of memory"}
    assert result["implementations"]["standard"]["longest"] is None


@pytest.mark.parametrize("dropout, kernel", [(0.0, "sdpa:flash"), (0.1, "sdpa:math")])
def test_the_kernel_is_what_ran(dropout: float, kernel: str, tmp_path: Path) -> None:
    """Of torch's sdpa, which by the dropout is one that holds the L×L matrix or one that does not."""
    settings = Settings(model="tiny", implementations=("sdpa",), dropout=dropout)
    path = tmp_path / "x.pt"
    torch.save(torch.zeros(1, 97, dtype=torch.int64), path)
    command = {"context": 96, "config": asdict(settings.config(96)), "x": str(path)}
    answer = Trainer(settings.worker_spec("sdpa", None)).train(command)
    assert answer["kernel"] == kernel
    summary = {"edge": "run", "longest": 96, "refused": 128, "model": answer}
    title = {"title": "GPT-2 of size tiny"}
    found = {"settings": settings.record(), "model": title, "implementations": {"sdpa": summary}}
    assert f"dropout {dropout:g}: " in verdict(found) and f"sdpa 96 ({kernel})" in verdict(found)


def test_a_text_that_is_too_short_says_so(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("short")
    settings = Settings(model="tiny", implementations=("sdpa",), data=str(text), tokenizer="bytes", at=())
    assert longcontext.find(settings, tmp_path / "out") == 1
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert "expected at most" in result["points"][0]["reason"]


def test_positions_of_the_model_follow_the_context() -> None:
    settings = parse("--positions", "rotary", "--model", "tiny", "--device", "cpu")
    with torch.device("meta"):
        model = GPT2(settings.config(2048))
    assert model.transformer.wpe is None and model.transformer.cos.shape == (2048, 16)
