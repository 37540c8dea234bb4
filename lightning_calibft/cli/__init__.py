"""The command ``calibft``."""

from lightning_calibft.cli.main import main

__all__ = ["main"]
