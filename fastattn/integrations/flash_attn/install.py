"""fastattn in the place of the package `flash_attn`, for code that imports that."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Final

from fastattn.integrations.flash_attn import (
    bert_padding,
    cache,
    functions,
    mha,
    packed,
    private,
    rotary,
)

VERSION: Final = "2.8.4"

_SEVEN: Final = {
    "flash_attn_func": functions,
    "flash_attn_varlen_func": functions,
    "flash_attn_qkvpacked_func": packed,
    "flash_attn_kvpacked_func": packed,
    "flash_attn_varlen_qkvpacked_func": packed,
    "flash_attn_varlen_kvpacked_func": packed,
    "flash_attn_with_kvcache": cache,
}
_PRIVATE: Final = (
    "_flash_attn_forward",
    "_flash_attn_backward",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
)
_ROTARY: Final = (
    "RotaryEmbedding",
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
)
_MHA: Final = ("FlashCrossAttention", "FlashSelfAttention", "get_alibi_slopes")
_BERT_PADDING: Final = (
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
)

# What flash-attn's modules have besides, and what to use instead.
_INSTEAD: Final = {
    "flash_attn.flash_attn_interface": {
        "FlashAttnFunc": "flash_attn_func",
        "FlashAttnKVPackedFunc": "flash_attn_kvpacked_func",
        "FlashAttnQKVPackedFunc": "flash_attn_qkvpacked_func",
        "FlashAttnVarlenFunc": "flash_attn_varlen_func",
        "FlashAttnVarlenKVPackedFunc": "flash_attn_varlen_kvpacked_func",
        "FlashAttnVarlenQKVPackedFunc": "flash_attn_varlen_qkvpacked_func",
    },
    "flash_attn.bert_padding": {
        "IndexFirstAxis": "index_first_axis",
        "IndexFirstAxisResidual": "index_first_axis_residual",
        "IndexPutFirstAxis": "index_put_first_axis",
    },
    "flash_attn.layers.rotary": {
        "ApplyRotaryEmb": "apply_rotary_emb",
        "ApplyRotaryEmbKV_": "apply_rotary_emb_kv_",
        "ApplyRotaryEmbQKV_": "apply_rotary_emb_qkv_",
    },
    "flash_attn.modules.mha": {
        "CrossAttention": "FlashCrossAttention",
        "MHA": "FlashSelfAttention between projections of your own",
        "SelfAttention": "FlashSelfAttention",
    },
}

# What was in sys.modules at each install that has not been undone.
_replaced: Final[list[dict[str, ModuleType]]] = []


class Installation:
    """What `install` returns: a context manager that undoes it at its end, if that has not been done."""

    def __init__(self, taken: dict[str, ModuleType]) -> None:
        self._taken = taken

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _undo(self._taken)


def install() -> Installation:
    """Put fastattn in the place of the package `flash_attn`: code that imports it from now on gets ours.

    There are `flash_attn` with the seven functions and `__version__`, `flash_attn.flash_attn_interface` with
    the private ones as well, `flash_attn.bert_padding`, `flash_attn.layers.rotary`,
    `flash_attn.ops.triton.rotary` and `flash_attn.modules.mha`. Importing any other of its modules raises
    ModuleNotFoundError, and of these asking for a class that is not there an ImportError that says what to
    use instead. For `importlib.metadata` there is a distribution ``flash-attn``, as long as this
    holds.

    A flash_attn that is really there is set aside, and is back after `uninstall`. Names that were imported
    before, and what has been remembered of a search for the package, stay as they are: call this first.
    transformers takes ``attn_implementation="flash_attention_2"`` on GPUs alone; `fastattn.integrations.
    transformers.register()` and ``attn_implementation="fastattn"`` is the way without one, and the better
    one.

    Returns:
        A context manager, which need not be used as one; at its end this install is undone, unless it has
        been by then.

    Example:
        >>> import torch
        >>> with install():
        ...     from flash_attn import flash_attn_func
        >>> flash_attn_func(*torch.randn(3, 1, 5, 2, 8)).shape
        torch.Size([1, 5, 2, 8])
    """
    taken = {name: module for name, module in sys.modules.items() if _is_flash_attn(name)}
    for name in taken:
        del sys.modules[name]
    sys.modules.update(_modules())
    if not _replaced:
        sys.meta_path.insert(0, _FINDER)
    _replaced.append(taken)
    return Installation(taken)


def uninstall() -> None:
    """Undo the last `install`: `flash_attn` is again what it was before, or is not there.

    Raises:
        RuntimeError: nothing is installed.
    """
    if not _replaced:
        raise RuntimeError("uninstall: expected an install() before it, there is none to undo")
    _undo(_replaced[-1])


def _undo(taken: dict[str, ModuleType]) -> None:
    """Take out the install that put these aside; nothing where it has been taken out before."""
    place = next((i for i, one in enumerate(_replaced) if one is taken), None)
    if place is None:
        return
    del _replaced[place]
    if place < len(_replaced):  # the modules are a later install's, which has now put these aside
        later = _replaced[place]
        later.clear()
        later.update(taken)
        return
    for name in [name for name in sys.modules if _is_flash_attn(name)]:
        del sys.modules[name]
    sys.modules.update(taken)
    if not _replaced and _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)


def _is_flash_attn(name: str) -> bool:
    return name == "flash_attn" or name.startswith("flash_attn.")


def _modules() -> dict[str, ModuleType]:
    seven = {name: getattr(module, name) for name, module in _SEVEN.items()}
    hidden = {name: getattr(private, name) for name in _PRIVATE}
    wrapped = {f"_wrapped{name}": function for name, function in hidden.items()}
    contents: dict[str, dict[str, Any]] = {
        "flash_attn": {**seven, "__version__": VERSION},
        "flash_attn.flash_attn_interface": {
            **seven,
            **hidden,
            **wrapped,
            "maybe_contiguous": private.maybe_contiguous,
        },
        "flash_attn.bert_padding": {name: getattr(bert_padding, name) for name in _BERT_PADDING},
        "flash_attn.layers": {},
        "flash_attn.layers.rotary": {name: getattr(rotary, name) for name in _ROTARY},
        "flash_attn.modules": {},
        "flash_attn.modules.mha": {name: getattr(mha, name) for name in _MHA},
        "flash_attn.ops": {},
        "flash_attn.ops.triton": {},
        "flash_attn.ops.triton.rotary": {"apply_rotary": rotary.apply_rotary},
    }
    modules = {}
    for name, content in contents.items():
        module = modules[name] = ModuleType(
            name, "fastattn in the place of flash-attn's module of this name."
        )
        is_package = any(other.startswith(f"{name}.") for other in contents)
        module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=is_package)
        module.__file__ = __file__
        module.__package__ = name if is_package else name.rpartition(".")[0]
        if is_package:
            module.__path__ = []
        module.__dict__.update(content)
        module.__dict__["__getattr__"] = partial(_missing, name)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, module)
    return modules


def _missing(module: str, name: str) -> Any:
    """The ``__getattr__`` of a module."""
    instead = _INSTEAD.get(module, {}).get(name)
    if instead is not None:  # an AttributeError's message would be lost in `from module import name`
        raise ImportError(
            f"cannot import name {name!r} from {module!r}: fastattn, which is installed in the place of "
            f"flash-attn, has no such class; use {instead}",
            name=module,
        )
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class _Metadata(Distribution):
    """The distribution ``flash-attn``, in memory."""

    def read_text(self, filename: str) -> str | None:
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\n"
            "Summary: fastattn in the place of flash-attn\n",
            "top_level.txt": "flash_attn\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent.joinpath(path)


class _Finder(DistributionFinder):
    """Finds that distribution, and no modules: those are in sys.modules."""

    def find_spec(self, *args: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterable[Distribution]:
        name = None if context is None else context.name
        if name is None or name.lower().replace("_", "-").replace(".", "-") == "flash-attn":
            yield _Metadata()


_FINDER: Final = _Finder()
