"""What a comparison is asked to do: the options of `fastattn compare gpt2`, checked."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from fastattn.gpt2.config import SIZES, GPT2Config, config_of
from fastattn.gpt2.options import check_device


class Implementation(NamedTuple):
    """One way of training the same GPT-2.

    Attributes:
        attention: transformers' attn_implementation.
        what: for people.
        compiled: by `torch.compile`, model and loss. It takes part in training alone: each dropout and each
            context would compile it anew.
        own: `fastattn.gpt2.GPT2` with every fused operation and `fastattn.optim.AdamW`, not transformers'
            model with torch's.
    """

    attention: str
    what: str
    compiled: bool = False
    own: bool = False


# The first that is asked for is what the others are compared with, the last what the comparison is about.
IMPLEMENTATIONS: Final = {
    "standard": Implementation("eager", "transformers' eager attention, the equation as written"),
    "sdpa": Implementation("sdpa", "transformers with torch.nn.functional.scaled_dot_product_attention"),
    "compiled": Implementation("sdpa", "sdpa's model and loss under torch.compile", compiled=True),
    "attention": Implementation("fastattn", "the same transformers model with fastattn's attention"),
    "fastattn": Implementation(
        "fastattn", "fastattn.gpt2.GPT2, all its operations fastattn's, and fastattn.optim.AdamW", own=True
    ),
}
_COMPILED_CONTEXT: Final = 1024  # tokens; beyond, and in a quick run, "compiled" is for who asks for it
# Largest relative difference of the losses at dropout 0: rounding of the dtype's arithmetic, carried through
# the steps' updates. bfloat16 has 8 bits, so that each loss is itself known to about 1e-2.
LOSS_TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 2e-2}
_CUSTOM_SIZE: Final = re.compile(r"(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True)
class Settings:
    """Options of a comparison.

    Attributes:
        size: name of `config.SIZES`, an alias such as "124M", or "LAYERSxHEADSxWIDTH".
        context: tokens of an example.
        batch: examples of a step.
        steps: training steps of each implementation, the first to warm up.
        parity_steps: at most as many steps with dropout 0.
        rounds: turns that `steps` are cut into.
        fixed_steps: `steps` were asked for, so that the time budget does not cut them.
        dropout: probability of all of GPT-2's dropouts.
        dtype: "float32", or "bfloat16" for autocast with float32 weights.
        device: "cpu", "cuda" or "cuda:N".
        sweep: contexts to measure one step of; None for doubling from half of `context` while it fits.
        memory_budget: bytes, or None for 90 % of what is available.
        time_budget: seconds for everything, or None for no limit but the sweep's own.
        data: source as `loadtokens` takes it.
        tokenizer: "gpt2" or "bytes".
        seed: of weights, dropout and batches.
        quick: the small job was asked for.
        implementations: names of `IMPLEMENTATIONS`, in its order.
    """

    size: str
    context: int
    batch: int
    steps: int
    parity_steps: int
    rounds: int
    fixed_steps: bool
    dropout: float
    dtype: str
    device: str
    sweep: tuple[int, ...] | None
    memory_budget: int | None
    time_budget: float | None
    data: str
    tokenizer: str
    seed: int
    quick: bool
    implementations: tuple[str, ...] = tuple(IMPLEMENTATIONS)

    def __post_init__(self) -> None:
        if not _CUSTOM_SIZE.fullmatch(self.size):
            config_of(self.size)
        check_device(self.device, "--device")
        for name in ("context", "batch", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, got {getattr(self, name)}")
        if self.steps < 2:
            raise ValueError("--steps: expected at least 2, the first of which warms up, got 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"--dropout: expected a probability in [0, 1), got {self.dropout}")
        for name, value in (("time", self.time_budget), ("memory", self.memory_budget)):
            if value is not None and value <= 0:
                raise ValueError(f"--{name}-budget: expected more than 0, got {value}")
        chosen = self.implementations
        if chosen != tuple(name for name in IMPLEMENTATIONS if name in chosen) or len(chosen) < 2:
            raise ValueError(
                f"--implementations: expected two or more of {list(IMPLEMENTATIONS)}, got {list(chosen)}"
            )
        if IMPLEMENTATIONS[self.ours].attention != "fastattn":
            raise ValueError(
                f"--implementations: expected attention or fastattn among them, got {list(chosen)}"
            )

    @property
    def baseline(self) -> str:
        """The implementation that the others are compared with."""
        return self.implementations[0]

    @property
    def ours(self) -> str:
        """The implementation that the comparison is about."""
        return self.implementations[-1]

    @property
    def contexts(self) -> tuple[int, ...]:
        """Of the sweep, shortest first."""
        if self.sweep is not None:
            return tuple(sorted(set(self.sweep)))
        return tuple(self.context * 2**i // 2 for i in range(8))

    @property
    def short_warm_up(self) -> bool:
        """Whether the step before each point of the sweep is cut short: not where the contexts were asked
        for and no time was set."""
        return self.sweep is None or self.time_budget is not None

    def model_config(self, vocab_size: int) -> GPT2Config:
        """The model's sizes; the official ones keep GPT-2's vocabulary, whatever the tokenizer."""
        custom = _CUSTOM_SIZE.fullmatch(self.size)
        if custom is None:
            config = config_of(self.size)
        else:
            layers, heads, width = map(int, custom.groups())
            config = GPT2Config(vocab_size=vocab_size, n_layer=layers, n_head=heads, n_embd=width)
        if config.vocab_size < vocab_size:
            raise ValueError(
                f"--size {self.size}: expected a vocabulary of {vocab_size}, got {config.vocab_size}"
            )
        return config

    def title(self) -> str:
        """The model's name for people."""
        if not _CUSTOM_SIZE.fullmatch(self.size):
            for name in ("124M", "355M", "774M", "1558M"):
                if config_of(name) == config_of(self.size):
                    return f"GPT-2 {name}"
        return f"GPT-2 of size {self.size}"

    def worker_spec(self, name: str, config: GPT2Config, device_memory: int | None) -> dict[str, Any]:
        """What the child process of an implementation needs to know."""
        chosen = IMPLEMENTATIONS[name]
        sizes = {name: getattr(config, name) for name in ("vocab_size", "n_embd", "n_layer", "n_head")}
        return {
            "attention": chosen.attention,
            "compiled": chosen.compiled,
            "own": chosen.own,
            "config": {**sizes, "bos_token_id": None, "eos_token_id": None},
            "seed": self.seed,
            "device": self.device,
            "dtype": self.dtype,
            "device_memory": device_memory,
        }

    def record(self) -> dict[str, Any]:
        """For result.json."""
        return asdict(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fastattn compare gpt2`.

    Args:
        parser: gets the options; `settings_of` reads them.
    """
    parser.add_argument("--quick", action="store_true", help="a smaller model, in under 2 minutes")
    parser.add_argument("--size", help=f"{', '.join(SIZES)}, 124M …, or LAYERSxHEADSxWIDTH (default gpt2)")
    parser.add_argument("--context", type=tokens, help="tokens an example (default 1024)")
    parser.add_argument("--batch", type=int, default=1, help="examples a step (default 1)")
    parser.add_argument(
        "--steps",
        type=int,
        help="training steps of each, the first to warm up; never cut for time (default 6)",
    )
    parser.add_argument(
        "--implementations",
        metavar="NAME,…",
        help=f"of {','.join(IMPLEMENTATIONS)} (default: all; compiled not with --quick or over 1,024 tokens)",
    )
    parser.add_argument(
        "--rounds", type=int, help="turns that the steps are cut into (default: one step each)"
    )
    parser.add_argument("--dropout", type=float, default=0.1, help="of GPT-2's dropouts (default 0.1)")
    parser.add_argument(
        "--dtype", choices=list(LOSS_TOLERANCE), default="float32", help="bfloat16 is autocast"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    parser.add_argument(
        "--sweep", type=contexts, help="contexts, as 512,1k,2k (default: doubling while it fits)"
    )
    parser.add_argument(
        "--no-sweep", action="store_const", const=(), dest="sweep", help="no sweep of the context"
    )
    parser.add_argument(
        "--memory-budget", type=float, metavar="GB", help="default: 90 %% of what is available"
    )
    parser.add_argument(
        "--time-budget",
        type=float,
        metavar="MINUTES",
        help="default 11, with --quick 1.7; none with --steps or --sweep",
    )
    parser.add_argument("--data", default="shakespeare", help="shakespeare, a text file, a folder or a .bin")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), default="gpt2", help="default gpt2")
    parser.add_argument("--output", type=Path, help="folder (default runs/gpt2-compare-TIME)")
    parser.add_argument("--seed", type=int, default=1, help="of weights, dropout and batches (default 1)")


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that parsed options stand for.

    Raises:
        ValueError: options that do not fit.
    """
    steps = (4 if args.quick else 6) if args.steps is None else args.steps
    minutes = args.time_budget
    if minutes is None and args.steps is None and not args.sweep:
        minutes = 1.7 if args.quick else 11.0
    context = 1024 if args.context is None else args.context
    return Settings(
        size=args.size or ("mini" if args.quick else "gpt2"),
        context=context,
        batch=args.batch,
        steps=steps,
        parity_steps=steps if args.steps is not None else 4,
        rounds=steps if args.rounds is None else args.rounds,
        fixed_steps=args.steps is not None,
        dropout=args.dropout,
        dtype=args.dtype,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        sweep=args.sweep,
        memory_budget=None if args.memory_budget is None else int(args.memory_budget * 1e9),
        time_budget=None if minutes is None else 60 * minutes,
        data=args.data,
        tokenizer=args.tokenizer,
        seed=args.seed,
        quick=args.quick,
        implementations=_implementations(args.implementations, args.quick or context > _COMPILED_CONTEXT),
    )


def _implementations(text: str | None, short: bool) -> tuple[str, ...]:
    """Those that `text` names, in the order of all; where it is None all, less the compiled if `short`."""
    if text is None:
        return tuple(name for name, one in IMPLEMENTATIONS.items() if not (short and one.compiled))
    names = [name.strip() for name in text.split(",")]
    unknown = sorted(set(names) - set(IMPLEMENTATIONS))
    if unknown:
        raise ValueError(f"--implementations: expected some of {list(IMPLEMENTATIONS)}, got {unknown}")
    return tuple(name for name in IMPLEMENTATIONS if name in names)


def tokens(text: str) -> int:
    """``"2k"`` -> 2048."""
    match = re.fullmatch(r"(\d+)(k?)", text.strip().lower())
    if match is None or int(match[1]) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of tokens such as 2048 or 2k, got {text!r}")
    return int(match[1]) * (1024 if match[2] else 1)


def contexts(text: str) -> tuple[int, ...]:
    """``"512,2k"`` -> (512, 2048)."""
    return tuple(tokens(part) for part in text.split(","))
