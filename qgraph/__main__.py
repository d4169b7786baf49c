"""`python -m qgraph` is the command `qgraph`."""

import sys

from qgraph.cli import main

sys.exit(main())
