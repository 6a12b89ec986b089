"""`python -m pipelines` is the command `cmforge`."""

import sys

from pipelines.cli import main

sys.exit(main())
