"""Plots are drawn where matplotlib is installed, and left out where it is not."""

from __future__ import annotations

import importlib
from typing import Any


def plots_of(package: str) -> Any:
    """The module `plots` of a package, which imports matplotlib; None where that is missing."""
    try:
        return importlib.import_module(f"{package}.plots")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        return None
