"""What `fastattn report` makes of rows: who is compared with whom, and how it is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from fastattn.gpu_check.peers import Case
from fastattn.report import figures, rows, sections, tables
from fastattn.report.look import look_of
from tests.report.measured import attention, begin, ceilings, gpu_check, step

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
NATIVE = {"fastattn": "avx512", "sdpa default": "avx512"}
HELD = {"fastattn": "avx2", "sdpa default": "default"}


def ratios(found: Sequence[rows.Row]) -> dict[tuple[str, str], float]:
    """By our machine's instruction set and the peer."""
    return {(ours.machine.isa, peer.implementation): ratio for ours, peer, ratio in rows.speedups(found)}


def test_times_are_compared_within_a_race_alone(tmp_path: Path) -> None:
    run = begin(tmp_path)
    attention(run, {"fastattn": 72.7, "sdpa default": 165.6, "naive": 400.0}, length=1024)
    attention(run, {"fastattn": 20.0, "sdpa default": 50.0}, length=1024)
    attention(run, {"fastattn": 30.0}, length=2048)
    attention(run, {"sdpa default": 90.0}, length=2048)
    run.close()
    found = rows.read_folder(tmp_path).rows
    assert [(peer.name, ratio) for _, peer, ratio in rows.speedups(found)] == [("sdpa default (flash)", 2.5)]
    # without a race's number nothing is
    alone = begin(tmp_path / "alone")
    attention(alone, {"fastattn": 20.0, "sdpa default": 50.0}, length=1024)
    alone.close()
    file = next((tmp_path / "alone").glob("*.csv"))
    file.write_text(
        file.read_text().replace(",fastattn,1,", ",fastattn,,").replace("default,1,", "default,,")
    )
    found = rows.read_folder(tmp_path / "alone").rows
    assert len(rows.latest(found)) == 2 and rows.speedups(found) == []


def test_runs_of_other_instruction_sets_threads_and_devices_stand_beside_each_other(tmp_path: Path) -> None:
    for common, isa, ms in (
        ({}, NATIVE, 10.0),
        ({}, HELD, 20.0),
        ({"threads": 64}, NATIVE, 1.0),
        ({"device": "cuda", "processor": "A GPU"}, NATIVE, 0.1),
        ({}, NATIVE, 11.0),  # of the first the last
    ):
        run = begin(tmp_path, **common)
        attention(run, {"fastattn": ms, "sdpa default": 3 * ms}, length=1024, isa=isa)
        run.close()
    found = rows.latest(rows.read_folder(tmp_path).rows)
    assert sorted(row.p50_ms or 0 for row in found if row.implementation == "fastattn") == [
        0.1,
        1.0,
        11.0,
        20.0,
    ]
    # a peer is where ours is, whatever torch calls its own instruction set
    machines = {row.machine for row in found}
    assert len(machines) == 4 and len(rows.speedups(found)) == 4


def test_the_last_of_many_runs_of_a_day_counts(tmp_path: Path) -> None:
    for i in range(11):
        run = begin(tmp_path, started="2026-01-02")
        attention(run, {"fastattn": 10.0 + i}, length=1024)
        run.close()
    (row,) = rows.latest(rows.read_folder(tmp_path).rows)
    assert row.p50_ms == 20.0


def test_no_panel_of_a_speed_plot_is_dropped(tmp_path: Path) -> None:
    run = begin(tmp_path)
    kinds = [
        (mask, dim) for mask in ("causal", "none", "window", "documents", "alibi") for dim in (32, 64, 128)
    ]
    for length in (512, 2048):
        for mask, dim in kinds:
            attention(run, {"fastattn": 10.0, "sdpa default": 25.0}, length=length, mask=mask, dim=dim)
    attention(run, {"fastattn": 10.0, "flex": 25.0}, length=4096)
    run.close()
    figure = figures.speed_by_length(rows.read_folder(tmp_path).rows)
    assert figure is not None
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert len(panels) == 15 and "12 heads of 64, window 512" in panels
    lines = panels["12 heads of 64, causal"].lines
    # who was measured at one length is a point there
    assert [list(line.get_xdata()) for line in lines] == [[4096], [512, 2048], [512, 2048, 4096]]


