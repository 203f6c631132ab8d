"""`fastattn longcontext --quality`: what a longer context is good for: held-out loss, at the same tokens.

A GPT-2 is trained anew at each context: the same seed, weights, number of tokens a step and in all. Every
one then reads the same held-out text, cut into windows of its own context, and predicts every token of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import torch

from fastattn.gpt2.compare.report import bullets, table
from fastattn.gpt2.compare.result import machine, versions
from fastattn.gpt2.compare.settings import contexts as parse_contexts
from fastattn.gpt2.config import GPT2Config
from fastattn.gpt2.curves import Curve, Recipe, Run, held_out_windows
from fastattn.gpt2.data import Corpus, load_tokens
from fastattn.gpt2.drawing import plots_of
from fastattn.gpt2.options import check_device
from fastattn.gpt2.spread import standard_error

SCHEMA: Final = 1
_SHARE: Final = 0.92  # of the minutes; the rest is for being wrong
_EVALUATIONS: Final = 8  # of the held-out loss at each context
_EVALUATION_SHARE: Final = 0.1  # of the minutes, at most, beyond one evaluation a context
_PROBE_STEPS: Final = 2  # timed ones, behind one to warm up
_BEYOND: Final = 2.0  # standard errors


@dataclass(frozen=True)
class Settings:
    """Options of a quality run.

    Attributes:
        contexts: to train at, in tokens; each divides the longest.
        layers: of the model.
        heads: of a layer.
        width: of the model.
        lr: the highest learning rate.
        minutes: that the token budget is chosen for where `tokens` is None.
        tokens: of each run; None for as many as `minutes` have room for.
        positions: "rotary" or "learned".
        held_out: stretches of the longest context to evaluate on.
        dtype: "float32", or "bfloat16" for autocast.
        device: "cpu", "cuda" or "cuda:N".
        data: source as `load_tokens` takes it.
        tokenizer: "gpt2" or "bytes".
        seed: of weights and batches.
    """

    contexts: tuple[int, ...] = (256, 1024, 4096, 16_384)
    layers: int = 4
    heads: int = 4
    width: int = 128
    lr: float = 2e-3
    minutes: float = 30.0
    tokens: int | None = None
    positions: str = "rotary"
    held_out: int = 12
    dtype: str = "float32"
    device: str = "cpu"
    data: str = "shakespeare"
    tokenizer: str = "bytes"
    seed: int = 1

    def __post_init__(self) -> None:
        check_device(self.device, "--device")
        if not self.contexts or any(max(self.contexts) % context for context in self.contexts):
            raise ValueError(f"--contexts: expected divisors of the longest, got {list(self.contexts)}")
        if self.minutes <= 0:
            raise ValueError(f"--minutes: expected more than 0, got {self.minutes}")
        if self.tokens is not None and self.tokens < max(self.contexts):
            raise ValueError(f"--tokens: expected at least {max(self.contexts)}, got {self.tokens}")

    def recipe(self, context: int, steps: int, vocab_size: int, evaluations: int = _EVALUATIONS) -> Recipe:
        """Of one run: a step has as many tokens as the longest context, whatever its own."""
        config = GPT2Config(
            vocab_size=vocab_size,
            n_positions=max(self.contexts),
            n_embd=self.width,
            n_layer=self.layers,
            n_head=self.heads,
            positions=self.positions,
        ).with_dropout(0.0)
        batch = max(self.contexts) // context
        return Recipe(
            config,
            context,
            batch,
            steps,
            lr=self.lr,
            evaluations=evaluations,
            device=self.device,
            dtype=self.dtype,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that are the quality run's alone.

    Args:
        parser: gets the options; `settings_of` reads them and those of the search that both have.
    """
    default = Settings()
    group = parser.add_argument_group("with --quality")
    group.add_argument("--quality", action="store_true", help="held-out loss by context, at the same tokens")
    group.add_argument("--contexts", type=parse_contexts, default=default.contexts, help="(256,1k,4k,16k)")
    group.add_argument("--layers", type=int, default=default.layers, help="(%(default)s)")
    group.add_argument("--heads", type=int, default=default.heads, help="(%(default)s)")
    group.add_argument("--width", type=int, default=default.width, help="(%(default)s)")
    group.add_argument("--lr", type=float, default=default.lr, help="(%(default)s)")
    group.add_argument("--tokens", type=int, help="of each run (as many as --minutes have room for)")


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that parsed options stand for.

    Raises:
        ValueError: options that do not fit.
    """
    names = ("contexts", "layers", "heads", "width", "lr", "tokens", "dtype", "data", "seed")
    return Settings(
        **{name: getattr(args, name) for name in names},
        minutes=args.minutes or Settings.minutes,
        positions=args.positions or Settings.positions,
        tokenizer=args.tokenizer or Settings.tokenizer,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )


def run(args: argparse.Namespace) -> int:
    """Run `fastattn longcontext --quality`, write its report and print its table.

    Returns:
        0; 2 for options or a text that do not fit; 130 after Ctrl-C, with what was measured until then.
    """
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = args.out or Path("runs") / f"quality-{stamp}"
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{(time.monotonic() - begin) / 60:5.1f} min] {text}", file=sys.stderr, flush=True)

    curves: dict[int, tuple[Recipe, Curve]] = {}
    interrupted = False
    try:
        settings = settings_of(args)
        corpus = load_tokens(settings.data, settings.tokenizer)
        try:
            train(settings, corpus, say, curves)
        except KeyboardInterrupt:
            interrupted = True
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"fastattn longcontext --quality: {error}", file=sys.stderr)
        return 2
    result = result_of(settings, corpus, curves)
    result |= {"started": started, "seconds": time.monotonic() - begin, "interrupted": interrupted}
    write_report(result, folder)
    print(f"{loss_table(result)}\n\n{result['verdict']}\nreport: {folder / 'quality.md'}")
    return 130 if interrupted else 0


def train(
    settings: Settings,
    corpus: Corpus,
    say: Callable[[str], Any],
    curves: dict[int, tuple[Recipe, Curve]],
) -> None:
    """Train at each context; `curves` has those that are done, also where it is interrupted.

    Raises:
        ValueError: the text is too short for the longest context.
    """
    begin = time.monotonic()
    longest, vocab_size = max(settings.contexts), corpus.tokenizer.vocab_size
    windows = {c: held_out_windows(corpus, c, longest, settings.held_out) for c in settings.contexts}
    if settings.tokens is None:
        step, evaluation = probe(settings, corpus, windows, say)
        left = 60 * settings.minutes - (time.monotonic() - begin)
        steps, evaluations = plan(left, step, evaluation)
    else:
        steps, evaluations = settings.tokens // longest, _EVALUATIONS
    say(f"{steps:,} steps of {longest:,} tokens at each context, {evaluations} held-out losses")
    for context in settings.contexts:
        recipe = settings.recipe(context, steps, vocab_size, evaluations)
        run = Run(recipe, "fastattn", settings.seed, corpus, windows[context])
        try:
            run.finish(partial(_say, say, context))
        except FloatingPointError as error:
            say(f"context {context:,} stopped at step {len(run.curve.losses) + 1:,}: {error}")
        finally:
            if run.curve.held_out:
                curves[context] = (recipe, run.curve)


def _say(say: Callable[[str], Any], context: int, text: str) -> None:
    say(f"context {context:,}, {text}")


def probe(
    settings: Settings, corpus: Corpus, windows: Mapping[int, torch.Tensor], say: Callable[[str], Any]
) -> tuple[float, float]:
    """Seconds of a step and of a held-out loss, each summed over the contexts, by a few of each."""
    longest, total, held_out = max(settings.contexts), 0.0, 0.0
    for context in settings.contexts:
        recipe = settings.recipe(context, 2 + _PROBE_STEPS, corpus.tokenizer.vocab_size, evaluations=1)
        run = Run(recipe, "fastattn", settings.seed, corpus, windows[context][: recipe.batch])
        run.step()
        run.evaluate()
        warm, evaluated = run.curve.seconds, run.curve.held_out_seconds
        for _ in range(_PROBE_STEPS):
            run.step()
        step = (run.curve.seconds - warm) / _PROBE_STEPS
        run.evaluate()
        stretches = len(windows[context]) // recipe.batch
        evaluation = stretches * (run.curve.held_out_seconds - evaluated)
        total, held_out = total + step, held_out + evaluation
        say(f"context {context:,}: {longest / step:,.0f} tokens/s, {evaluation:.1f} s a held-out loss")
    return total, held_out


def plan(seconds: float, step: float, evaluation: float) -> tuple[int, int]:
    """How many steps and held-out losses there is time for at each context; at least one of both.

    Args:
        seconds: for all.
        step: seconds of a step at every context.
        evaluation: of a held-out loss at every context.

    Example:
        >>> plan(1000.0, 4.0, 5.0), plan(1000.0, 4.0, 50.0)
        ((220, 8), (205, 2))
    """
    evaluations = min(_EVALUATIONS, max(1, int(_EVALUATION_SHARE * seconds / evaluation)))
    return max(1, int((_SHARE * seconds - evaluations * evaluation) / step)), evaluations


def result_of(
    settings: Settings, corpus: Corpus, curves: Mapping[int, tuple[Recipe, Curve]]
) -> dict[str, Any]:
    """Everything a quality run found out, JSON-serialisable; see `bench/results/README.md`."""
    rows = []
    for context, (recipe, curve) in curves.items():
        last = max(curve.held_out)
        rows.append(
            {
                "context": context,
                "steps": len(curve.losses),
                "tokens": len(curve.losses) * recipe.batch * context,
                "held_out_loss": curve.held_out[last],
                "standard_error": standard_error(curve.parts) if len(curve.parts) > 1 else None,
                "parts": curve.parts,
                "held_out": {
                    str(step * recipe.batch * context): loss for step, loss in curve.held_out.items()
                },
                "losses": [round(loss, 5) for loss in curve.losses],
                "seconds": curve.seconds,
                "tokens_per_second": len(curve.losses) * recipe.batch * context / curve.seconds,
                "finished": len(curve.losses) == recipe.steps,
            }
        )
    recipe = settings.recipe(max(settings.contexts), 1, corpus.tokenizer.vocab_size)
    result = {
        "schema": SCHEMA,
        "kind": "quality",
        "settings": asdict(settings),
        "model": asdict(recipe.config),
        "data": {
            "source": corpus.name,
            "tokenizer": corpus.tokenizer.name,
            "train_tokens": corpus.train_tokens,
            "digest": corpus.digest,
        },
        "machine": machine(settings.device) | {"threads": torch.get_num_threads()},
        "versions": versions(),
        "rows": rows,
    }
    found = differences(rows)
    return result | {"differences": found, "verdict": verdict(rows, found, settings.seed)}


def differences(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of the last held-out losses of any two contexts that were trained to the end, on the same stretches.

    Returns:
        ``contexts`` (two), ``difference`` (the second's loss less the first's), ``standard_error`` (over the
        stretches, paired) and ``beyond`` (whether the difference is more than twice that); none of one
        stretch.

    Example:
        >>> rows = [{"context": 8, "finished": True, "parts": [1.5, 1.7]},
        ...         {"context": 16, "finished": True, "parts": [1.25, 1.5]}]
        >>> [(one["contexts"], round(one["difference"], 3), one["beyond"]) for one in differences(rows)]
        [((8, 16), -0.225, True)]
    """
    found = []
    for one, other in combinations([row for row in rows if row["finished"] and len(row["parts"]) > 1], 2):
        pairs = [b - a for a, b in zip(one["parts"], other["parts"], strict=True)]
        mean, error = statistics.fmean(pairs), standard_error(pairs)
        found.append(
            {
                "contexts": (one["context"], other["context"]),
                "difference": mean,
                "standard_error": error,
                "beyond": abs(mean) > _BEYOND * error,
            }
        )
    return found


