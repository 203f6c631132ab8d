"""What the package's own tests are made of: public, so that a vendored kernel can be held to the same.

The rule is an error budget, not a tuned tolerance: a kernel may be wrong by twice what plain PyTorch in the
same dtype is wrong by, both against float64, plus a rounding band.
"""

from fastattn.testing.budget import Errors, assert_within_budget, attention_errors
from fastattn.testing.cases import BIASES, FEATURES, MASKS, OTHERS, Sizes, go_together, options_of, sizes_for
from fastattn.testing.isa import force_isa, present_isas
from fastattn.testing.operations import operation_errors
from fastattn.testing.poison import poisoned_memory

__all__ = [
    "BIASES",
    "Errors",
    "FEATURES",
    "MASKS",
    "OTHERS",
    "Sizes",
    "assert_within_budget",
    "attention_errors",
    "force_isa",
    "go_together",
    "operation_errors",
    "options_of",
    "poisoned_memory",
    "present_isas",
    "sizes_for",
]
