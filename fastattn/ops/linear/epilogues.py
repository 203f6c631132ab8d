"""What becomes of a product ``S = A B + bias``; ids as in csrc/linear/problem.h, where they are explained."""

from __future__ import annotations

from typing import Final

STORE: Final = 0
ADD: Final = 1
ACTIVATE: Final = 2
GATE: Final = 3
SLOPE: Final = 4
GATE_SLOPE: Final = 5
