"""Bring back the classes that fine-tuning made a classifier forget."""

from lightning_calibft.split import ClassSplit

__all__ = ["ClassSplit"]
