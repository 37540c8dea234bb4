"""What can be wrong with the data of a pass, counted on the device so that no step waits for it."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lightning_calibft.calibration.batch import CLEAN_LABELS_REMEDY
from lightning_calibft.calibration.loaders import all_reduce
from lightning_calibft.split import ClassSplit

IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default: samples that the loss left out


class Faults:
    """The faults of all batches, told at the end of the pass and on all processes alike.

    Args:
        split: The seen and the absent classes.
        device: Where the logits are.
    """

    def __init__(self, split: ClassSplit, device: torch.device) -> None:
        self._num_classes = split.num_classes
        self._seen = split.seen_mask.to(device)
        self._bad_batch = torch.full((), -1, device=device)
        self._samples = torch.zeros(3, dtype=torch.long, device=device)

    def count(self, index: int, logits: Tensor, target: Tensor) -> None:
        """Look at batch ``index`` with logits ``(N, C)`` and labels ``(N,)``."""
        valid = (target >= 0) & (target < self._num_classes)
        not_seen = valid & ~self._seen[target.clamp(0, self._num_classes - 1)]
        outside = ~valid & (target != IGNORE_INDEX)
        self._samples += torch.stack([outside.sum(), not_seen.sum(), (target != IGNORE_INDEX).sum()])
        bad = (self._bad_batch < 0) & ~logits.isfinite().all()
        self._bad_batch = torch.where(bad, index, self._bad_batch)

    def raise_or_warn(self) -> None:
        """Tell what was wrong.

        Raises:
            ValueError: If a logit is not finite, a label is no row of the head, or there are no samples.
        """
        outside, not_seen, total = all_reduce(self._samples).tolist()
        bad_batch = int(all_reduce(self._bad_batch, maximum=True))
        if bad_batch >= 0:
            raise ValueError(
                f"Expected finite logits in the calibration pass, but batch {bad_batch} has NaN or infinite ones. Gamma"
                " stays unset. Look at that batch, or at a training that diverged."
            )
        if outside:
            raise target_error(self._num_classes, f"{outside} of {total} samples have others")
        if not_seen == total:
            raise empty_error()
        if not_seen:
            warnings.warn(
                f"{not_seen} of {total} samples in the calibration pass are not of the `seen_classes` and were left"
                " out. If they belong to the fine-tuning data, their classes are seen ones.",
                stacklevel=2,
            )


def target_error(num_classes: int, met: str) -> ValueError:
    """Return the error for labels that are no class ids of the head."""
    return ValueError(
        f"Expected targets to be class ids in [0, {num_classes}), rows of the classification head, but {met}."
        f" {CLEAN_LABELS_REMEDY}"
    )


def empty_error() -> ValueError:
    """Return the error for data without a sample of the seen classes."""
    return ValueError(
        "Expected the calibration data to hold samples of the seen classes, but got none. Check the loader and"
        " `seen_classes`."
    )
