"""`python -m bake` is the command `bake`."""

import sys

from bake.cli.main import main

sys.exit(main())
