"""`fastattn compare training`: GPT-2 trained to a real held-out loss with standard attention and with ours.

Rounding and the elements that dropout takes are other ones, so that the curves cannot be the same. A seed
has the same weights and batches in both, so that what is asked is how far the two of a seed are apart: the
mean of these differences over the seeds, with its Student interval, against a margin that counts as none.
Source: Schuirmann, "A comparison of the two one-sided tests procedure and the power approach", 1987.
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
from fastattn.gpt2.spread import mean_interval

SCHEMA: Final = 2
BASELINE: Final = "standard"
OURS: Final = "fastattn"
EQUIVALENT: Final = "equivalent"
DIFFERENT: Final = "different"
NOT_DECIDED: Final = "not decided"


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
        margin: the largest difference, in nats a token, that counts as none.
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
    margin: float = 0.02
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
        if self.margin <= 0:
            raise ValueError(f"--margin: expected more than 0, got {self.margin}")

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
    parser.add_argument(
        "--margin", type=float, default=default.margin, help="nats a token that count as none (%(default)s)"
    )
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
        0 where ours are equivalent; 1 where they are different or it is not decided; 2 for options that do
        not fit; 130 after Ctrl-C, with the runs that ended until then.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = args.out or Path("runs") / f"training-{stamp}"
    given = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    given["device"] = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    begin = time.monotonic()
    curves: dict[tuple[str, int], Curve] = {}
    failed: dict[tuple[str, int], str] = {}
    interrupted = False
    try:
        settings = Settings(**given)
        corpus = load_tokens(settings.data, settings.tokenizer)
        recipe = settings.recipe(corpus.tokenizer.vocab_size)
        windows = held_out_windows(corpus, settings.context, settings.context, settings.held_out)
        try:
            for seed in range(1, settings.seeds + 1):
                for name in (BASELINE, OURS):
                    one = Run(recipe, name, seed, corpus, windows)
                    said = train(one)
                    if said is None:
                        curves[name, seed] = one.curve
                        said = f"held-out loss {one.curve.held_out[recipe.steps]:.4f}"
                    else:
                        failed[name, seed] = said
                    minutes = (time.monotonic() - begin) / 60
                    print(f"[{minutes:5.1f} min] {name}, seed {seed}: {said}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            interrupted = True
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"fastattn compare training: {error}", file=sys.stderr)
        return 2
    result = result_of(settings, curves, failed) | {
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
    return 130 if interrupted else int(result["outcome"] != EQUIVALENT)


def train(run: Run) -> str | None:
    """Take all steps of `run`; why it has no losses to compare, None where it has."""
    try:
        curve = run.finish(lambda text: None)
    except FloatingPointError as error:
        return f"step {len(run.curve.losses) + 1}: {error}"
    bad = [step for step, loss in curve.held_out.items() if not math.isfinite(loss)]
    return f"the held-out loss at step {bad[0]} is not finite" if bad else None


def result_of(
    settings: Settings,
    curves: Mapping[tuple[str, int], Curve],
    failed: Mapping[tuple[str, int], str],
) -> dict[str, Any]:
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
    seeds = [seed for name, seed in curves if name == OURS and (BASELINE, seed) in curves]
    # a seed with which one of the two learns and the other does not says enough
    apart = any((name, seed) in curves for which, seed in failed for name in {BASELINE, OURS} - {which})
    last: dict[str, Any] = {}
    curve: dict[str, Any] = {}
    if len(seeds) >= 2:
        base, ours = ([curves[name, seed].held_out for seed in seeds] for name in (BASELINE, OURS))
        ends = ([held_out[settings.steps] for held_out in arm] for arm in (base, ours))
        means = ([statistics.fmean(held_out.values()) for held_out in arm] for arm in (base, ours))
        last, curve = (compare(*pair, margin=settings.margin) for pair in (ends, means))
    outcome = _outcome([found["outcome"] for found in (last, curve) if found], apart)
    result = {
        "schema": SCHEMA,
        "kind": "training",
        "settings": asdict(settings),
        "machine": machine(settings.device) | {"threads": torch.get_num_threads()},
        "versions": versions(),
        "runs": runs,
        "failed": [{"implementation": n, "seed": seed, "reason": why} for (n, seed), why in failed.items()],
        "last": last,
        "curve": curve,
        "outcome": outcome,
    }
    return result | {"verdict": verdict(result)}


def _outcome(parts: Sequence[str], apart: bool) -> str:
    if apart or DIFFERENT in parts:
        return DIFFERENT
    return EQUIVALENT if parts and set(parts) == {EQUIVALENT} else NOT_DECIDED


def compare(base: Sequence[float], ours: Sequence[float], *, margin: float) -> dict[str, Any]:
    """How far losses of the same seeds are apart, and whether that is within a margin.

    Args:
        base: losses of standard attention's runs, two or more.
        ours: of ours, of the same seeds in the same order.
        margin: the largest difference that counts as none.

    Returns:
        ``pairs`` (how many), ``means`` by implementation, ``difference`` (ours less the standard's),
        ``half_width`` of its 95 % interval over the pairs, ``spread`` (the standard deviation of the
        standard's over seeds) and ``outcome``: "equivalent" where the whole interval is within the margin;
        else "different" where it leaves out 0, and "not decided" where it does not.

    Example:
        >>> compare([1.0, 1.2, 1.1], [1.001, 1.199, 1.1], margin=0.01)["outcome"]
        'equivalent'
        >>> compare([1.0, 1.2, 1.1], [1.05, 1.251, 1.149], margin=0.01)["outcome"]
        'different'
        >>> compare([1.0, 1.2, 1.1], [1.05, 1.15, 1.1], margin=0.01)["outcome"]
        'not decided'
    """
    difference, half_width = mean_interval([b - a for a, b in zip(base, ours, strict=True)])
    if abs(difference) + half_width <= margin:
        outcome = EQUIVALENT
    else:
        outcome = DIFFERENT if abs(difference) > half_width else NOT_DECIDED
    return {
        "pairs": len(base),
        "means": {BASELINE: statistics.fmean(base), OURS: statistics.fmean(ours)},
        "difference": difference,
        "half_width": half_width,
        "spread": statistics.stdev(base),
        "outcome": outcome,
    }


def verdict(result: Mapping[str, Any]) -> str:
    """The outcome in a few sentences."""
    last, margin = result["last"], result["settings"]["margin"]
    words = {
        EQUIVALENT: f"Equivalent: fastattn trains as standard attention does, to {margin:g} nats a token.",
        DIFFERENT: "DIFFERENT: fastattn does not train as standard attention does.",
        NOT_DECIDED: f"NOT DECIDED: equal or not to {margin:g} nats a token, these runs can't tell.",
    }
    parts = [words[result["outcome"]]]
    parts += [f"{one['implementation']}, seed {one['seed']}: {one['reason']}." for one in result["failed"]]
    if not last:
        return " ".join([*parts, "Fewer than two seeds have both runs."])
    means = last["means"]
    parts.append(
        f"Last held-out loss {means[OURS]:.4f} with fastattn, {means[BASELINE]:.4f} with standard attention. "
        f"Ours less the standard's of the same seed: {_interval(last)} at the end, "
        f"{_interval(result['curve'])} over the whole curve (95 %, {last['pairs']} seeds). "
        f"The standard's own losses differ by {last['spread']:.4f} from seed to seed (standard deviation)."
    )
    return " ".join(parts)


def _interval(found: Mapping[str, Any]) -> str:
    return f"{found['difference']:+.4f} ± {found['half_width']:.4f} ({found['outcome']})"


def loss_table(result: Mapping[str, Any]) -> str:
    """The last held-out losses, a seed a line, and how far ours are from the standard's."""
    held: dict[int, dict[str, list[float]]] = {}
    for one in result["runs"]:
        held.setdefault(one["seed"], {})[one["implementation"]] = list(one["held_out"].values())
    lines = []
    for seed, losses in held.items():
        cells = [f"{losses[name][-1]:.4f}" if name in losses else "" for name in (BASELINE, OURS)]
        gaps = ["", ""]
        if len(losses) == 2:
            curve = statistics.fmean(losses[OURS]) - statistics.fmean(losses[BASELINE])
            gaps = [f"{losses[OURS][-1] - losses[BASELINE][-1]:+.4f}", f"{curve:+.4f}"]
        lines.append([str(seed), *cells, *gaps])
    return table(["seed", BASELINE, OURS, "difference", "over the whole curve"], lines)


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
            "fastattn: attention, every other operation of the model that it has, and its AdamW; standard: "
            "plain PyTorch",
            "a seed decides weights, batches and dropout, the first two the same for both; held out: "
            f"{result['data']['held_out_tokens']:,} tokens of whole documents",
            f"{machine_['gpu'] or machine_['cpu']}, {machine_['threads']} threads, torch "
            f"{result['versions']['torch']}; {result['started']}, {result['seconds'] / 60:.1f} minutes"
            + (", interrupted" if result["interrupted"] else ""),
        ]
    )
    parts = ["# Training: ours against standard attention", f"**{result['verdict']}**", loss_table(result)]
    page = "\n\n".join([*parts, image + method]) + "\n"
    (folder / "training.md").write_text(page, encoding="utf-8")
