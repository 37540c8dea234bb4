"""Putting the calibration's buffers into the head before any weights are restored into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch.utils.hooks import RemovableHandle

from lightning_calibft.callback.checkpoint_files import restore_calibration
from lightning_calibft.callback.trainer_data import is_model_parallel
from lightning_calibft.head.attach import attach
from lightning_calibft.head.find import HeadNotFoundError, find_head
from lightning_calibft.head.layers import num_classes
from lightning_calibft.head.offset import attached_heads


class HeadAttachment:
    """Attaches the calibration to a module's head: now if the head exists, else when weights are restored into it.

    Args:
        head: As in :func:`~lightning_calibft.find_head`.
        check: Called with the number of classes of the head before it is attached. What it raises leaves the module as
            it was.
    """

    def __init__(self, head: str | None, check: Callable[[int], None]) -> None:
        self._head = head
        self._check = check
        self._waiting: RemovableHandle | None = None

    def attach_or_wait(self, model: LightningModule, sharded: bool) -> None:
        """Attach, or wait for the head to be built.

        Args:
            model: The module, before its own ``setup`` and ``configure_model``.
            sharded: Whether ``configure_model`` shards the head. torch would shard all that belongs to it, so the
                calibration comes after that.
        """
        self.stop_waiting()
        if sharded:
            # Weights of a sharded folder are restored into what the state dict has by then.
            register = model.register_state_dict_pre_hook
            self._waiting = register(lambda *_: self._attach(model))  # type: ignore[no-untyped-call]
            return
        try:
            self._attach(model)
        except HeadNotFoundError:
            # The module may build it in `setup` or `configure_model`.
            register = model.register_load_state_dict_pre_hook
            self._waiting = register(lambda *_: self._attach(model))  # type: ignore[no-untyped-call]

    def ensure(self, trainer: Any, model: LightningModule) -> None:
        """Attach what is not attached yet, for the module is complete by now."""
        attached = bool(attached_heads(model))
        if attached and self._waiting is None:
            return
        self.stop_waiting()
        self._attach(model)  # the module has built its head, perhaps a second time, since `attach_or_wait`
        if not attached and is_model_parallel(trainer):
            restore_calibration(trainer, model)

    def stop_waiting(self) -> None:
        """Take the hooks away that wait for the head."""
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None

    def _attach(self, model: LightningModule) -> None:
        self._check(num_classes(find_head(model, self._head)))
        attach(model, self._head)
