"""Keep the calibration's buffers in the head: before weights are restored into it, and where the head is replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_calibft.callback.checkpoint_files import restore_calibration
from lightning_calibft.callback.trainer_data import is_model_parallel
from lightning_calibft.checkpoint.state import MASK
from lightning_calibft.head.attach import attach_at, check_several_classes, detach
from lightning_calibft.head.copies import copies_of, in_place_of, split_copies
from lightning_calibft.head.find import HeadNotFoundError, SeveralHeadsError, find_head
from lightning_calibft.head.layers import as_tuple, num_classes, width_of
from lightning_calibft.head.offset import AbsentClassOffset, attached_copies, attached_heads, is_attached, offset_of

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
        self._before: dict[nn.Module, list[Tensor]] = {}  # the weights of copies of the head, before the fit
        self._frozen: set[nn.Module] = set()
        self._trained: set[nn.Parameter] = set()
        # While it is watched which copy is evaluated: those that ran, all, and what each counts.
        self._ran: set[AbsentClassOffset] = set()
        self._copies: dict[tuple[nn.Module, ...], list[AbsentClassOffset]] = {}
        self._weights: dict[AbsentClassOffset, float] = {}
        self._evaluated: tuple[nn.Module, ...] = ()
        self._paused: list[tuple[Tensor, Tensor]] = []

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
        self._heads, self._trained, self._evaluated = {}, set(), ()
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
        if heads and heads == self._heads and all(map(_fits, heads.values())):
            return False
        same = bool(self._heads) and self._is_in_place(model) and all(map(_fits, self._heads.values()))
        self._attach(model)
        self._remember_weights()
        if not heads and is_model_parallel(trainer):
            restore_calibration(trainer, model)
        return not same

    def watch_copies(self) -> None:
        """Remember the weights of copies of the head, as a fit begins. A teacher will still have them at its end."""
        self._before, self._frozen = {}, set()
        self._remember_weights()

    def leave_out_frozen_copies(self) -> None:
        """Let copies that do not give the logits, and that the fit has not changed so far, stay without gamma.

        A copy that the fit does change is an average of the weights, or has them. It gets the same gamma.
        """
        for head, before in self._before.items():
            child = offset_of(head) if is_attached(head) else None
            if child is None or child.coefficient != 0 or (child.left_out and head not in self._frozen):
                continue
            child.left_out = all(map(torch.equal, _weights(head), before))
            self._frozen.add(head)

    def watch_evaluation(self, model: LightningModule) -> None:
        """See in the next evaluation batch which copy of its network the module evaluates, if there are several."""
        copies = attached_copies(model)
        if len(copies) < 2 or self._evaluated in copies:
            return
        self._copies, self._ran = {copy: [offset_of(head) for head in copy] for copy in copies}, set()
        self._weights = {child: child.coefficient for child in chain.from_iterable(self._copies.values())}
        for children in self._copies.values():
            for child in children:
                child.set_recorders((*child.recorders, self._note))
                if 0 in self._weights.values():  # the copy that `forward` does not call may be the one to record
                    child.coefficient = 1 / len(children)

    def end_evaluation_batch(self) -> None:
        """Let the copy count that the batch has run, if it has run one only."""
        copies, self._copies = self._copies, {}
        for child, coefficient in self._weights.items():
            child.set_recorders(tuple(recorder for recorder in child.recorders if recorder != self._note))
            child.coefficient = coefficient
        self._weights = {}
        ran = [copy for copy, children in copies.items() if self._ran.issuperset(children)]
        if len(ran) == 1:
            self._evaluated = ran[0]
            self._weigh_evaluated(copies)

    @contextmanager
    def evaluated_copy(self, model: LightningModule) -> Iterator[None]:
        """Run the copy of the network that the module evaluates wherever it runs one of the others."""
        copies = attached_copies(model)
        if self._evaluated not in copies:
            yield
            return
        others = [copy[0] for copy in copies if copy != self._evaluated]
        with in_place_of(model, self._evaluated[0], others):
            yield
        self._weigh_evaluated({copy: [offset_of(head) for head in copy] for copy in copies})

    def _weigh_evaluated(self, copies: Mapping[tuple[nn.Module, ...], list[AbsentClassOffset]]) -> None:
        for copy, children in copies.items():
            for child in children:
                if copy != self._evaluated:
                    child.coefficient = 0.0
                elif child.coefficient == 0:
                    child.coefficient = 1 / len(children)

    def _note(self, child: AbsentClassOffset, logits: Tensor) -> None:
        self._ran.add(child)

    def pause_gamma(self) -> None:
        """Take gamma out of the copies of the head for a training step, which may run one of them in eval mode."""
        if len(self._heads) > 1:
            children = map(offset_of, self._heads.values())
            self._paused = [(child.offset, child.offset.clone()) for child in children]
            for offset, _ in self._paused:
                offset.zero_()

    def resume_gamma(self) -> None:
        """Put gamma back after a training step."""
        paused, self._paused = self._paused, []
        for offset, gamma in paused:
            offset.copy_(gamma)

    def stop_waiting(self) -> None:
        """Remove the hook that waits for the head."""
        if self._waiting is not None:
            self._waiting.remove()
            self._waiting = None

    def _remember_weights(self) -> None:
        for head in self._heads.values() if len(self._heads) > 1 else ():
            self._before.setdefault(head, _weights(head))

    def _attach(self, model: LightningModule) -> None:
        replaced = {} if self._is_in_place(model) else self._heads
        if replaced:
            detach(model)  # what is left of it, such as the old head under another name
        heads = self._find(model)
        self._attach_at(model, heads, copies_of(model, heads), num_classes(heads))
        for old, new in zip(replaced.values(), self._heads.values(), strict=False):
            if len(offset_of(old).mask) == len(offset_of(new).mask):
                offset_of(new).load_state_dict(offset_of(old).state_dict())

    def _find(self, model: LightningModule) -> tuple[nn.Module, ...]:
        try:
            return as_tuple(find_head(model, self._head))
        except SeveralHeadsError as error:
            first, *others = error.heads
            if set(others) <= set(copies_of(model, first)):  # the first batch will show which of them is evaluated
                return first
            trained = [heads for heads in error.heads if any(map(self._is_trained, heads))]
            if len(trained) != 1:
                raise
            return trained[0]

    def _is_trained(self, head: nn.Module) -> bool:
        return not self._trained.isdisjoint(head.parameters())

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
            yield from group["params"]


def _fits(head: nn.Module) -> bool:
    """Return whether a head still has the width for which it was attached, as far as it says so."""
    return width_of(head) in (None, len(offset_of(head).mask))


def _weights(head: nn.Module) -> list[Tensor]:
    return [parameter.detach().cpu().clone() for parameter in head.parameters()]