def verdict(rows: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], seed: int) -> str:
    """The outcome in a few sentences: what is beyond the spread of the stretches, and what is not."""
    done = [row for row in rows if row["finished"]]
    if len(done) < 2:
        return "Fewer than two contexts were trained: nothing to compare."
    losses = ", ".join(f"{row['held_out_loss']:.3f} at {row['context']:,}" for row in done)
    text = f"Held-out loss by context after {done[0]['tokens']:,} tokens each: {losses}. "
    if not found:
        return text + "They are of one stretch of text, so that what they differ by is not told from chance."
    beyond, rest = [], []
    for one in found:
        short, long = one["contexts"]
        low, high = (long, short) if one["difference"] < 0 else (short, long)
        spread = f"{abs(one['difference']):.3f} ± {one['standard_error']:.3f}"
        if one["beyond"]:
            beyond.append(f"{low:,} is below {high:,} by {spread}")
        else:
            rest.append(f"{short:,} and {long:,} ({spread})")
    if beyond:
        text += f"Beyond twice the standard error over {len(done[0]['parts'])} held-out stretches: "
        text += "; ".join(beyond) + ". "
    if rest:
        text += f"Not told apart: {'; '.join(rest)}. "
    return text + f"All of one seed, {seed}: how far another would move them is not in these errors."


