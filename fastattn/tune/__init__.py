"""`fastattn tune`: find block sizes, warps and stages for a GPU, and write them to the tuning table.

On a machine with a GPU each candidate's result is held against that of the row in use, then the candidates
are timed in rounds, and the fastest becomes a row `measured <device> <date>`. `--static`, which takes what
compiles without spills, and `--dry-run` need no GPU.
"""

from fastattn.tune.command import add_arguments, run

__all__ = ["add_arguments", "run"]
