"""What a training run can be told: one list, for Python and for the command line."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import torch

from fastattn.gpt2.config import SIZES, config_of, size_name
from fastattn.gpt2.model import FUSED as MODEL_FUSED

# Peak learning rates: Brown et al., "Language Models are Few-Shot Learners", 2020, table 2.1; the two
# small sizes as nanoGPT's character model.
_LEARNING_RATES: Final = {768: 6e-4, 1024: 3e-4, 1280: 2.5e-4, 1600: 2e-4}
_SMALL: Final = 1e-3
_FINE_TUNING: Final = 3e-5
FUSED: Final = (*MODEL_FUSED, "optimizer")  # what `Options.fused` may name


def _option(default: Any, text: str, **argument: Any) -> Any:
    return field(default=default, metadata={"help": text, **argument})


@dataclass(frozen=True)
class Options:
    """Options of `train`, and of `fastattn train` under the same names with dashes."""

    size: str | None = _option(
        None, f"{', '.join(SIZES)}, or 124M … 1558M (gpt2 on a GPU, tiny on a CPU)", type=str
    )
    init: str | None = _option(
        None, "start from a folder with config.json and model.safetensors, instead of --size", type=str
    )
    attention: str = _option("fastattn", "standard, sdpa or fastattn")
    fused: str | None = _option(
        None, f"all, none, or some of {','.join(FUSED)} (all where --attention is fastattn)", type=str
    )
    dropout: float | None = _option(None, "everywhere (the model's own: 0.1)", type=float)
    data: str = _option("shakespeare", "shakespeare, a text file, a folder, or nanoGPT's .bin")
    tokenizer: str = _option("gpt2", "gpt2 or bytes")
    validation: float = _option(0.1, "share of the tokens to hold out")
    joined: bool = _option(False, "let examples run over the end of a document into the next")
    context: int = _option(1024, "tokens an example")
    batch: int = _option(4, "examples at a time")
    accumulate: int = _option(1, "batches a step")
    steps: int = _option(500, "optimizer steps")
    lr: float | None = _option(None, "peak learning rate (by size; 3e-5 with --init)", type=float)
    min_lr: float = _option(0.1, "share of the peak at the end of the cosine")
    warmup: int | None = _option(None, "steps of linear warm-up (a twentieth of them)", type=int)
    weight_decay: float = _option(0.1, "of matrices and embeddings")
    beta1: float = _option(0.9, "AdamW's")
    beta2: float = _option(0.95, "AdamW's")
    clip: float = _option(1.0, "largest norm of the gradient; 0 for any")
    seed: int = _option(1, "of weights, batches and dropout")
    device: str | None = _option(None, "cpu, cuda, cuda:1 … (cuda where there is one)", type=str)
    dtype: str = _option("auto", "auto, float32, or bfloat16 (autocast)")
    threads: int = _option(0, "CPU threads; 0 for torch's choice")
    compile: bool = _option(False, "torch.compile the model")
    gradient_checkpointing: bool = _option(False, "recompute each block in the backward pass: less memory")
    loss_chunk: int = _option(4096, "tokens whose logits are held at a time; 0 for all")
    eval_every: int = _option(100, "steps between validation losses; 0 for none")
    eval_batches: int = _option(8, "batches of a validation loss")
    save_every: int = _option(100, "steps between checkpoints")
    keep: int = _option(2, "checkpoints that stay")
    out: str = _option("runs/train", "folder of log and checkpoints")
    resume: bool = _option(False, "go on from the latest checkpoint in --out, if there is one")
    dry_run: bool = _option(False, "print the plan, with a measured step, and end")
    sample: str | None = _option(
        None, "at the end, continue this text (a new line if none is given)", type=str, nargs="?", const="\n"
    )
    sample_tokens: int = _option(200, "tokens of the sample")

    def __post_init__(self) -> None:
        least = {"context": 1, "batch": 1, "accumulate": 1, "steps": 1, "save_every": 1, "keep": 1}
        least |= {"eval_every": 0, "eval_batches": 1, "loss_chunk": 0, "threads": 0, "clip": 0, "seed": 0}
        least |= {"warmup": 0, "lr": 0, "min_lr": 0, "weight_decay": 0, "sample_tokens": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise ValueError(f"{name}: expected at least {bound}, got {value}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype: expected auto, float32 or bfloat16, got {self.dtype!r}")
        if self.device is not None:
            check_device(self.device)
        if self.dropout is not None and not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        if self.size is not None and self.init is not None:
            raise ValueError(f"expected one of size and init, got {self.size!r} and {self.init!r}")

        unknown = sorted(set(self.fused_names) - set(FUSED))
        if unknown:
            raise ValueError(f"fused: expected all, none or some of {','.join(FUSED)}, got {self.fused!r}")

    @property
    def fused_names(self) -> tuple[str, ...]:
        """What of `FUSED` is fastattn's; the rest is plain PyTorch."""
        text = self.fused or ("all" if self.attention == "fastattn" else "none")
        if text in ("all", "none"):
            return FUSED if text == "all" else ()
        return tuple(name.strip() for name in text.split(","))

    @property
    def model_fused(self) -> tuple[str, ...]:
        """The same of `GPT2`, without the optimizer."""
        return tuple(name for name in self.fused_names if name in MODEL_FUSED)

    def resolved(self) -> Options:
        """The same with every choice that was left open made, except `dropout`, which is the model's own."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        size = self.size or (None if self.init else "gpt2" if device.startswith("cuda") else "tiny")
        size = None if size is None else size_name(size)
        if self.lr is not None:
            lr = self.lr
        elif size is None:
            lr = _FINE_TUNING
        else:
            lr = _LEARNING_RATES.get(config_of(size).n_embd, _SMALL)
        warmup = max(1, self.steps // 20) if self.warmup is None else self.warmup
        return replace(self, device=device, size=size, lr=lr, warmup=warmup)


def check_device(device: str, name: str = "device") -> None:
    """Refuse a device that torch cannot use, or that GPT-2 is not trained on here.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        name: of the option, for the message.

    Raises:
        ValueError: anything else, or a GPU that is not there.

    Example:
        >>> check_device("mps")
        Traceback (most recent call last):
        ...
        ValueError: device: expected cpu, cuda or cuda:N, got 'mps'
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise ValueError(f"{name}: expected cpu, cuda or cuda:N, got {device!r}")
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"{name}: expected a GPU that torch can use, got {device!r} without one")
    count = torch.cuda.device_count()
    if int(match[1] or 0) >= count:
        raise ValueError(f"{name}: expected a GPU below cuda:{count}, got {device!r}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` an argument for each of `Options`."""
    for option in fields(Options):
        settings = dict(option.metadata)
        if isinstance(option.default, bool):
            settings["action"] = "store_true"
        else:
            settings.setdefault("type", type(option.default))
            settings["default"] = option.default
            if option.default is not None:
                settings["help"] += " (%(default)s)"
        parser.add_argument(f"--{option.name.replace('_', '-')}", **settings)


def from_arguments(args: argparse.Namespace) -> Options:
    """`Options` of what `add_arguments` parsed."""
    return Options(**{option.name: getattr(args, option.name) for option in fields(Options)})
