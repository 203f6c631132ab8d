"""`fastattn compare training`: GPT-2 trained to a real held-out loss with standard attention and with ours.

Rounding and the elements that dropout takes are other ones, so that the curves cannot be the same. What can
be asked is whether ours are further from the standard's than seeds are from each other: Welch's interval for
the difference of the means of the last held-out losses.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import torch

from fastattn.gpt2.compare.report import bullets, table
from fastattn.gpt2.compare.result import machine, versions
from fastattn.gpt2.config import SIZES, config_of
from fastattn.gpt2.curves import Curve, Recipe, Run, held_out_windows
from fastattn.gpt2.data import load_tokens
from fastattn.gpt2.drawing import plots_of
from fastattn.gpt2.options import check_device

SCHEMA: Final = 1
BASELINE: Final = "standard"
OURS: Final = "fastattn"
# Two-sided 95 % points of Student's t by degrees of freedom; above 30 the normal distribution's.
_STUDENT: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_STUDENT_MANY: Final = ((12, 2.179), (15, 2.131), (20, 2.086), (30, 2.042))
_NORMAL: Final = 1.960


@dataclass(frozen=True)
class Settings:
    """Options of an equivalence run.

    Attributes:
        size: name of `config.SIZES`; its vocabulary is the tokenizer's.
        context: tokens an example.
        batch: examples a step.
        steps: of each run.
        seeds: runs of each implementation, with seeds 1, 2, …
        dropout: probability of all of GPT-2's dropouts.
        lr: the highest learning rate.
        evaluations: held-out losses of a run.
        held_out: windows of held-out text.
        dtype: "float32", or "bfloat16" for autocast.
        device: "cpu", "cuda" or "cuda:N".
        data: source as `load_tokens` takes it.
        tokenizer: "gpt2" or "bytes".
    """

    size: str = "tiny"
    context: int = 256
    batch: int = 16
    steps: int = 400
    seeds: int = 3
    dropout: float = 0.1
    lr: float = 2e-3
    evaluations: int = 10
    held_out: int = 256
    dtype: str = "float32"
    device: str = "cpu"
    data: str = "shakespeare"
    tokenizer: str = "bytes"

    def __post_init__(self) -> None:
        config_of(self.size)
        check_device(self.device, "--device")
        for name in ("context", "batch", "steps", "evaluations", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, got {getattr(self, name)}")
        if self.seeds < 2:
            raise ValueError(f"--seeds: expected at least 2, to tell the noise by, got {self.seeds}")

    def recipe(self, vocab_size: int) -> Recipe:
        """Of every run."""
        config = replace(config_of(self.size).with_dropout(self.dropout), vocab_size=vocab_size)
        return Recipe(
            config,
            self.context,
            self.batch,
            self.steps,
            lr=self.lr,
            evaluations=self.evaluations,
            device=self.device,
            dtype=self.dtype,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fastattn compare training`.

    Args:
        parser: gets the options.
    """
    default = Settings()
    parser.add_argument("--size", default=default.size, help=f"{', '.join(SIZES)} or 124M … (%(default)s)")
    for name, text in (
        ("context", "tokens an example"),
        ("batch", "examples a step"),
        ("steps", "of each run"),
        ("seeds", "runs of each implementation"),
        ("evaluations", "held-out losses of a run"),
        ("held_out", "windows of held-out text"),
    ):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=getattr(default, name), help=f"{text} (%(default)s)")
    parser.add_argument("--dropout", type=float, default=default.dropout, help="(%(default)s)")
    parser.add_argument("--lr", type=float, default=default.lr, help="learning rate (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=default.dtype)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    parser.add_argument("--data", default=default.data, help="shakespeare, a text file, a folder or a .bin")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), default=default.tokenizer)
    parser.add_argument("--out", type=Path, help="folder (runs/training-TIME)")


def run(args: argparse.Namespace) -> int:
    """Run `fastattn compare training`, write its report and print its table and verdict.

    Returns:
        0 where ours are within the noise; 1 where they are not; 2 for options that do not fit; 130 after
        Ctrl-C, with the runs that ended until then.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = args.out or Path("runs") / f"training-{stamp}"
    given = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    given["device"] = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    begin = time.monotonic()
    curves: dict[tuple[str, int], Curve] = {}
    interrupted = False
    try:
        settings = Settings(**given)
        corpus = load_tokens(settings.data, settings.tokenizer)
        recipe = settings.recipe(corpus.tokenizer.vocab_size)
        windows = held_out_windows(corpus, settings.context, settings.context)
        # spread over all held-out documents
        windows = windows[:: max(1, len(windows) // settings.held_out)][: settings.held_out]
        try:
            for seed in range(1, settings.seeds + 1):
                for name in (BASELINE, OURS):
                    curve = Run(recipe, name, seed, corpus, windows).finish(lambda text: None)
                    curves[name, seed] = curve
                    loss, minutes = curve.held_out[recipe.steps], (time.monotonic() - begin) / 60
                    print(
                        f"[{minutes:5.1f} min] {name}, seed {seed}: held-out loss {loss:.4f}", file=sys.stderr
                    )
        except KeyboardInterrupt:
            interrupted = True
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"fastattn compare training: {error}", file=sys.stderr)
        return 2
    result = result_of(settings, curves) | {
        "started": started,
        "seconds": time.monotonic() - begin,
        "interrupted": interrupted,
        "data": {
            "source": corpus.name,
            "tokenizer": corpus.tokenizer.name,
            "train_tokens": corpus.train_tokens,
            "held_out_tokens": windows[:, 1:].numel(),
            "digest": corpus.digest,
        },
    }
    write_report(result, folder)
    print(f"{loss_table(result)}\n\n{result['verdict']}\nreport: {folder / 'training.md'}")
    return 130 if interrupted else int(result["difference"].get("within") is not True)


def result_of(settings: Settings, curves: Mapping[tuple[str, int], Curve]) -> dict[str, Any]:
    """Everything an equivalence run found out, JSON-serialisable; see `bench/results/README.md`."""
    runs = [
        {
            "implementation": name,
            "seed": seed,
            "held_out": {str(step): loss for step, loss in curve.held_out.items()},
            "losses": [round(loss, 5) for loss in curve.losses],
            "seconds": curve.seconds,
        }
        for (name, seed), curve in curves.items()
    ]
    last = {
        name: [c.held_out[settings.steps] for (which, _), c in curves.items() if which == name]
        for name in (BASELINE, OURS)
    }
    enough = min(len(losses) for losses in last.values()) >= 2
    difference = welch(last[BASELINE], last[OURS]) if enough else {}
    return {
        "schema": SCHEMA,
        "kind": "training",
        "settings": asdict(settings),
        "machine": machine(settings.device) | {"threads": torch.get_num_threads()},
        "versions": versions(),
        "runs": runs,
        "difference": difference,
        "verdict": verdict(difference, settings.seeds),
    }


def welch(base: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """The difference of two means and its 95 % interval, each sample with a variance of its own.

    Args:
        base: losses of the standard attention's runs, two or more.
        ours: of ours.

    Returns:
        ``difference`` (ours less the standard's), ``half_width`` of the interval, ``spread`` (the larger
        standard deviation over seeds), and ``within``: whether the interval has 0 in it.

    Source: Welch, "The generalization of 'Student's' problem", Biometrika 34, 1947.

    Example:
        >>> welch([1.0, 1.2, 1.1], [1.15, 1.05, 1.13])["within"]
        True
        >>> welch([1.0, 1.001, 0.999], [1.1, 1.101, 1.099])["within"]
        False
    """
    parts = [statistics.variance(sample) / len(sample) for sample in (base, ours)]
    total = sum(parts)
    difference = statistics.fmean(ours) - statistics.fmean(base)
    if total > 0:
        sizes = (len(base), len(ours))
        freedom = total**2 / sum(part**2 / (n - 1) for part, n in zip(parts, sizes, strict=True))
    else:
        freedom = math.inf
    half_width = student(freedom) * math.sqrt(total)
    return {
        "difference": difference,
        "half_width": half_width,
        "spread": max(statistics.stdev(base), statistics.stdev(ours)),
        "within": abs(difference) <= half_width,
        "means": {BASELINE: statistics.fmean(base), OURS: statistics.fmean(ours)},
    }


def student(freedom: float) -> float:
    """The two-sided 95 % point of Student's t, of the table's next lower degrees of freedom.

    Example:
        >>> student(4.9), student(math.inf)
        (2.776, 1.96)
    """
    whole = 10**9 if math.isinf(freedom) else max(1, int(freedom))
    if whole <= len(_STUDENT):
        return _STUDENT[whole - 1]
    if whole > _STUDENT_MANY[-1][0]:
        return _NORMAL
    return next((t for least, t in reversed(_STUDENT_MANY) if whole >= least), _STUDENT[-1])


def verdict(difference: Mapping[str, Any], seeds: int) -> str:
    """The outcome in a sentence."""
    if not difference:
        return "Fewer than two runs of each ended: nothing to compare."
    means = difference["means"]
    words = "within" if difference["within"] else "BEYOND"
    interval = f"{difference['difference']:+.4f} ± {difference['half_width']:.4f} (95 %, {seeds} seeds)"
    return (
        f"Held-out loss {means[OURS]:.4f} with fastattn, {means[BASELINE]:.4f} with standard attention: a "
        f"difference of {interval}, {words} the noise of seeds, whose standard deviation is "
        f"{difference['spread']:.4f}."
    )


def loss_table(result: Mapping[str, Any]) -> str:
    """The last held-out losses, a seed a line."""
    last: dict[int, dict[str, float]] = {}
    for one in result["runs"]:
        last.setdefault(one["seed"], {})[one["implementation"]] = list(one["held_out"].values())[-1]
    lines = []
    for seed, losses in last.items():
        cells = [f"{losses[name]:.4f}" if name in losses else "" for name in (BASELINE, OURS)]
        both = f"{losses[OURS] - losses[BASELINE]:+.4f}" if len(losses) == 2 else ""
        lines.append([str(seed), *cells, both])
    return table(["seed", BASELINE, OURS, "difference"], lines)


def write_report(result: Mapping[str, Any], folder: Path) -> None:
    """Write result.json, training.md and, where matplotlib is there, training.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    image = ""
    plots = plots_of("fastattn.gpt2.compare")
    if plots is not None and result["runs"]:
        plots.draw_seeds(result).savefig(folder / "training.png", dpi=130)
        image = "![held-out loss](training.png)\n\n"
    settings, machine_ = result["settings"], result["machine"]
    method = bullets(
        [
            f"GPT-2 of size {settings['size']}, {result['data']['source']}, {result['data']['tokenizer']} "
            f"tokens; {settings['steps']:,} steps of {settings['batch']} × {settings['context']} tokens, "
            f"dropout {settings['dropout']}, {settings['dtype']}, AdamW at {settings['lr']:g}",
            f"a seed decides weights, batches and dropout, the same for both; held out: "
            f"{result['data']['held_out_tokens']:,} tokens of whole documents",
            f"{machine_['gpu'] or machine_['cpu']}, {machine_['threads']} threads, torch "
            f"{result['versions']['torch']}; {result['started']}, {result['seconds'] / 60:.1f} minutes"
            + (", interrupted" if result["interrupted"] else ""),
        ]
    )
    parts = ["# Training: ours against standard attention", f"**{result['verdict']}**", loss_table(result)]
    page = "\n\n".join([*parts, image + method]) + "\n"
    (folder / "training.md").write_text(page, encoding="utf-8")
