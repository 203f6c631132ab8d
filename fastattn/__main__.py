"""`python -m fastattn`: the same as the command `fastattn`."""

import sys

from fastattn.cli import main

sys.exit(main())
