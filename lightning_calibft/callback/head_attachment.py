"""Put the calibration's buffers into the head before weights are restored into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle

from lightning_calibft.callback.checkpoint_files import restore_calibration
from lightning_calibft.callback.lightning_package import LightningModule
from lightning_calibft.callback.trainer_data import is_model_parallel
from lightning_calibft.head.attach import attach
from lightning_calibft.head.find import HeadNotFoundError, find_head
from lightning_calibft.head.layers import num_classes
from lightning_calibft.head.offset import attached_heads


class HeadAttachment:
    """Attaches the calibration to a module's head, at the latest when weights are restored or :meth:`ensure` is called.

    Args:
        head: As in :func:`~lightning_calibft.find_head`.
        check: Called with the number of classes of the head before the calibration is attached. If it raises, the
            module does not change.
    """

    def __init__(self, head: str | None, check: Callable[[int], None]) -> None:
        self._head = head
        self._check = check
        self._waiting: RemovableHandle | None = None

    def attach_or_wait(self, model: LightningModule, sharded: bool) -> None:
        """Attach the calibration now, or when weights are restored if the head does not exist yet.

        Args:
            model: The module, before its own ``setup`` and ``configure_model``.
            sharded: Whether ``configure_model`` may shard the head. torch would shard an attached calibration with it,
                so in this case the calibration is attached later.

        Raises:
            ValueError: If several modules could be the head, or ``check`` refuses it.
        """
        self.stop_waiting()
        if sharded:
            # Before weights are restored from a sharded folder, the state dict is taken.
            register = model.register_state_dict_pre_hook
            self._waiting = register(lambda *_: self._attach(model))  # type: ignore[no-untyped-call]
            return
        try:
            self._attach(model)
        except HeadNotFoundError:
            # The module may build its head in `setup` or `configure_model`.
            register = model.register_load_state_dict_pre_hook
            self._waiting = register(lambda *_: self._attach(model))  # type: ignore[no-untyped-call]

    def ensure(self, trainer: Any, model: LightningModule) -> None:
        """Attach the calibration if it is missing. By now, the module is complete.

        Raises:
            ValueError: If the head is not found, or ``check`` refuses it.
        """
        attached = bool(attached_heads(model))
        if attached and self._waiting is None:
            return
        self.stop_waiting()
        self._attach(model)  # since `attach_or_wait`, the module has built its head, perhaps again
        if not attached and is_model_parallel(trainer):
            restore_calibration(trainer, model)

    def stop_waiting(self) -> None:
        """Remove the hook that waits for the head."""
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None

    def _attach(self, model: LightningModule) -> None:
        self._check(num_classes(find_head(model, self._head)))
        attach(model, self._head)
