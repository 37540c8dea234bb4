"""The one place that knows that Lightning is published as two packages, each with its own classes."""

from __future__ import annotations

import sys
from typing import Any

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def lightning_of(trainer: object) -> Any:
    """Return the package that a Trainer comes from: the module ``lightning.pytorch`` or ``pytorch_lightning``.

    The Trainer works with the classes of this package, as in ``lightning_of(trainer).callbacks.ModelCheckpoint``.

    Args:
        trainer: A Trainer, or an instance of any class of the two packages or of a subclass of one.

    Raises:
        TypeError: If it comes from neither package.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> lightning_of(Trainer(logger=False, accelerator="cpu")).__name__
        'lightning.pytorch'
    """
    for kind in type(trainer).__mro__:
        for package in _PACKAGES:
            if kind.__module__.startswith(f"{package}."):
                return sys.modules[package]
    raise TypeError(
        f"Expected a Trainer of `lightning.pytorch` or `pytorch_lightning`, but got a {type(trainer).__name__}."
    )
