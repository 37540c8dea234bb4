"""The one place that knows that Lightning is published as two packages, each with its own classes."""

from __future__ import annotations

import inspect
import reprlib
import sys
from typing import TYPE_CHECKING, Any

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")

_SHORT = reprlib.Repr()
_SHORT.maxlist = _SHORT.maxdict = 10
_SHORT.maxstring = _SHORT.maxother = 60

if TYPE_CHECKING:
    from lightning.pytorch import Callback as Callback, LightningModule as LightningModule, Trainer as Trainer
    from lightning.pytorch.strategies import Strategy as Strategy
else:
    # For hints only. They come from here because LightningCLI executes such a block in the file of a callback.
    LightningModule = Strategy = Trainer = Any

    class Callback:
        """The base until a package is imported. It cannot be ``object``, which Python does not replace."""


class LightningCallback(Callback):
    """Derives from the ``Callback`` of each package that is imported, before or after this class, and imports none.

    Trainers and LightningCLI ask whether a callback is an instance or a subclass of the class of their own package.
    """

    def __repr__(self) -> str:
        """Show the arguments that are not the defaults, and of a long one only the beginning."""
        given = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value, default = vars(self).get(name, parameter.default), parameter.default
            if type(value) is not type(default) or value != default:  # a metric overloads `!=`
                given.append(f"{name}={_SHORT.repr(value)}")
        return f"{type(self).__name__}({', '.join(given)})"


def _derive_from_imported_packages() -> None:
    modules = [sys.modules.get(f"{package}.callbacks") for package in _PACKAGES]
    bases = tuple(module.Callback for module in modules if module is not None and hasattr(module, "Callback"))
    if bases:
        LightningCallback.__bases__ = bases


class _ImportWatch:
    """Sees each import before it happens, as a finder that finds nothing."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        # Each package imports much after its `Callback` class. So this is in time for whoever uses the package.
        if name.startswith(_PACKAGES):
            _derive_from_imported_packages()


_derive_from_imported_packages()
sys.meta_path.insert(0, _ImportWatch)  # before finders that may find Lightning


def lightning_of(instance: object) -> Any:
    """Return the package that a Trainer or LightningModule is of: ``lightning.pytorch`` or ``pytorch_lightning``.

    A Trainer works with the classes of its package, as in ``lightning_of(trainer).callbacks.ModelCheckpoint``.

    Args:
        instance: A Trainer, or an instance of another class of the two packages, or of a subclass of one.

    Raises:
        TypeError: If it comes from neither package.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> lightning_of(Trainer(logger=False, accelerator="cpu")).__name__
        'lightning.pytorch'
    """
    for kind in type(instance).__mro__:
        for package in _PACKAGES:
            if kind.__module__.startswith(f"{package}."):
                return sys.modules[package]
    raise TypeError(
        f"Expected a Trainer of `lightning.pytorch` or `pytorch_lightning`, but got a {type(instance).__name__}. After"
        " another training loop, call `lightning_calibft.calibrate(model, loader)`."
    )
