"""The ``calibft`` command."""

from lightning_calibft.cli.main import main

__all__ = ["main"]
