"""Checkpoints: transformers' folders (config.json, model.safetensors), and those a run resumes from.

A run's checkpoint is such a folder too, with the optimizer's state beside the weights. It is written under
a temporary name, flushed to the disk and renamed, and only then named in the file `latest`: a process
that is killed at any moment leaves the one before it whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from fastattn.gpt2.config import read_config, write_config
from fastattn.gpt2.model import GPT2, AttentionKind

_PREFIX: Final = "transformer."
_HEAD: Final = "lm_head.weight"  # tied to wte, so that files leave it out
_CAUSAL_MASKS: Final = (".attn.bias", ".attn.masked_bias")  # constants that old checkpoints carry
_LATEST: Final = "latest"
_TEMPORARY: Final = ".writing-"


def load_model(
    folder: str | os.PathLike[str],
    attention: AttentionKind = "fastattn",
    *,
    dropout: float | None = None,
    fused: Collection[str] | None = None,
) -> GPT2:
    """A GPT-2 of a folder with `config.json` and `model.safetensors`, as transformers saves it.

    Args:
        folder: may hold shards, where there is a `model.safetensors.index.json`.
        attention: see `GPT2`.
        dropout: the probability everywhere; the config's three if None.
        fused: see `GPT2`.

    Returns:
        The model on the CPU in float32, in training mode.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: not a GPT-2, or tensors that are missing, unexpected or of another shape.
        NotImplementedError: an option in `config.json` that changes the mathematics and is not supported.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path}: expected a folder with config.json and model.safetensors")
    config = read_config(path / "config.json")
    if dropout is not None:
        config = config.with_dropout(dropout)
    with torch.device("meta"):
        model = GPT2(config, attention, fused)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    given = _read_weights(path)
    if _HEAD not in given and _PREFIX + "wte.weight" in given:
        given[_HEAD] = given[_PREFIX + "wte.weight"]
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{path}: expected GPT-2's tensors, missing {missing[:8]}, unexpected {unexpected[:8]}"
        )
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(f"{path}: {name}: expected shape {list(shape)}, got {list(given[name].shape)}")
    if not torch.equal(given[_HEAD], given[_PREFIX + "wte.weight"]):
        raise ValueError(f"{path}: expected {_HEAD} tied to {_PREFIX}wte.weight, got other values")
    # Copies: what safetensors gives is the file itself, mapped, and writing to that folder would change it.
    owned = {name: tensor.to(torch.float32, copy=True) for name, tensor in given.items()}
    model.load_state_dict(owned, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    return model.requires_grad_(True)


def save_model(model: GPT2, folder: str | os.PathLike[str], *, end_of_text: int | None = None) -> None:
    """Write `config.json` and `model.safetensors` as transformers reads them.

    Args:
        model: on any device.
        folder: made if it is not there.
        end_of_text: the id that ends a document, for `config.json`.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    write_config(model.config, path / "config.json", end_of_text)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != _HEAD}
    _save_tensors(weights, path / "model.safetensors")


def save_run(
    folder: Path,
    model: GPT2,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    *,
    keep: int,
    end_of_text: int | None = None,
) -> Path:
    """Write a checkpoint of a run, whole or not at all, and make it the latest.

    Args:
        folder: of all checkpoints of the run.
        model: its weights.
        optimizer: its state; its parameters are the model's.
        state: anything JSON holds; ``state["step"]``, the steps done, names the checkpoint.
        keep: how many checkpoints stay, at least 1; older ones go.
        end_of_text: see `save_model`.

    Returns:
        The checkpoint's folder.
    """
    final = folder / f"step-{state['step']:08d}"
    if latest_run(folder) == final:
        return final
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (
        *folder.glob(_TEMPORARY + "*"),
        final,
    ):  # of a process that was killed before `latest` named it
        shutil.rmtree(stale, ignore_errors=True)
    temporary = folder / (_TEMPORARY + final.name)
    save_model(model, temporary, end_of_text=end_of_text)
    _save_tensors(_optimizer_tensors(model, optimizer), temporary / "optimizer.safetensors")
    (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for file in temporary.iterdir():
        _flush(file)
    _flush(temporary)
    temporary.rename(final)
    _flush(folder)
    pointer = folder / (_TEMPORARY + _LATEST)
    pointer.write_text(final.name + "\n", encoding="utf-8")
    _flush(pointer)
    pointer.replace(folder / _LATEST)
    _flush(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if old != final:
            shutil.rmtree(old)
    return final


def latest_run(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    pointer = folder / _LATEST
    return folder / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_run` was given as `state`."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    return state


def load_optimizer(checkpoint: Path, model: GPT2, optimizer: torch.optim.Optimizer) -> None:
    """Give `optimizer` the state it had when `save_run` wrote the checkpoint.

    Raises:
        ValueError: the state of other parameters.
    """
    tensors = _safetensors().load_file(checkpoint / "optimizer.safetensors")
    names = {parameter: name for name, parameter in model.named_parameters()}
    content = optimizer.state_dict()
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    expected, given = set(ordered), {name.split("/", 1)[1] for name in tensors}
    if given and expected != given:
        raise ValueError(
            f"{checkpoint}: expected the state of {sorted(expected)[:4]}, … got {sorted(given)[:4]}, …"
        )
    positions = {name: position for position, name in enumerate(ordered)}
    content["state"] = {}
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        content["state"].setdefault(positions[name], {})[kind] = tensor.clone()
    optimizer.load_state_dict(content)


def _optimizer_tensors(model: GPT2, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{kind}/{name}": value
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }


def _read_weights(path: Path) -> dict[str, Tensor]:
    load_file = _safetensors().load_file
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    weights: dict[str, Tensor] = {}
    for file in files:
        if not (path / file).is_file():
            raise FileNotFoundError(f"{path}: expected {file} (weights in safetensors format)")
        weights |= load_file(path / file)
    # OpenAI's own upload has the names without their prefix.
    prefixed = {
        name if name.startswith((_PREFIX, _HEAD)) else _PREFIX + name: x for name, x in weights.items()
    }
    return {name: x for name, x in prefixed.items() if not name.endswith(_CAUSAL_MASKS)}


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    content = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    _safetensors().save_file(content, path, metadata={"format": "pt"})


def _safetensors() -> Any:
    try:
        import safetensors.torch  # noqa: PLC0415, so that training without checkpoints needs no package
    except ModuleNotFoundError:
        raise ModuleNotFoundError("checkpoints need safetensors: pip install safetensors") from None
    return safetensors.torch


def _flush(path: Path) -> None:
    """Have the disk hold a file's or folder's content before anything after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
