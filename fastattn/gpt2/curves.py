"""A training run kept in memory: the loss of every step, and that of one held-out text as it goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast

import torch
from torch import Tensor

from fastattn.gpt2.config import GPT2Config
from fastattn.gpt2.data import Batches, Corpus, mix
from fastattn.gpt2.model import GPT2, AttentionKind
from fastattn.gpt2.optim import clip_and_step, learning_rate, make_optimizer

_LOSS_CHUNK: Final = 4096
_WARM_UP: Final = 0.05  # of the steps
_FLOOR: Final = 0.1  # of the learning rate, at the end
_CLIP: Final = 1.0


@dataclass(frozen=True)
class Recipe:
    """What a run is decided by, besides its attention and its seed.

    Attributes:
        config: sizes and dropout; `n_positions` is raised to the context.
        context: tokens an example.
        batch: examples a step.
        steps: of the optimizer.
        lr: the highest learning rate.
        evaluations: held-out losses, evenly over the steps, the last one behind the last step.
        device: "cpu", "cuda" or "cuda:N".
        dtype: "float32", or "bfloat16" for autocast.
    """

    config: GPT2Config
    context: int
    batch: int
    steps: int
    lr: float = 1e-3
    evaluations: int = 8
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        """Of all steps."""
        return self.steps * self.batch * self.context

    def evaluated(self) -> set[int]:
        """The numbers of steps done at which the held-out text is read."""
        count = min(self.evaluations, self.steps)
        return {self.steps * (i + 1) // count for i in range(count)}


@dataclass
class Curve:
    """What a run came to.

    Attributes:
        losses: of the steps, in nats a token.
        held_out: by the number of steps done, the held-out loss.
        parts: the last held-out losses of a step's batch of windows each.
        seconds: of the training steps alone.
        held_out_seconds: of the held-out losses.
    """

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    parts: list[float] = field(default_factory=list)
    seconds: float = 0.0
    held_out_seconds: float = 0.0


def held_out_windows(corpus: Corpus, context: int, longest: int, most: int | None = None) -> Tensor:
    """Windows of held-out text, end to end, whose targets are the same tokens for each context.

    Args:
        corpus: its validation documents are read from their beginnings.
        context: tokens of a window; divides `longest`.
        longest: the largest context this text is read with: of each document whole stretches as long are
            taken, and documents that are shorter are left out.
        most: at most so many such stretches, spread evenly over all that there are.

    Returns:
        ids ``[windows, context + 1]``, int64: each window with the token behind it.

    Raises:
        ValueError: `longest` is no multiple of `context`, or no document is as long.

    Example:
        >>> from fastattn.gpt2.tokenizer import load_tokenizer
        >>> text = torch.arange(10).to(torch.uint16)
        >>> corpus = Corpus((), (text,), load_tokenizer("bytes"), "count", "")
        >>> held_out_windows(corpus, 2, 4).tolist()
        [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8]]
    """
    if longest % context:
        raise ValueError(f"longest: expected a multiple of the context {context}, got {longest}")
    stretches: list[Tensor] = []
    for document in corpus.validation_documents:
        ids = document.to(torch.int64)
        for start in range(0, len(ids) - longest, longest):
            stretches.append(ids[start : start + longest + 1].unfold(0, context + 1, context))
    if not stretches:
        held = max((len(document) for document in corpus.validation_documents), default=0)
        raise ValueError(f"context: expected less than {held}, the longest held-out document, got {longest}")
    count = len(stretches) if most is None else min(most, len(stretches))
    return torch.cat([stretches[(2 * i + 1) * len(stretches) // (2 * count)] for i in range(count)])


@torch.no_grad()
def held_out_losses(model: GPT2, windows: Tensor, recipe: Recipe) -> list[float]:
    """Mean losses over the targets of `windows`, ``[windows, context + 1]``, a step's batch at a time."""
    training, losses = model.training, []
    model.eval()
    with _autocast(recipe):
        for part in windows.split(recipe.batch):
            ids = part.to(recipe.device)
            losses.append(model.loss(ids[:, :-1], ids[:, 1:], chunk=_LOSS_CHUNK).item())
    model.train(training)
    return losses


class Run:
    """One model in training; `step` by `step`, so that a caller may stop where its time is up.

    A run is a function of its recipe, attention and seed: the seed decides weights, batches and dropout.
    With fastattn's attention, every operation that it has and its optimizer are used too.

    Args:
        recipe: of the run.
        attention: see `GPT2`.
        seed: of the run.
        corpus: trained on; documents are joined where none is as long as the context.
        windows: of `held_out_windows`.
    """

    def __init__(self, recipe: Recipe, attention: str, seed: int, corpus: Corpus, windows: Tensor) -> None:
        self.recipe, self.seed, self.windows, self.curve = recipe, seed, windows, Curve()
        config = replace(recipe.config, n_positions=max(recipe.config.n_positions, recipe.context))
        torch.manual_seed(seed)
        self.model = GPT2(config, cast("AttentionKind", attention)).to(recipe.device)
        self.optimizer = make_optimizer(self.model, lr=recipe.lr, ours=attention == "fastattn")
        try:
            self.batches = Batches(corpus, recipe.batch, recipe.context, seed)
        except ValueError:
            self.batches = Batches(corpus, recipe.batch, recipe.context, seed, joined=True)

    def step(self) -> float:
        """One step of the optimizer, and the held-out loss where it is its turn; returns the step's loss.

        Raises:
            FloatingPointError: the gradient is not finite.
        """
        recipe, done = self.recipe, len(self.curve.losses)
        begin = time.perf_counter()
        rate = learning_rate(
            done,
            peak=recipe.lr,
            warmup=max(1, round(_WARM_UP * recipe.steps)),
            steps=recipe.steps,
            floor=_FLOOR,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x, y = (ids.to(recipe.device) for ids in self.batches.at(done))
        torch.manual_seed(mix(self.seed ^ mix(done)) >> 1)  # dropout's
        with _autocast(recipe):
            loss = self.model.loss(x, y, chunk=_LOSS_CHUNK)
        torch.autograd.backward(loss)
        clip_and_step(self.model, self.optimizer, _CLIP)
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        self.curve.seconds += time.perf_counter() - begin
        self.curve.losses.append(value)
        if done + 1 in recipe.evaluated():
            self.evaluate()
        return value

    def evaluate(self) -> None:
        """Give the curve the held-out loss."""
        begin = time.perf_counter()
        parts = held_out_losses(self.model, self.windows, self.recipe)
        sizes = [len(part) for part in self.windows.split(self.recipe.batch)]
        loss = sum(size * part for size, part in zip(sizes, parts, strict=True)) / sum(sizes)
        self.curve.held_out[len(self.curve.losses)], self.curve.parts = loss, parts
        self.curve.held_out_seconds += time.perf_counter() - begin

    def finish(self, say: Callable[[str], Any]) -> Curve:
        """All steps that are left; tells `say` each held-out loss."""
        while len(self.curve.losses) < self.recipe.steps:
            self.step()
            done = len(self.curve.losses)
            if done in self.curve.held_out:
                say(f"step {done:,} of {self.recipe.steps:,}: held-out loss {self.curve.held_out[done]:.4f}")
        return self.curve


@contextlib.contextmanager
def _autocast(recipe: Recipe) -> Iterator[None]:
    device = torch.device(recipe.device).type
    with torch.autocast(device, torch.bfloat16, enabled=recipe.dtype != "float32"):
        yield
