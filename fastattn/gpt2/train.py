"""Train GPT-2: `fastattn train` on the command line, `train(Options(...))` in Python.

A step is a function of the weights, the optimizer's state and the step's number alone: the number decides
the batches and seeds the dropout. So a run that resumes goes on exactly as if it had never ended.
"""

from __future__ import annotations

import argparse
import math
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final, cast

import torch
from torch import Tensor

import fastattn
from fastattn.gpt2.checkpoint import latest_run, load_model, load_optimizer, read_state, save_run
from fastattn.gpt2.config import config_of, size_name
from fastattn.gpt2.data import Batches, Corpus, load_tokens, mix
from fastattn.gpt2.model import GPT2, AttentionKind
from fastattn.gpt2.optim import clip_and_step, learning_rate, make_optimizer
from fastattn.gpt2.options import Options, add_arguments, from_arguments
from fastattn.gpt2.plan import Plan, choose_dtype, make_plan, peak_memory, plan_lines
from fastattn.gpt2.progress import Progress, duration

__all__ = ["Options", "Result", "add_arguments", "run", "train"]

# Options that decide what is computed: a run that resumes must be given the same. The text is held to its
# digest instead, however --data names it.
_FIXED: Final = (
    *("size", "init", "dropout", "tokenizer", "validation", "joined"),
    *("context", "batch", "accumulate", "seed"),
)
_LONG_STEP: Final = 5.0  # seconds
_OF_THE_CALL: Final = ("resume", "dry_run", "sample", "sample_tokens")  # no property of the run
_STATE_VERSION: Final = 1
_CHECKPOINTS: Final = "checkpoints"  # of a run, in its folder
_INTERRUPTED: Final = 130  # a shell's exit status of a program that SIGINT ended


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        step: steps done in all.
        loss: of the last of them, None where none was done.
        validation_loss: the last one measured, or None.
        checkpoint: the latest, a folder `load_model` and transformers load; None after a dry run.
        interrupted: a signal ended the run before its last step.
    """

    step: int
    loss: float | None
    validation_loss: float | None
    checkpoint: Path | None
    interrupted: bool


def run(args: argparse.Namespace) -> int:
    """`fastattn train` with what `add_arguments` parsed.

    Returns:
        The exit status: 0, 1 after an error, 130 where a signal ended the run (with a checkpoint).
    """
    try:
        result = train(from_arguments(args))
    except (
        ValueError,
        TypeError,
        NotImplementedError,
        OSError,
        ModuleNotFoundError,
        ArithmeticError,
    ) as error:
        print(f"fastattn train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fastattn train: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return _INTERRUPTED if result.interrupted else 0


def train(options: Options) -> Result:
    """Train a GPT-2; prints the plan, shows progress, logs to and leaves checkpoints in `options.out`.

    SIGINT (Ctrl-C) or SIGTERM ends the run after the step it is in, with a checkpoint.

    Args:
        options: see `Options`.

    Raises:
        ValueError: options, data or a checkpoint that do not fit.
        FileNotFoundError: data or a checkpoint that is not there.
        ModuleNotFoundError: a package is missing; the message says how to install it.
        FloatingPointError: the loss is not finite.
    """
    options = options.resolved()
    if options.threads:
        torch.set_num_threads(options.threads)
    corpus = load_tokens(options.data, options.tokenizer, validation=options.validation)
    batches = Batches(corpus, options.batch, options.context, options.seed, joined=options.joined)
    checkpoint = _checkpoint_to_resume(options, corpus)
    model = _make_model(options, corpus, checkpoint)
    dtype, why = choose_dtype(options)
    plan = make_plan(model, options, dtype)
    print("\n".join(plan_lines(model, options, plan, corpus, batches, (dtype, why))), flush=True)

    trainer = _Trainer(model, options, dtype, corpus, batches)
    done = 0
    if checkpoint is not None:
        state = read_state(checkpoint)
        done = state["step"]
        load_optimizer(checkpoint, model, trainer.optimizer)
        print(
            f"resume   after step {done:,}, from {checkpoint}{_changes(state['options'], options)}",
            flush=True,
        )
    if done < options.steps:
        seconds = trainer.measure(done)
        left = duration(seconds * (options.steps - done))
        print(f"time     about {left}: {seconds:.3g} s a step, measured before the first", flush=True)
    if options.dry_run:
        return Result(done, None, None, checkpoint, False)
    result = _loop(trainer, plan, done)
    if options.sample is not None and not result.interrupted:
        print(trainer.sample(options.sample, options.sample_tokens), flush=True)
    return result


class _Trainer:
    """A step, a validation loss, a checkpoint; keeps no state but the model's and the optimizer's."""

    def __init__(
        self, model: GPT2, options: Options, dtype: torch.dtype, corpus: Corpus, batches: Batches
    ) -> None:
        assert options.device is not None and options.lr is not None and options.warmup is not None
        self.options, self.corpus, self.batches = options, corpus, batches
        self.device, self.peak_lr, self.warmup = torch.device(options.device), options.lr, options.warmup
        self.model = model.to(self.device)
        model.transformer.gradient_checkpointing = options.gradient_checkpointing
        self.optimizer = make_optimizer(
            model,
            lr=options.lr,
            weight_decay=options.weight_decay,
            betas=(options.beta1, options.beta2),
            ours="optimizer" in options.fused_names,
        )
        self._dtype = dtype
        self._loss: Callable[..., Tensor] = torch.compile(model.loss) if options.compile else model.loss
        longest = max(len(document) for document in corpus.validation_documents)
        context = min(options.context, longest - 1)
        self._validation = Batches(corpus, options.batch, context, split="validation")

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = (part.to(self.device) for part in batch)
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            return self._loss(x, y, chunk=self.options.loss_chunk or None)

    def gradients(self, step: int) -> float:
        """Leave a step's gradients in the parameters; returns its loss."""
        torch.manual_seed(mix(mix(self.options.seed) + step))  # dropout's
        self.optimizer.zero_grad(set_to_none=True)
        pieces = self.options.accumulate
        total = torch.zeros((), device=self.device)
        for piece in range(pieces):
            loss = self.loss(self.batches.at(step * pieces + piece)) / pieces
            loss.backward()
            total += loss.detach()
        return float(total)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns its loss, learning rate and gradient norm."""
        loss = self.gradients(step)
        lr = learning_rate(
            step, peak=self.peak_lr, warmup=self.warmup, steps=self.options.steps, floor=self.options.min_lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        try:
            if not math.isfinite(loss):
                raise FloatingPointError(f"expected a finite loss and gradient, got loss {loss}")
            grad_norm = clip_and_step(self.model, self.optimizer, self.options.clip or math.inf)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step + 1}: {error}; a lower --lr may help") from None
        return {"loss": loss, "lr": lr, "grad_norm": grad_norm}

    def measure(self, step: int) -> float:
        """Seconds of a step's forward and backward pass, which are then thrown away."""
        for _ in range(2):
            began = time.perf_counter()
            self.gradients(step)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - began
            if seconds > _LONG_STEP and not self.options.compile:
                break  # what the first pass does once is little beside this
        self.optimizer.zero_grad(set_to_none=True)
        return seconds

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of the first validation batches, the same ones each time, without dropout."""
        self.model.eval()
        losses = [float(self.loss(self._validation.at(i))) for i in range(self.options.eval_batches)]
        self.model.train()
        return sum(losses) / len(losses)

    def save(self, done: int, **values: object) -> Path:
        state = {
            "version": _STATE_VERSION,
            "step": done,
            "corpus": self.corpus.digest,
            "options": asdict(self.options),
            **values,
        }
        return save_run(
            Path(self.options.out) / _CHECKPOINTS,
            self.model,
            self.optimizer,
            state,
            keep=self.options.keep,
            end_of_text=self.corpus.tokenizer.end_of_text,
        )

    def sample(self, prompt: str, tokens: int) -> str:
        """The prompt as the model continues it."""
        tokenizer = self.corpus.tokenizer
        most = self.model.config.n_positions
        ids = (tokenizer.encode(prompt) or [tokenizer.end_of_text])[-(most - 1) :]
        out = self.model.generate(
            torch.tensor([ids], device=self.device),
            min(tokens, most - len(ids)),
            temperature=0.8,
            top_k=200,
            seed=self.options.seed,
            end_of_text=tokenizer.end_of_text,
        )
        return tokenizer.decode(out[0].tolist())


def _loop(trainer: _Trainer, plan: Plan, done: int) -> Result:
    options = trainer.options
    tokens = options.accumulate * options.batch * options.context
    loss: float | None = None
    validation: float | None = None
    with (
        Progress(Path(options.out), steps=options.steps, done=done) as progress,
        _interruption() as interrupted,
    ):
        progress.record("start", step=done, options=asdict(options), plan=asdict(plan), **_machine())
        while done < options.steps and not interrupted():
            began = time.perf_counter()
            values = trainer.step(done)
            done, loss = done + 1, values["loss"]
            seconds = time.perf_counter() - began
            memory = peak_memory(options.device or "cpu")
            progress.step(done, **values, seconds=seconds, tokens=tokens, memory=memory)
            last = done == options.steps
            if options.eval_every and (last or done % options.eval_every == 0):
                validation = trainer.validate()
                progress.record("validation", step=done, loss=validation)
                progress.say(f"step {done:>6}  validation loss {validation:.4f}")
            if done % options.save_every == 0 and not last:
                progress.record("checkpoint", step=done, folder=str(trainer.save(done)))
        stopped = done < options.steps
        checkpoint = trainer.save(done, loss=loss, validation_loss=validation)
        progress.record("end", step=done, interrupted=stopped, folder=str(checkpoint))
        how = "interrupted; --resume goes on" if stopped else "done"
        progress.say(f"{how}: step {done:,} of {options.steps:,}, checkpoint in {checkpoint}")
    return Result(done, loss, validation, checkpoint, stopped)


def _checkpoint_to_resume(options: Options, corpus: Corpus) -> Path | None:
    folder = Path(options.out) / _CHECKPOINTS
    checkpoint = latest_run(folder)
    if checkpoint is None:
        return None
    if not options.resume:
        if options.dry_run:
            return None
        raise ValueError(
            f"out: {options.out} holds a run already; go on with --resume, or name another --out"
        )
    state = read_state(checkpoint)
    if state["version"] != _STATE_VERSION:
        raise ValueError(
            f"{checkpoint}: expected version {_STATE_VERSION} of state.json, got {state['version']}"
        )
    for name in _FIXED:
        expected, given = state["options"][name], getattr(options, name)
        if name == "size" and expected is not None:
            expected = size_name(expected)
        if expected != given:
            raise ValueError(
                f"{name}: expected {expected!r}, as in the run that {checkpoint} is of, got {given!r}; "
                "another run needs another --out"
            )
    if state["corpus"] != corpus.digest:
        raise ValueError(
            f"data: expected the text that the run in {options.out} began with, that of "
            f"{state['options']['data']!r}, got {options.data!r}, where it is another or has changed"
        )
    return checkpoint


def _changes(before: dict[str, Any], options: Options) -> str:
    """The options that are others than before, of those that may be."""
    pairs = [
        (name, before.get(name), now) for name, now in asdict(options).items() if name not in _OF_THE_CALL
    ]
    changed = [f"{name} {was} → {now}" for name, was, now in pairs if was != now]
    return f"; changed: {', '.join(changed)}" if changed else ""


def _make_model(options: Options, corpus: Corpus, checkpoint: Path | None) -> GPT2:
    kind = cast("AttentionKind", options.attention)
    vocab_size = corpus.tokenizer.vocab_size
    folder = options.init if checkpoint is None else checkpoint
    if folder is None:
        config = config_of(options.size or "")
        longest = max(config.n_positions, options.context)
        config = replace(config, vocab_size=vocab_size, n_positions=longest)
        torch.manual_seed(options.seed)
        config = config if options.dropout is None else config.with_dropout(options.dropout)
        return GPT2(config, kind, options.model_fused)
    model = load_model(folder, kind, dropout=options.dropout, fused=options.model_fused)
    if model.config.vocab_size < vocab_size:
        raise ValueError(
            f"{folder}: expected a vocabulary of {vocab_size} or more, got {model.config.vocab_size}"
        )
    if model.config.n_positions < options.context:
        raise ValueError(
            f"context: expected at most {model.config.n_positions}, {folder}'s, got {options.context}"
        )
    return model


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; a second SIGINT is KeyboardInterrupt again."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals are the main thread's
        return

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _machine() -> dict[str, str]:
    return {
        "fastattn": fastattn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }
