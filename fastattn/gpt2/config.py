"""The sizes of the GPT-2 family, and `config.json` as transformers writes it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

# Of transformers' GPT2Config: what changes the mathematics, its default, and the values `model.py` computes.
_SUPPORTED: Final[dict[str, tuple[object, ...]]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}

_ROTARY: Final = "fastattn-gpt2-rotary"


@dataclass(frozen=True)
class GPT2Config:
    """Sizes and dropout; the defaults are GPT-2 124M's, the names those of transformers' `config.json`.

    `positions` is ours: "learned" for GPT-2's own table of `n_positions` rows, or "rotary" for queries and
    keys that are turned instead (Su et al., "RoFormer", 2021), which is no GPT-2 to transformers.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    positions: str = "learned"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head: expected a divisor of n_embd {self.n_embd}, got {self.n_head}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: expected a probability in [0, 1), got {getattr(self, name)}")
        if self.positions not in ("learned", "rotary"):
            raise ValueError(f"positions: expected 'learned' or 'rotary', got {self.positions!r}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"positions: expected an even head_dim with 'rotary', got {self.head_dim}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def with_dropout(self, dropout: float) -> GPT2Config:
        """The same sizes with one dropout probability everywhere."""
        return replace(self, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout)


SIZES: Final = {
    "tiny": GPT2Config(n_embd=128, n_layer=4, n_head=4),
    "mini": GPT2Config(n_embd=384, n_layer=6, n_head=6),
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
}
_ALIASES: Final = {
    "124M": "gpt2",
    "355M": "gpt2-medium",
    "774M": "gpt2-large",
    "1558M": "gpt2-xl",
    "1.5B": "gpt2-xl",
}


def config_of(size: str) -> GPT2Config:
    """The configuration of a size by name: ``"gpt2"`` or ``"124M"`` and so on up to ``"gpt2-xl"``.

    Raises:
        ValueError: no such name.

    Example:
        >>> config_of("355M").n_layer
        24
    """
    return SIZES[size_name(size)]


def size_name(size: str) -> str:
    """The one name of a size that has two.

    Raises:
        ValueError: no such name.

    Example:
        >>> size_name("124M"), size_name("tiny")
        ('gpt2', 'tiny')
    """
    name = _ALIASES.get(size, size)
    if name not in SIZES:
        raise ValueError(f"size: expected one of {[*SIZES, *_ALIASES]}, got {size!r}")
    return name


def read_config(path: Path) -> GPT2Config:
    """A `GPT2Config` of transformers' `config.json`.

    Raises:
        ValueError: not of a GPT-2.
        NotImplementedError: an option that changes the mathematics and is not in `model.py`.
    """
    given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    kind = given.get("model_type")
    if kind not in ("gpt2", _ROTARY):
        raise ValueError(f"{path}: expected model_type 'gpt2', got {kind!r}")
    for option, supported in _SUPPORTED.items():
        if given.get(option, supported[0]) not in supported:
            raise NotImplementedError(
                f"{path}: expected {option} in {list(supported)}, got {given[option]!r}"
            )
    known = {option.name: given[option.name] for option in fields(GPT2Config) if option.name in given}
    return GPT2Config(**known | {"positions": "rotary" if kind == _ROTARY else "learned"})


def write_config(config: GPT2Config, path: Path, end_of_text: int | None = None) -> None:
    """`config.json` as transformers reads it; with rotary positions under a name that it does not know."""
    content = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **asdict(config)}
    if content.pop("positions") == "rotary":
        content |= {"model_type": _ROTARY, "architectures": ["GPT2"]}
    content |= {option: supported[0] for option, supported in _SUPPORTED.items()}
    content |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "dtype": "float32"}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
