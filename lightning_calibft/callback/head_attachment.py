"""Putting the calibration's buffers into the head before any weights are restored into it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch.utils.hooks import RemovableHandle

from lightning_calibft.callback.checkpoint_files import restore_calibration
from lightning_calibft.callback.trainer_data import is_model_parallel
from lightning_calibft.head import attach, attached_heads
from lightning_calibft.head.find import HeadNotFoundError


class HeadAttachment:
    """Attaches the calibration to a module's head: now if the head exists, else when weights are restored into it.

    Args:
        head: As in :func:`~lightning_calibft.find_head`.
    """

    def __init__(self, head: str | None) -> None:
        self._head = head
        self._waiting: RemovableHandle | None = None

    def attach_or_wait(self, model: LightningModule, sharded: bool) -> bool:
        """Attach, or wait for the head to be built; return whether the head is attached.

        Args:
            model: The module, before its own ``setup`` and ``configure_model``.
            sharded: Whether ``configure_model`` shards the head. torch would shard all that belongs to it, so the
                calibration comes after that.
        """
        self.stop_waiting()
        if sharded:
            # Weights of a sharded folder are restored into what the state dict has by then.
            self._waiting = model.register_state_dict_pre_hook(lambda *_: self._attach(model))
            return False
        try:
            self._attach(model)
        except HeadNotFoundError:
            # The module may build it in `setup` or `configure_model`.
            self._waiting = model.register_load_state_dict_pre_hook(lambda *_: self._attach(model))
            return False
        return True

    def ensure(self, trainer: Any, model: LightningModule) -> bool:
        """Attach what is not attached yet, for the module is complete by now; return whether there was need."""
        attached = bool(attached_heads(model))
        if attached and self._waiting is None:
            return False
        self.stop_waiting()
        self._attach(model)  # the module has built its head, perhaps a second time, since `attach_or_wait`
        if not attached and is_model_parallel(trainer):
            restore_calibration(trainer, model)
        return True

    def stop_waiting(self) -> None:
        """Take the hooks away that wait for the head."""
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None

    def _attach(self, model: LightningModule) -> None:
        attach(model, self._head)
