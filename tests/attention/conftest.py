"""Triton's interpreter without what it does over and over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.attention.cases import here, interpreted


@pytest.fixture(scope="session", autouse=True)
def patched_once() -> Iterator[None]:
    """At each call of a function in a kernel the language is patched anew, for a third of the time: a launch
    has done it, but for what a function's own module calls by another name, which stays patched."""
    if not (interpreted("triton") and "triton" in here()):
        yield
        return
    from triton.runtime import interpreter

    modules: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in modules:
            interpreter._patch_lang(self.fn)
            modules.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