def loss_table(result: Mapping[str, Any]) -> str:
    """Held-out loss by context, in nats a token."""
    lines = [
        [
            f"{row['context']:,}",
            f"{row['held_out_loss']:.4f}",
            "" if row["standard_error"] is None else f"± {row['standard_error']:.4f}",
            f"{row['losses'][-1]:.4f}",
            f"{row['tokens']:,}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['seconds'] / 60:.1f}",
        ]
        for row in result["rows"]
    ]
    head = [
        "context",
        "held-out loss",
        "standard error",
        "last training loss",
        "tokens",
        "tokens/s",
        "minutes",
    ]
    return table(head, lines)


def write_report(result: Mapping[str, Any], folder: Path) -> None:
    """Write result.json, quality.md and, where matplotlib is there, quality.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    image = ""
    plots = plots_of("fastattn.gpt2.longcontext")
    if plots is not None and result["rows"]:
        plots.draw_quality(result).savefig(folder / "quality.png", dpi=130)
        image = "![held-out loss](quality.png)\n\n"
    settings, model = result["settings"], result["model"]
    method = bullets(
        [
            f"{model['n_layer']} layers, {model['n_head']} heads, width {model['n_embd']}, "
            f"{model['positions']} positions, no dropout, {settings['dtype']}",
            f"AdamW, learning rate {settings['lr']:g}, seed {settings['seed']}; {result['data']['source']}, "
            f"{result['data']['tokenizer']} tokens, {max(settings['contexts']):,} a step at every context",
            "held out: whole documents, the same tokens for all contexts, in windows of each one's own, end "
            "to end: the first tokens of a window have little before them, which costs short windows most",
            f"at most {settings['held_out']} stretches of {max(settings['contexts']):,} tokens, spread over "
            "the held-out documents; a context's standard error is over them, that of a difference over the "
            "differences on each",
            f"{result['machine']['gpu'] or result['machine']['cpu']}, {result['machine']['threads']} "
            f"threads, torch {result['versions']['torch']}",
            f"{result['started']}, {result['seconds'] / 60:.1f} minutes"
            + (", interrupted" if result["interrupted"] else ""),
        ]
    )
    page = (
        f"# Held-out loss by context\n\n**{result['verdict']}**\n\n{loss_table(result)}\n\n{image}{method}\n"
    )
    (folder / "quality.md").write_text(page, encoding="utf-8")