def test_speed_is_of_what_the_machine_is_short_of(tmp_path: Path) -> None:
    run = begin(tmp_path)
    run.ceilings = {"fma": 10_000.0, "copy": 1.0}
    for length in (512, 1024):
        attention(run, {"fastattn": 10.0}, length=length)
        attention(run, {"fastattn": 10.0}, length=length, dtype=torch.bfloat16)
    run.close()
    found = rows.read_folder(tmp_path).rows
    figure = figures.speed_by_length([row for row in found if row.dtype == "float32"])
    assert figure is not None and figure.axes[0].get_ylabel() == "GB/s"
    # of a CPU's float32 multiply-adds, what is in bfloat16 is no share
    run = begin(tmp_path / "more")
    run.ceilings = {"fma": 100.0}
    attention(run, {"fastattn": 10.0}, length=1024, dtype=torch.bfloat16)
    run.close()
    assert figures.share_of_ceiling(rows.read_folder(tmp_path / "more").rows) is None


def test_memory_of_different_problems_is_on_different_lines(tmp_path: Path) -> None:
    run = begin(tmp_path)
    for length in (1024, 2048):
        for mask, peak in (("causal", 1.0), ("dropout", 2.0), ("alibi", 3.0)):
            attention(run, {"fastattn": 1.0}, length=length, mask=mask, peak_mb=peak * length)
    attention(run, {"fastattn": 1.0}, length=1024, dtype=torch.bfloat16, peak_mb=7.0)
    run.close()
    parts = sections.sections(rows.read_folder(tmp_path))
    (picture,) = next(part for part in parts if part.name == "memory").pictures
    shown = {
        axes.get_title(): list(axes.lines[0].get_ydata())
        for axes in picture.figure.axes
        if axes.get_visible()
    }
    assert shown == {
        "12 heads of 64, causal": [1024, 2048],
        "12 heads of 64, causal, dropout 0.1": [2048, 4096],
        "12 heads of 64, causal, alibi": [3072, 6144],
    }


def test_a_training_step_has_its_tokens_and_its_share_of_the_machine(tmp_path: Path) -> None:
    run = begin(tmp_path)
    ceilings(run, fma=200.0)
    step(run, {"fastattn": 5000.0, "standard": 11000.0})
    step(run, {"fastattn": 16000.0, "standard": 44000.0}, batch=4)
    step(run, {"fastattn": 2500.0, "standard": 2400.0}, dtype="bfloat16")
    run.close()
    (tmp_path / "compare.json").write_text((RESULTS / "compare_gpt2_1024.json").read_text())
    found = rows.read_folder(tmp_path)
    table = tables.training(found.rows, found.results)
    ours = {(line[1], line[2]): line[5:] for line in table.lines if line[4] == "fastattn"}
    # 817e9 operations in 5 s of a ceiling of 200e9 a second
    assert ours == {
        ("1 × 1,024", "float32"): ["5.00", "205", "82 %", "5.00", "2.20×"],
        ("4 × 1,024", "float32"): ["16.00", "256", "102 %", "16.00", "2.75×"],
        ("1 × 1,024", "bfloat16"): ["2.50", "410", "", "2.50", "0.96×"],
    }
    compared = next(line for line in table.lines if line[4] == "attention")
    assert compared[0] == "GPT-2 124M, dropout 0.1 (compare)" and compared[6] == "156"
    figure = figures.training_steps(found.rows)
    assert figure is not None and len(figure.axes[0].patches) == 6


def test_a_headline_is_of_a_named_problem_against_its_fastest_peer(tmp_path: Path) -> None:
    run = begin(tmp_path, processor="A CPU", threads=2)
    times = {"fastattn": 10.0, "naive": 200.0, "sdpa default": 15.0, "flex": 40.0}
    attention(run, times, length=1024, isa=dict.fromkeys(times, "avx512"))
    # where we look better: shorter, masked, with dropout, in half precision, forward alone
    better = {"fastattn": 1.0, "sdpa default": 90.0}
    attention(run, better, length=512, isa=NATIVE)
    attention(run, better, length=4096, mask="window", isa=NATIVE)
    attention(run, better, length=4096, mask="dropout", isa=NATIVE)
    attention(run, better, length=4096, dtype=torch.bfloat16, isa=NATIVE)
    attention(run, better, length=4096, passes="forward", isa=NATIVE)
    run.close()
    (head,) = sections.headlines(rows.read_folder(tmp_path))
    assert head[:2] == ("1.50×", "attention, forward + backward")
    assert head.what == (
        "over sdpa default (flash), the fastest of 3 peers: "
        "12 heads of 64, causal, 1,024 tokens, float32, A CPU, avx512, 2 threads"
    )


