"""What a search for the longest context is asked to do: the options of `fastattn longcontext`, checked."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from fastattn.gpt2.compare.settings import contexts, tokens
from fastattn.gpt2.config import SIZES, GPT2Config, config_of
from fastattn.gpt2.options import check_device

# The first one is what the others are compared with.
IMPLEMENTATIONS: Final = {
    "standard": "attention as the equation is written: scores and probabilities in memory",
    "sdpa": "torch.nn.functional.scaled_dot_product_attention",
    "fastattn": "fastattn's attention and every other operation of the model that it has",
    "fastattn+checkpoint": "the same, and each block run again in the backward pass",
}
ATTENTION: Final = "attention"  # to be asked for by name
CHECKPOINT: Final = "+checkpoint"
_UNITS: Final = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}


@dataclass(frozen=True)
class Settings:
    """Options of a search.

    Attributes:
        model: name of `config.SIZES`, or an alias such as "124M".
        implementations: of `IMPLEMENTATIONS`, or "attention" (ours, the rest plain); each also with
            "+checkpoint".
        memory: bytes that the process that trains may hold, libraries and all; on a GPU what torch may
            allocate.
        max_context: tokens; nothing longer is tried.
        first: tokens; what the search begins with.
        at: contexts to measure besides, whatever the budget, while the machine has the memory.
        dropout: probability of all of GPT-2's dropouts.
        positions: "learned", a table with a row for each position, or "rotary".
        loss_chunk: tokens whose logits are held at a time; fastattn chooses its own.
        dtype: "float32", or "bfloat16" for autocast with float32 weights.
        device: "cpu", "cuda" or "cuda:N".
        minutes: for everything; None for no limit.
        data: source as `load_tokens` takes it.
        tokenizer: "gpt2" or "bytes".
        seed: of weights, dropout and batches.
    """

    model: str = "gpt2"
    implementations: tuple[str, ...] = tuple(IMPLEMENTATIONS)
    memory: int = 16 * 2**30
    max_context: int = 131_072
    first: int = 512
    at: tuple[int, ...] = (1024, 4096)
    dropout: float = 0.1
    positions: str = "learned"
    loss_chunk: int = 512
    dtype: str = "float32"
    device: str = "cpu"
    minutes: float | None = None
    data: str = "shakespeare"
    tokenizer: str = "gpt2"
    seed: int = 1

    def __post_init__(self) -> None:
        config_of(self.model)
        check_device(self.device, "--device")
        for name in self.implementations:
            if name.removesuffix(CHECKPOINT) not in ("standard", "sdpa", ATTENTION, "fastattn"):
                raise ValueError(f"--implementations: expected some of {list(IMPLEMENTATIONS)}, got {name!r}")
        if len(set(self.implementations)) < len(self.implementations) or not self.implementations:
            raise ValueError(f"--implementations: expected each once, got {list(self.implementations)}")
        for name in ("memory", "first", "loss_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}: expected at least 1, got {getattr(self, name)}")
        if self.max_context < self.first:
            raise ValueError(
                f"--max-context: expected at least the first context, {self.first}, got {self.max_context}"
            )
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"--minutes: expected more than 0, got {self.minutes}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"--dropout: expected a probability in [0, 1), got {self.dropout}")

    def config(self, context: int) -> GPT2Config:
        """The model's sizes, with positions for `context` tokens."""
        config = config_of(self.model).with_dropout(self.dropout)
        return replace(config, n_positions=max(config.n_positions, context), positions=self.positions)

    def title(self) -> str:
        """The model's name for people."""
        for name in ("124M", "355M", "774M", "1558M"):
            if config_of(name) == config_of(self.model):
                return f"GPT-2 {name}"
        return f"GPT-2 of size {self.model}"

    def worker_spec(self, implementation: str, device_memory: int | None) -> dict[str, Any]:
        """What a child process needs to know."""
        kind = implementation.removesuffix(CHECKPOINT)
        return {
            "attention": "fastattn" if kind == ATTENTION else kind,
            "fused": () if kind == ATTENTION else None,
            "checkpoint": implementation.endswith(CHECKPOINT),
            "device_memory": device_memory,
            **{name: getattr(self, name) for name in ("seed", "device", "dtype", "loss_chunk")},
        }

    def record(self) -> dict[str, Any]:
        """For result.json."""
        return asdict(self)


def memory_size(text: str) -> int:
    """Bytes of ``"16GiB"``, ``"12.5GB"`` or a number of GiB.

    Raises:
        argparse.ArgumentTypeError: anything else.

    Example:
        >>> memory_size("16GiB"), memory_size("2GB")
        (17179869184, 2000000000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    unit = None if match is None else _UNITS.get(match[2] or "gib")
    if match is None or unit is None:
        raise argparse.ArgumentTypeError(f"expected memory such as 16GiB or 12GB, got {text!r}")
    return int(float(match[1]) * unit)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fastattn longcontext`.

    Args:
        parser: gets the options; `settings_of` reads them.
    """
    default = Settings()
    parser.add_argument("--model", default=default.model, help=f"{', '.join(SIZES)} or 124M … (%(default)s)")
    parser.add_argument(
        "--memory", type=memory_size, default=default.memory, help="budget of a process (16GiB)"
    )
    parser.add_argument(
        "--implementations",
        type=lambda text: tuple(text.split(",")),
        default=default.implementations,
        help=f"({','.join(IMPLEMENTATIONS)})",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda if there is one)")
    parser.add_argument("--max-context", type=tokens, default=default.max_context, help="(128k)")
    parser.add_argument(
        "--at", type=contexts, default=default.at, help="contexts to measure besides (1024,4096)"
    )
    parser.add_argument("--dropout", type=float, default=default.dropout, help="(%(default)s)")
    parser.add_argument("--positions", choices=("learned", "rotary"), help="(learned; --quality: rotary)")
    parser.add_argument(
        "--loss-chunk", type=int, default=default.loss_chunk, help="logits held at a time (%(default)s)"
    )
    parser.add_argument("--minutes", type=float, help="for everything (no limit; --quality: 30)")
    parser.add_argument("--data", default=default.data, help="shakespeare, a text file, a folder or a .bin")
    parser.add_argument("--tokenizer", choices=("gpt2", "bytes"), help="(gpt2; --quality: bytes)")
    parser.add_argument("--seed", type=int, default=default.seed, help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="folder (runs/longcontext-TIME)")


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that parsed options stand for.

    Raises:
        ValueError: options that do not fit.
    """
    names = ("model", "memory", "implementations", "dtype", "max_context", "at", "dropout", "loss_chunk")
    given = {name: getattr(args, name) for name in (*names, "minutes", "data", "seed")}
    return Settings(
        **given,
        first=max(1, min(Settings.first, args.max_context // 8)),  # room for three doublings
        positions=args.positions or "learned",
        tokenizer=args.tokenizer or "gpt2",
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
