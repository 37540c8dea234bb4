"""Know the classes of the training data before training has met them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_calibft.calibration.data_check import label_bins
from lightning_calibft.calibration.distributed import SharedErrors
from lightning_calibft.calibration.loaders import drawn_from, flat_loaders, is_read_once
from lightning_calibft.callback.trainer_data import max_validation_batches
from lightning_calibft.callback.training_labels import split_of_met
from lightning_calibft.labels.class_map import rows_tensor, to_rows
from lightning_calibft.labels.dataset_labels import labels_at, labels_of
from lightning_calibft.split import ClassSplit, shorten

_NAMES = "`val_ausuc` and the accuracies of seen and absent classes"
_REMEDY = "Pass `seen_classes=[...]` to compare them."
_MANY = 2**40  # more samples than any process has, and small enough to be summed over all processes


class ListedClasses:
    """The classes that the datasets list, if they do, so that all validations of a fit measure the same split.

    What the training batches hold is the truth. A class that they have and the lists have not, or a class in the lists
    that a whole epoch does not have, means that the lists are of other labels. They are then given up, with a warning.

    Args:
        num_classes: Number of classes ``C`` of the head.
        absent_classes: The classes that can be absent. ``None``: all that are not seen.
    """

    def __init__(self, num_classes: int, absent_classes: Sequence[int] | None = None) -> None:
        self._num_classes = num_classes
        self._absent_classes = absent_classes
        self._counts: list[int] = []  # samples of each class in the lists; empty if they are not known
        self._earlier: set[int] = set()  # classes that the run met before it was interrupted
        self._may_miss = 0  # number of samples that an epoch may leave out
        self._split: ClassSplit | None = None  # of the last validation
        self._told = False

    def read(
        self, trainer: Any, rows: dict[int, int] | None, earlier: Iterable[int], readable: bool, tell: bool
    ) -> None:
        """Read the lists of the datasets that are about to be trained on, on all processes.

        Args:
            trainer: The Trainer, with its training loaders.
            rows: The head's row for each label, if they differ.
            earlier: The classes that the run has met before it was interrupted and resumed.
            readable: Whether batches have the labels that the datasets list, as far as is known.
            tell: Whether to warn if the validations of this fit cannot be compared.
        """
        self._earlier = set(earlier)
        device, world_size = trainer.strategy.root_device, trainer.world_size
        counts, may_miss = torch.zeros(self._num_classes, dtype=torch.long), 0
        readable = readable and not trainer.reload_dataloaders_every_n_epochs
        for loader in flat_loaders(trainer.train_dataloader):
            labels, missed = _labels_of_loader(loader, trainer.num_training_batches, world_size)
            may_miss = min(_MANY, may_miss + missed)
            if labels is None or not readable:
                readable = False
                continue
            bins = label_bins(labels if rows is None else to_rows(labels, rows_tensor(rows)), self._num_classes)
            of_bins = torch.bincount(bins, minlength=self._num_classes + 2)
            readable = not of_bins[self._num_classes]
            counts += of_bins[: self._num_classes]
        together = torch.tensor([*counts.tolist(), may_miss, int(not readable)], device=device)
        reduced = torch.as_tensor(trainer.strategy.reduce(together, reduce_op="sum"))
        *summed, self._may_miss, unreadable = reduced.tolist()
        self._counts = [] if unreadable else summed
        if unreadable and tell and (self._may_miss >= _MANY or not _validates_after_epochs(trainer)):
            self._told = True
            rank_zero_warn(
                f"AbsentClassCalibration cannot read from the dataset which classes the training data has. {_NAMES}"
                " count the classes met so far as seen. So they cannot be compared between the validations of this run"
                f" until all classes have been met. {_REMEDY}"
            )

    def classes(self) -> list[int]:
        """Return the classes in the lists, or an empty list if they are not known."""
        return [row for row, count in enumerate(self._counts) if count or row in self._earlier]

    def split(self, met: list[int], complete: bool) -> ClassSplit | None:
        """Return the split in which the listed classes are seen, or those met, if the lists are not known.

        Return ``None`` if no class is seen or no class is absent.

        Args:
            met: The classes in the training batches of all processes so far. Empty if labels are mixed, in which case
                nothing says that the lists are wrong.
            complete: Whether the training is at the end of an epoch.
        """
        listed = self.classes()
        met = met or listed
        missing = set(listed).difference(met)
        wrong = not set(met) <= set(listed) or (complete and sum(self._counts[row] for row in missing) > self._may_miss)
        if listed and wrong:
            self._told = True
            rank_zero_warn(
                f"The datasets list labels of the classes {shorten(listed)}, but the training batches have the classes"
                f" {shorten(met)}. From now on, the classes met are seen. {_NAMES} of earlier validations cannot be"
                f" compared with later ones. {_REMEDY}"
            )
            self._counts, listed = [], []
        classes = listed or met
        before, self._split = self._split, split_of_met(self._num_classes, classes, self._absent_classes)
        if before is not None and self._split != before and not self._told:
            self._told = True
            new = sorted(set(classes).difference(before.seen_classes))
            rank_zero_warn(
                f"Since the last validation, training has met samples of new classes: {shorten(new)}. {_NAMES} of"
                f" earlier validations cannot be compared with later ones. {_REMEDY}"
            )
        return self._split

    def end(self, met: list[int]) -> None:
        """Forget the lists when training has ended. Warn if training has not met all classes in them.

        Args:
            met: The classes in the training batches of all processes. Empty if labels are mixed.
        """
        never = sorted(set(self.classes() if met else []).difference(met))
        self._counts = []
        if never:
            rank_zero_warn(
                f"Training ended before it met a sample of the classes {shorten(never)}, which the datasets list. They"
                f" are calibrated as absent classes, but {_NAMES} have counted them as seen."
            )


def count_held_out(trainer: Any, rows: dict[int, int] | None, readable: bool, seen_classes: Sequence[int]) -> float:
    """Return how many validation samples of the seen classes can be read when training has ended, on all processes.

    Samples whose labels are not listed count as such, and those of a stream are infinitely many.

    Args:
        trainer: The Trainer, with its validation loaders.
        rows: The head's row for each label, if they differ.
        readable: Whether batches have the labels that the datasets list, as far as is known.
        seen_classes: The seen classes. Empty if they are not known yet.
    """
    number, max_batches = 0.0, max_validation_batches(trainer)
    for loader in flat_loaders(trainer.val_dataloaders) if trainer.enable_validation else ():
        if is_read_once(loader):
            continue
        indices = drawn_from(loader)[0] if isinstance(loader, DataLoader) else None
        if indices is None or isinstance(loader.dataset, IterableDataset):
            number += math.inf
            continue
        if max_batches is not None:
            indices = indices[: max_batches * (loader.batch_size or 1) * trainer.world_size]
        labels = labels_at(indices, labels_of(loader.dataset)) if readable and seen_classes else None
        if labels is not None and rows is not None:
            labels = to_rows(labels, rows_tensor(rows))
        number += len(indices) if labels is None else int(torch.isin(labels, torch.tensor(seen_classes)).sum())
    return min(SharedErrors().gather(lambda: number))


def _labels_of_loader(loader: Any, num_batches: float, world_size: int) -> tuple[Tensor | None, int]:
    """Return the labels that each epoch of a loader draws from, if they are listed.

    Also return how many of its samples an epoch may leave out. A stream or a custom sampler counts as one that gives
    the same samples in each epoch.

    Args:
        loader: A training loader.
        num_batches: Number of batches of an epoch, in each process.
        world_size: Number of processes.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None, 0
    batch_size = getattr(loader.batch_sampler, "batch_size", None)
    indices, shuffles, repeats = drawn_from(loader)
    if indices is None or batch_size is None:
        return None, 0
    read = int(min(num_batches, len(loader))) * batch_size * world_size
    missed = max(0, len(indices) - read)
    if missed >= batch_size * world_size:  # more than `drop_last` leaves out
        if shuffles:
            return None, _MANY
        indices, missed = indices[:read], 0
    return labels_at(indices, labels_of(loader.dataset)), _MANY if repeats else missed


def _validates_after_epochs(trainer: Any) -> bool:
    """Return whether validation runs at the end of epochs only, when all samples of an epoch have been met."""
    every, batches = trainer.val_check_batch, trainer.num_training_batches
    return trainer.check_val_every_n_epoch is not None and every is not None and every >= batches
