"""What the package's own tests are made of: public, so that a vendored kernel can be held to the same.

The rule is an error budget, not a tuned tolerance: a kernel may be wrong by twice what plain PyTorch in the
same dtype is wrong by, both against float64, plus a rounding band.
"""

from fastattn.testing.budget import Errors, assert_within_budget, attention_errors
from fastattn.testing.isa import force_isa, present_isas
from fastattn.testing.poison import poisoned_memory

__all__ = [
    "Errors",
    "assert_within_budget",
    "attention_errors",
    "force_isa",
    "poisoned_memory",
    "present_isas",
]
