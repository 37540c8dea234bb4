"""Decide which copy of its network a module evaluates, where it has several, such as an average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_calibft.calibration.distributed import SharedErrors
from lightning_calibft.callback.lightning_package import LightningModule
from lightning_calibft.head.copies import in_place_of
from lightning_calibft.head.offset import AbsentClassOffset, attached_copies, is_attached, offset_of

Checked = TypeVar("Checked")


class NetworkCopies:
    """The copies of the network in a module, whose heads are all attached.

    Gamma is found at the copy that the validation step runs, or else ``forward`` in eval mode, as the probe shows. The
    other copies get the same gamma, except for those that the fit does not change, such as teachers.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget all copies, as another fit or evaluation begins."""
        self._copies: dict[tuple[nn.Module, ...], list[AbsentClassOffset]] = {}
        self._evaluated: tuple[nn.Module, ...] = ()
        self._answers = True  # whether the evaluated copy is also that which `forward` runs
        self._settled: set[tuple[nn.Module, ...]] = set()  # the copies of which it is known which is evaluated
        self._before: dict[nn.Module, list[Tensor]] = {}
        self._frozen: set[nn.Module] = set()
        self._ran: set[AbsentClassOffset] = set()
        self._watched: dict[AbsentClassOffset, float] = {}  # with the coefficients from before
        self._paused: list[tuple[Tensor, Tensor]] = []

    def note(self, model: LightningModule) -> None:
        """Note the copies that there are now, and the weights of new ones. A teacher will still have them later."""
        copies = attached_copies(model)
        self._copies = {copy: list(map(offset_of, copy)) for copy in copies} if len(copies) > 1 else {}
        for head in chain.from_iterable(self._copies):
            self._before.setdefault(head, _weights(head))

    def leave_out_frozen(self) -> None:
        """Let copies that do not give the logits, and that the fit has not changed so far, stay without gamma."""
        for head, before in self._before.items():
            child = offset_of(head) if is_attached(head) else None
            if child is None or child.coefficient != 0 or (child.left_out and head not in self._frozen):
                continue
            child.left_out = all(map(torch.equal, _weights(head), before))
            self._frozen.add(head)

    def start_evaluation_batch(self) -> None:
        """See in this batch which copy the step of the module runs, unless it is known."""
        if not self._copies or self._settled == self._copies.keys():
            return
        self._ran = set()
        self._watched = {child: child.coefficient for child in chain.from_iterable(self._copies.values())}
        for children in self._copies.values():
            for child in children:
                child.set_recorders((*child.recorders, self._note_run))
                if 0 in self._watched.values():  # the copy that `forward` does not run may be the one to record
                    child.coefficient = 1 / len(children)

    def end_evaluation_batch(self) -> None:
        """Let the copy that the batch has run count, if there was only one."""
        watched, self._watched = self._watched, {}
        for child, coefficient in watched.items():
            child.set_recorders(tuple(recorder for recorder in child.recorders if recorder != self._note_run))
            child.coefficient = coefficient
        ran = [copy for copy, children in self._copies.items() if watched and self._ran.issuperset(children)]
        if ran:
            self._settled = set(self._copies)
        if len(ran) == 1:
            self._evaluated = ran[0]
            self._compare()

    def check_first_batch(self, model: LightningModule, check: Callable[[], Checked]) -> Checked:
        """Probe the head that ``forward`` runs, and then the one that the steps evaluate, if it is another."""
        checked = check()
        self._compare()
        # The check waits for all processes, some of which may not have evaluated a batch yet.
        if self._copies and any(SharedErrors().gather(lambda: not self._answers)):
            with self.evaluated(model):
                check()
        return checked

    @contextmanager
    def evaluated(self, model: LightningModule) -> Iterator[None]:
        """Run the copy that the steps evaluate wherever ``model`` would run one of the others."""
        if self._answers or self._evaluated not in self._copies:
            yield
            return
        others = [copy[0] for copy in self._copies if copy != self._evaluated]
        with in_place_of(model, self._evaluated[0], others):
            yield
        self._weigh()

    def pause_gamma(self) -> None:
        """Take gamma out of the copies for a training step, which may run one of them in eval mode."""
        self._paused = [(child.offset, child.offset.clone()) for child in chain.from_iterable(self._copies.values())]
        for offset, _ in self._paused:
            offset.zero_()

    def resume_gamma(self) -> None:
        """Put gamma back after a training step."""
        paused, self._paused = self._paused, []
        for offset, gamma in paused:
            offset.copy_(gamma)

    def _compare(self) -> None:
        """Compare what the steps evaluate with what the probe has found of ``forward``, and let the former count."""
        children = self._copies.get(self._evaluated, [])
        self._answers = all(child.coefficient != 0 for child in children)
        if not self._answers:
            self._weigh()

    def _weigh(self) -> None:
        for copy, children in self._copies.items():
            for child in children:
                if copy != self._evaluated:
                    child.coefficient = 0.0
                elif child.coefficient == 0:
                    child.coefficient = 1 / len(children)

    def _note_run(self, child: AbsentClassOffset, logits: Tensor) -> None:
        self._ran.add(child)


def _weights(head: nn.Module) -> list[Tensor]:
    return [parameter.detach().cpu().clone() for parameter in head.parameters()]
