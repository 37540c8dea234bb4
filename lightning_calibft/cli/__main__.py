"""Run the command with ``python -m lightning_calibft.cli``."""

import sys

from lightning_calibft.cli import main

sys.exit(main())
