"""install() puts fastattn in the place of the package flash_attn, and uninstall() takes it away again."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastattn.integrations.flash_attn as door
from fastattn.integrations.flash_attn import bert_padding, private


def present() -> dict[str, object]:
    return {name: module for name, module in sys.modules.items() if f"{name}.".startswith("flash_attn.")}


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    before = present()
    yield
    assert present() == before
    assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("fastattn")]


def test_imports_get_ours() -> None:
    with door.install():
        import flash_attn
        from flash_attn import flash_attn_func, flash_attn_with_kvcache
        from flash_attn.bert_padding import pad_input, unpad_input
        from flash_attn.flash_attn_interface import _flash_attn_forward, _wrapped_flash_attn_backward
        from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
        from flash_attn.modules.mha import FlashCrossAttention, FlashSelfAttention
        from flash_attn.ops.triton.rotary import apply_rotary

        assert flash_attn_func is door.flash_attn_func
        assert flash_attn_with_kvcache is door.flash_attn_with_kvcache
        assert (pad_input, unpad_input) == (bert_padding.pad_input, bert_padding.unpad_input)
        assert _flash_attn_forward is private._flash_attn_forward
        assert _wrapped_flash_attn_backward is private._flash_attn_backward
        assert flash_attn.flash_attn_interface.flash_attn_varlen_func is door.flash_attn_varlen_func
        assert flash_attn.modules.mha.FlashSelfAttention is FlashSelfAttention
        for thing in (RotaryEmbedding, apply_rotary_emb, FlashCrossAttention, apply_rotary):
            assert thing.__module__.startswith("fastattn.")
        version = [int(x) for x in flash_attn.__version__.split(".")]
        assert version[:2] == [2, 8]
        q = torch.randn(1, 5, 2, 8)
        assert flash_attn_func(q, q, q, causal=True).shape == q.shape
        module = pickle.dumps(FlashSelfAttention(causal=True))
    assert pickle.loads(module).causal
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_attn")


def test_what_asks_whether_it_is_there() -> None:
    with door.install():
        for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.layers.rotary"):
            spec = importlib.util.find_spec(name)
            assert spec is not None and spec.name == name
        import flash_attn

        for asked in ("flash-attn", "flash_attn", "Flash.Attn"):
            assert importlib.metadata.version(asked) == flash_attn.__version__
        distribution = importlib.metadata.distribution("flash-attn")
        assert distribution.metadata["Name"] == "flash-attn"
        assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
        # The others are found as ever.
        assert importlib.metadata.version("torch").split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.parametrize("name", ["flash_attn.losses.cross_entropy", "flash_attn.cute", "flash_attn_2_cuda"])
def test_what_it_has_not_is_not_there(name: str) -> None:
    with door.install(), pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_calls_nest() -> None:
    with door.install():
        with door.install():
            assert importlib.import_module("flash_attn").flash_attn_func is door.flash_attn_func
        assert importlib.import_module("flash_attn").flash_attn_func is door.flash_attn_func
        assert importlib.metadata.version("flash-attn")


def test_an_error_inside_uninstalls() -> None:
    with pytest.raises(KeyError), door.install():
        raise KeyError


@pytest.mark.parametrize(
    ("module", "name", "instead"),
    [
        ("flash_attn_interface", "FlashAttnFunc", "flash_attn_func"),
        ("bert_padding", "IndexFirstAxis", "index_first_axis"),
        ("layers.rotary", "ApplyRotaryEmb", "apply_rotary_emb"),
        ("modules.mha", "MHA", "FlashSelfAttention"),
        ("modules.mha", "SelfAttention", "FlashSelfAttention"),
    ],
)
def test_a_class_that_is_not_there_says_what_to_use(module: str, name: str, instead: str) -> None:
    with door.install():
        with pytest.raises(ImportError, match=f"{name}.*use {instead}"):
            exec(f"from flash_attn.{module} import {name}")
        found = importlib.import_module(f"flash_attn.{module}")
        assert hasattr(found, instead)
        assert not hasattr(found, "no_such_thing")
        with pytest.raises(ImportError, match="cannot import name 'no_such_thing'"):
            exec(f"from flash_attn.{module} import no_such_thing")


@pytest.mark.parametrize("interleaved", [False, True])
def test_small_functions(interleaved: bool) -> None:
    with door.install():
        from flash_attn.flash_attn_interface import maybe_contiguous
        from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_torch
    x, angle = torch.randn(2, 5, 3, 10), torch.randn(5, 3)
    want = apply_rotary_emb(x, angle.cos(), angle.sin(), interleaved)
    for given in (angle, angle.expand(2, 5, 3)):
        torch.testing.assert_close(apply_rotary_emb_torch(x, given.cos(), given.sin(), interleaved), want)
    assert maybe_contiguous(None) is None
    assert maybe_contiguous(x) is x
    assert maybe_contiguous(x.transpose(2, 3)).is_contiguous()


def test_an_error_inside_is_the_one_that_is_raised() -> None:
    with pytest.raises(KeyError, match="the user's"), door.install():
        door.uninstall()
        raise KeyError("the user's")


def test_each_takes_out_its_own() -> None:
    before = present()
    first = door.install()
    ours = present()
    second = door.install()
    theirs = present()
    for _ in range(2):
        first.__exit__(None, None, None)
        assert present() == theirs != ours
    with door.install():
        pass
    assert present() == theirs
    for _ in range(2):
        second.__exit__(None, None, None)
        assert present() == before
    assert importlib.util.find_spec("flash_attn") is None or before
    with pytest.raises(RuntimeError, match="install"):
        door.uninstall()


def test_without_install() -> None:
    with pytest.raises(RuntimeError, match="install"):
        door.uninstall()


def test_a_real_one_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text(
        "__version__ = '2.7.0'\nfrom flash_attn.real import flash_attn_func\n"
    )
    (package / "real.py").write_text("def flash_attn_func(): return 'real'\n")
    (package / "late.py").write_text("from flash_attn import flash_attn_func\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        import flash_attn as real

        door.install()
        import flash_attn as ours

        assert ours is not real and ours.flash_attn_func is door.flash_attn_func
        # Nothing of the real one is reached through ours.
        for name in ("flash_attn.real", "flash_attn.late"):
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(name)
        door.uninstall()
        import flash_attn as again

        assert again is real and sys.modules["flash_attn.real"] is real.real
        assert importlib.import_module("flash_attn.late").flash_attn_func() == "real"
    finally:
        for name in present():
            del sys.modules[name]


TRANSFORMERS = """
import fastattn.integrations.flash_attn as door
door.install()
import transformers.utils.import_utils as utils
utils.is_torch_cuda_available = lambda: True
assert utils.is_flash_attn_2_available(), "flash_attention_2"
assert utils.is_flash_attn_greater_or_equal("2.4.1")
assert not utils.is_flash_attn_4_available()
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
names = [f for f in lazy_import_flash_attention("flash_attention_2")[0] if callable(f)]
assert door.flash_attn_func in names and door.flash_attn_varlen_func in names, names
"""


@pytest.mark.slow
def test_transformers_takes_it_where_there_is_a_gpu() -> None:
    pytest.importorskip("transformers")
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