def test_a_headline_is_of_the_last_run_whether_its_pass_is_called_both_or_step(tmp_path: Path) -> None:
    for started, passes, ms in (("2026-01-02", "both", 10.0), ("2026-01-03", "step", 20.0)):
        run = begin(tmp_path, "adamw", started=started)
        race = {"op": "adamw", "pass": passes, "dtype": "float32", "status": "ok", "race": run.next_race()}
        for name, own in (("fastattn", ms), ("torch", 30.0)):
            run.add(race | {"implementation": name, "isa": "avx512", "p50_ms": own})
        run.close()
    (head,) = sections.headlines(rows.read_folder(tmp_path))
    assert head[:2] == ("1.50×", "adamw, step")


def test_a_gpu_check_has_its_lengths_on_one_line_and_its_share_of_the_product(tmp_path: Path) -> None:
    cases = [Case("causal", 16384 // n, 32, n, 64) for n in (1024, 4096)]
    gpu_check(tmp_path / "gpu.csv", {case: {"fastattn": 1.0, "sdpa default": 2.0} for case in cases})
    gpu_check(tmp_path / "dry.csv", {cases[0]: {"fastattn": 1.0}}, run="dry-run")
    found = rows.read_folder(tmp_path)
    assert found.unread == () and len(found.rows) == 5
    figure = figures.speed_by_length(found.rows)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_title() == "batch 16 to 4, 32 heads of 64, causal"
    assert [list(line.get_xdata()) for line in axes.lines] == [[1024, 4096], [1024, 4096]]
    assert [ratio for _, _, ratio in rows.speedups(found.rows)] == [2.0, 2.0]
    ours = next(row for row in found.rows if row.implementation == "fastattn")
    flops = cases[0].flops("forward") / 1e-3
    assert ours.ceiling == "matmul" and ours.share == pytest.approx(flops / 600e12, abs=1e-3)
    share = figures.share_of_ceiling(found.rows)
    assert share is not None
    assert [text.get_text() for text in share.legends[0].texts] == ["a bfloat16 matrix product"]


def test_kept_rows_are_all_read() -> None:
    found = rows.read_folder(RESULTS)
    assert found.unread == () and len(found.rows) > 450
    assert {row.op for row in found.rows} >= {"attention", "decode", "gpt2", "linear", "cross_entropy"}
    seen = [(row.machine, row.problem, row.implementation) for row in rows.latest(found.rows)]
    assert len(set(seen)) == len(seen)
    assert {"attention", "decode", "gpt2"} <= {ours.op for ours, _, _ in rows.speedups(found.rows)}
    # of the kept comparison that was made before `fastattn` was all of it
    compared = next(one for one in found.results if one["file"] == "compare_gpt2_1024.json")
    assert (compared["baseline"], compared["ours"]) == ("standard", "attention")


def test_what_is_of_another_form_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "b.csv").write_text("schema,op\n1,attention\n")
    before = json.loads((RESULTS / "compare_gpt2_1024.json").read_text()) | {"schema": 1}
    (tmp_path / "c.json").write_text(json.dumps(before))
    run = begin(tmp_path / "runs")
    attention(run, {"fastattn": 1.0}, length=512)
    run.close()
    unread = rows.read_folder(tmp_path).unread
    assert [why.partition(":")[0] for why in unread] == ["a.csv", "b.csv", "c.json"]


def test_no_two_implementations_look_alike() -> None:
    names = ["sdpa", "sdpa default", "standard", "naive", "eager", "flex", "flex compiled", "naive compiled"]
    names += [
        "fastattn",
        "xformers",
        "flash-attn 2",
        "flash-attn 3",
        "flash-attn 4",
        "sdpa cudnn",
        "sdpa math",
    ]
    looks = look_of(names)
    assert len({(look["color"], look["marker"], look["linestyle"]) for look in looks.values()}) == len(names)
    few = look_of(["sdpa", "naive", "fastattn", "flex", "naive compiled", "xformers"])
    assert len({look["color"] for look in few.values()}) == 6
    assert looks["fastattn"]["color"] == look_of(["fastattn"])["fastattn"]["color"]
