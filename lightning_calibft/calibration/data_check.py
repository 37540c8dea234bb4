"""Find what is wrong with the data of a pass, by counting on the device so that no step waits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_calibft.calibration.batch_reader import CLEAN_LABELS_REMEDY
from lightning_calibft.calibration.distributed import SharedErrors, all_reduce, rank_and_world_size
from lightning_calibft.labels.class_map import IGNORE_INDEX, is_unmapped, unmapped_error
from lightning_calibft.split import ClassSplit, shorten

AbsentSamples = Literal["accident", "expected", "needed"]

NO_LABEL = torch.iinfo(torch.long).min  # smaller than any label
NO_BATCH = torch.iinfo(torch.long).max  # larger than any batch number


class DataCheck:
    """Counts what is wrong with the batches of a pass, and raises at its end, on all processes.

    Args:
        split: The seen and the absent classes.
        device: The device of the logits.
        mapped: Whether a ``class_map`` has turned the labels into rows.
        absent: How to treat samples of absent classes: as an ``"accident"``, as ``"expected"``, or as ``"needed"``.

    Attributes:
        errors: Ends the pass on all processes when one of them fails.
    """

    def __init__(self, split: ClassSplit, device: torch.device, mapped: bool, absent: AbsentSamples) -> None:
        self.errors = SharedErrors()
        self._split = split
        self._mapped = mapped
        self._absent = absent
        self._bad_batch = torch.full((), NO_BATCH, device=device)
        self._outside = torch.full((), NO_LABEL, device=device)
        self._samples = torch.zeros(split.num_classes + 2, dtype=torch.long, device=device)

    def count(self, target: Tensor, batch: Tensor, *logits: Tensor) -> None:
        """Count labels and the numbers of their batches, ``(N,)`` each, and one or two sets of logits ``(N, C)``."""
        bins = label_bins(target, self._split.num_classes)
        self._samples.index_add_(0, bins, torch.ones_like(bins))
        self._outside = largest_outside(self._outside, target, self._split.num_classes)
        for each in logits:
            bad = torch.where(each.isfinite().all(1), NO_BATCH, batch)
            self._bad_batch = torch.cat([self._bad_batch[None], bad]).amin()

    def raise_or_warn(self) -> None:
        """Raise an error, or warn, if something was wrong.

        Raises:
            ValueError: If a logit is not finite, a label is not a row of the head, or samples that the pass needs are
                missing.
            ValueError, RuntimeError: If another process has failed.
        """
        self.errors.agree()
        *samples, outside, _ = all_reduce(self._samples).tolist()
        bad_batch = -int(all_reduce(-self._bad_batch, maximum=True))
        label = int(all_reduce(self._outside, maximum=True))
        num_classes, total = self._split.num_classes, sum(samples) + outside
        if bad_batch != NO_BATCH:
            raise ValueError(
                f"Expected finite logits in the calibration pass, but batch {bad_batch} has NaN or infinite ones. Gamma"
                " stays unset. Check that batch, and whether training has diverged."
            )
        if outside:
            raise target_error(num_classes, label, f"{outside} of {total} samples have other labels, such as")
        present = [row for row, count in enumerate(samples) if count]
        not_seen = total - sum(samples[row] for row in self._split.seen_classes)
        if not_seen == total:
            raise empty_error(present, _positions_hint(present) if not self._mapped else "")
        if self._absent == "needed" and not any(samples[row] for row in self._split.absent_classes):
            raise ValueError(
                "Expected the calibration data to hold labeled samples of the absent classes, which this `estimator`"
                " compares with those of the seen classes, but got none. Give it validation data that has both, or"
                " choose an `estimator` that does not need them."
            )
        if not_seen and self._absent == "accident":
            hint = _positions_hint(present) if not self._mapped and _are_few(present, num_classes) else ""
            warnings.warn(
                f"{not_seen} of {total} samples in the calibration pass are not of the `seen_classes` and were left"
                f" out. If they belong to the fine-tuning data, add their classes to `seen_classes`.{hint}",
                stacklevel=2,
            )


def check_weights(device: torch.device) -> None:
    """Refuse a model without weights.

    Raises:
        ValueError: If ``device`` is ``meta``.
    """
    if device.type == "meta":
        raise ValueError(
            "Expected argument `model` to have weights, but it is on the device 'meta'. Give it some with `to_empty`"
            " and `load_state_dict`."
        )


def label_bins(target: Tensor, num_classes: int) -> Tensor:
    """Return the bin to count each label in: its class, ``C`` if it is not a class, ``C + 1`` if it is ignored."""
    target = target.long()
    outside = torch.where(target == IGNORE_INDEX, num_classes + 1, num_classes)
    return torch.where((target >= 0) & (target < num_classes), target, outside)


def largest_outside(before: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Return the largest label in ``target`` that is not a class, or ``before`` if it is larger."""
    labels = torch.where(label_bins(target, num_classes) == num_classes, target.long(), NO_LABEL)
    return torch.cat([before[None], labels]).amax()


def target_error(num_classes: int, label: int, found: str = "got") -> ValueError:
    """Return the error for labels that are not rows of the head, such as ``label``."""
    if is_unmapped(label):
        return unmapped_error(label)
    return ValueError(
        f"Expected targets to be class ids in [0, {num_classes}), rows of the classification head, but {found} {label}."
        f" {CLEAN_LABELS_REMEDY}"
    )


def empty_error(present: Sequence[int] = (), hint: str = "") -> ValueError:
    """Return the error for data without samples of the seen classes; ``present`` are the classes that it has."""
    others = f": its labels are the rows {shorten(list(present))}" if present else ""
    if not present:
        hint = (
            " Of data that can be read only once, nothing is left after training: pass it to another loader, or use the"
            " callback with `source='training_steps'`."
        )
    return ValueError(
        f"Expected the calibration data to hold samples of the seen classes, but got none{others}. Check the loader and"
        f" `seen_classes`.{hint}"
    )


def warn_if_positions(classes: Sequence[int], num_classes: int) -> None:
    """Warn if the classes of the fine-tuning data are the first few rows, which is rarely what the user means."""
    if rank_and_world_size()[0] == 0 and _are_few(classes, num_classes) and (hint := _positions_hint(classes)):
        warnings.warn(
            f"{hint.strip()} If you mean these rows, pass `seen_classes=list(range({len(classes)}))`.", stacklevel=3
        )


def _are_few(classes: Sequence[int], num_classes: int) -> bool:
    return 4 * len(classes) <= num_classes


def _positions_hint(classes: Sequence[int]) -> str:
    """Return what to do about labels that look like positions in a list of folders, or an empty string."""
    if not classes or list(classes) != list(range(len(classes))):
        return ""
    last = len(classes) - 1
    return (
        f" The labels are 0 to {last}: they look like positions in a list of folders, not like rows of the head. Say"
        " which row each is with `class_map=[...]`, or with `class_map=dataset.classes, label_names=...` by the names"
        f" of folders and rows. A training step that took the cross-entropy with these labels has trained rows 0 to"
        f" {last}: map them there too."
    )
