"""`fastattn explain-model MODULE`: which attentions of a model the pass replaces, and why not the others."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fastattn.compiler.model import explain_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `fastattn explain-model`."""
    parser.add_argument(
        "module",
        metavar="MODULE",
        help="what makes the model: package.module:name or path/to/file.py:name, a function, a class or a "
        "module; a function may return the model, or (model, args) or (model, args, kwargs) to call it with",
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="an input, as 2x1024 (token ids) or 2x1024x768:float32 (random numbers); once for each argument",
    )
    parser.add_argument(
        "--ids-below", type=int, default=100, metavar="N", help="token ids are below this (100)"
    )
    parser.add_argument("--eval", action="store_true", help="the model in evaluation, without gradients")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Explain what `args.module` names; 0 where every site would be rewritten, 3 where some are left."""
    try:
        model, given, named = _made(args.module)
        if args.input:
            given = tuple(_input(text, args.ids_below) for text in args.input)
    except ValueError as error:
        print(f"fastattn explain-model: {error}", file=sys.stderr)
        return 2
    model.train(not args.eval)
    try:
        with torch.set_grad_enabled(not args.eval):
            found = explain_model(model, *given, **named)
    except (TypeError, IndexError) as error:  # what a model says of inputs that are not its own
        line = str(error).strip().splitlines()[0]
        print(f"fastattn explain-model: the model failed: {line}", file=sys.stderr)
        print("  its inputs: --input SHAPE for each, --ids-below N for its vocabulary", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"schema": 1, **dataclasses.asdict(found)}, indent=2))
    else:
        print(found)
    return 0 if found.rewritten == found.seen else 3


def _made(text: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The model that `text` names, and what to call it with.

    Raises:
        ValueError: it names none.
    """
    where, _, name = text.rpartition(":")
    if not where:
        raise ValueError(f"expected package.module:name or path/to/file.py:name, got {text!r}")
    made = getattr(_loaded(where), name, None)
    if made is None:
        raise ValueError(f"there is no {name!r} in {where}")
    if not isinstance(made, nn.Module) and callable(made):
        made = made()
    given = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(given) <= 3 or not isinstance(given[0], nn.Module):
        raise ValueError(f"{text}: expected a torch.nn.Module, got {type(given[0]).__name__}")
    args = given[1] if len(given) > 1 else ()
    return given[0], args if isinstance(args, tuple) else (args,), given[2] if len(given) > 2 else {}


def _loaded(where: str) -> ModuleType:
    path = Path(where)
    try:
        if path.suffix != ".py":
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise ValueError(f"there is no file {where}")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not where.startswith(error.name):
            raise
        raise ValueError(f"there is no module {where}") from None
    return module


def _input(text: str, below: int) -> torch.Tensor:
    shape, _, dtype = text.partition(":")
    found = getattr(torch, dtype or "int64", None)
    try:
        sizes = [int(n) for n in shape.split("x")]
    except ValueError:
        sizes = []
    if not sizes or not isinstance(found, torch.dtype):
        raise ValueError(f"--input: expected a shape as 2x1024 or 2x1024x768:float32, got {text!r}")
    if found.is_floating_point:
        return torch.randn(sizes, dtype=found)
    return torch.randint(below, sizes, dtype=found)
