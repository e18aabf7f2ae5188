"""`python -m bake` is the command `bake`."""

import sys

from bake.cli import main

sys.exit(main())
