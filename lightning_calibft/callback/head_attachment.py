"""Keep the calibration's buffers in the head: before weights are restored into it, and where the head is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_calibft.callback.checkpoint_files import restore_calibration
from lightning_calibft.callback.lightning_package import LightningModule
from lightning_calibft.callback.trainer_data import is_model_parallel
from lightning_calibft.checkpoint.state import MASK
from lightning_calibft.head.attach import attach_at, check_several_classes, detach
from lightning_calibft.head.copies import copies_of, split_copies
from lightning_calibft.head.find import HeadNotFoundError, SeveralHeadsError, find_head_outside
from lightning_calibft.head.layers import as_tuple, frozen_networks, num_classes, width_of
from lightning_calibft.head.offset import attached_heads, is_attached, offset_of

# Where a module may build its network, after a callback's `setup`.
_BUILDING_HOOKS = ("setup", "configure_model", "on_load_checkpoint", "on_fit_start", "on_train_start")


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
        self._heads: dict[str, nn.Module] = {}  # that carry the calibration, by name
        self._guessed = False  # whether neither the user nor an earlier fit has named the head
        self._trained: set[nn.Parameter] = set()

    def attach_or_wait(self, model: LightningModule, sharded: bool) -> None:
        """Attach the calibration now, or when weights are restored if the head does not exist yet.

        In both cases, a head that the module builds anew before weights are restored is attached, too.

        Args:
            model: The module, before its own ``setup`` and ``configure_model``.
            sharded: Whether ``configure_model`` may shard the head. torch would shard an attached calibration with it,
                so in this case the calibration is attached later.

        Raises:
            ValueError: If ``head`` names no head or ``check`` refuses it, and the module has no hook in which it could
                still build another.
        """
        self.stop_waiting()
        self._heads, self._trained = {}, set()
        self._guessed = self._head is None and not attached_heads(model)
        if sharded:
            # Before weights are restored from a sharded folder, the state dict is taken.
            register = model.register_state_dict_pre_hook
            self._waiting = register(lambda *_: self._attach(model))  # type: ignore[no-untyped-call]
            return
        try:
            self._attach(model)
        except (HeadNotFoundError, SeveralHeadsError):
            pass  # it may be built later; the weights to be restored, or the optimizer, may show which one is meant
        except ValueError:
            if not any(_has_own(model, hook) for hook in _BUILDING_HOOKS):
                raise
        register = model.register_load_state_dict_pre_hook
        self._waiting = register(  # type: ignore[no-untyped-call]
            lambda _, state_dict, *__: self._attach_for(model, state_dict)
        )

    def ensure(self, trainer: Any, model: LightningModule) -> bool:
        """Attach the calibration if it is missing. By now, the module is complete.

        Returns:
            Whether the module has another head than before, or one of another width.

        Raises:
            ValueError: If the head is not found, or ``check`` refuses it.
        """
        self.stop_waiting()
        self._trained = set(_parameters_in_training(trainer))
        heads = attached_heads(model)
        for head in heads.values():  # one that was attached in eval mode is not in the modes that Lightning restores
            offset_of(head).train(head.training)
        if heads and heads == self._heads and all(map(_fits, heads.values())) and not self._is_in_frozen(model):
            return False
        same = bool(self._heads) and self._is_in_place(model) and all(map(_fits, self._heads.values()))
        self._attach(model)
        if not heads and is_model_parallel(trainer):
            restore_calibration(trainer, model)
        return not same

    def stop_waiting(self) -> None:
        """Remove the hook that waits for the head."""
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None

    def _attach(self, model: LightningModule) -> None:
        in_place = self._is_in_place(model)
        replaced = [] if in_place else [offset_of(head) for head in self._heads.values() if is_attached(head)]
        if replaced or self._is_in_frozen(model):
            detach(model)  # what is left of it, such as the old head under another name
        heads = self._find(model)
        self._attach_at(model, heads, copies_of(model, heads), num_classes(heads))
        for old, new in zip(replaced, map(offset_of, self._heads.values()), strict=False):
            if len(old.mask) == len(new.mask):
                new.load_state_dict(old.state_dict())

    def _find(self, model: LightningModule) -> tuple[nn.Module, ...]:
        try:
            return as_tuple(find_head_outside(model, self._head, frozen_networks(model, self._trained)))
        except SeveralHeadsError as error:
            first, *others = error.heads
            if set(others) <= set(copies_of(model, first)):  # the first batch will show which of them is evaluated
                return first
            raise

    def _is_in_frozen(self, model: LightningModule) -> bool:
        """Return whether the head that was found is in a network that the optimizer does not train, as it now shows."""
        if not self._guessed or not self._trained or len(self._heads) != 1:
            return False
        frozen = chain.from_iterable(network.modules() for network in frozen_networks(model, self._trained))
        return not set(self._heads.values()).isdisjoint(frozen)

    def _attach_for(self, model: LightningModule, state_dict: Mapping[str, Any]) -> None:
        """Attach to the head, or, if it is not known, to the modules whose calibration is about to be restored."""
        with suppress(ValueError):  # what is still wrong when the module is complete is raised then
            self._attach(model)
        masks = {key.removesuffix(MASK).rstrip("."): value for key, value in state_dict.items() if key.endswith(MASK)}
        widths = {len(mask) for mask in masks.values()}
        if self._head is not None or len(widths) != 1:
            return
        # The weights are those of another module if it does not have all the heads.
        with suppress(AttributeError, ValueError):
            heads = tuple(dict.fromkeys(map(model.get_submodule, masks)))  # one may have several names
            if set(heads) == set(attached_heads(model).values()):
                return
            detach(model)
            self._attach_at(model, *split_copies(model, heads), widths.pop())

    def _attach_at(
        self,
        model: LightningModule,
        heads: tuple[nn.Module, ...],
        copies: list[tuple[nn.Module, ...]],
        num_classes: int,
    ) -> None:
        check_several_classes(model, heads, num_classes)
        self._check(num_classes)
        attach_at(model, heads, copies, num_classes)
        self._heads = attached_heads(model)

    def _is_in_place(self, model: nn.Module) -> bool:
        """Return whether the attached heads are still those that the module uses, perhaps in wrappers."""
        modules = set(model.modules())
        for name, head in self._heads.items():
            try:
                there = model.get_submodule(name)
            except AttributeError:
                there = head
            if there is not head or head not in modules or not is_attached(head):
                return False
        return True


def _has_own(model: LightningModule, hook: str) -> bool:
    """Return whether a module overrides a hook of its LightningModule, of whichever package."""
    return not getattr(model, hook).__module__.startswith(("lightning.", "pytorch_lightning."))


def _parameters_in_training(trainer: Any) -> Iterator[nn.Parameter]:
    for optimizer in getattr(trainer, "optimizers", ()):
        for group in optimizer.param_groups:
            yield from (parameter for parameter in group["params"] if parameter.requires_grad)


def _fits(head: nn.Module) -> bool:
    """Return whether a head still has the width for which it was attached, as far as it says so."""
    return width_of(head) in (None, len(offset_of(head).mask))
