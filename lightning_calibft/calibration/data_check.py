"""Find what is wrong with the data of a pass, by counting on the device so that no step waits."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal

import torch
from torch import Tensor

from lightning_calibft.calibration.batch_reader import target_error
from lightning_calibft.calibration.distributed import SharedErrors, all_reduce, rank_and_world_size
from lightning_calibft.labels.class_map import IGNORE_INDEX
from lightning_calibft.labels.label_names import label_set_of, rows_of_names
from lightning_calibft.split import ClassSplit, shorten

AbsentSamples = Literal["accident", "expected", "needed"]

_WORDNET_ID = re.compile(r"n\d{8}")
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


def warn_if_positions(
    classes: Sequence[int], num_classes: int, names: Mapping[int, str] | None = None, row_names: Sequence[str] = ()
) -> bool:
    """Warn if the labels of the fine-tuning data seem to be positions in a list of classes, and not rows of the head.

    Args:
        classes: The labels.
        num_classes: Number of rows.
        names: The dataset's name of each label, if it has names. Without names, the labels must be the first few rows,
            which is rarely what the user means.
        row_names: The names of the rows, if they are known.

    Returns:
        Whether the labels seem to be positions.
    """
    hint = _named_positions_hint(classes, num_classes, names, row_names) if names else ""
    if not names and _are_few(classes, num_classes):
        hint = _positions_hint(classes)
    if hint and rank_and_world_size()[0] == 0:
        in_order = list(classes) == list(range(len(classes)))
        seen = f"list(range({len(classes)}))" if in_order else f"[{shorten(list(classes))}]"
        warnings.warn(f"{hint.strip()} If you mean these rows, pass `seen_classes={seen}`.", stacklevel=3)
    return bool(hint)


def _are_few(classes: Sequence[int], num_classes: int) -> bool:
    return 4 * len(classes) <= num_classes


def _named_positions_hint(
    classes: Sequence[int], num_classes: int, names: Mapping[int, str], row_names: Sequence[str]
) -> str:
    """Return what to do about labels whose names are not those of the rows, or an empty string."""
    if len(names) >= num_classes or names.keys() != set(range(len(names))) or not set(classes) <= names.keys():
        return ""  # the names are those of all rows, or have no positions, or are not those of the labels
    given = [names[label] for label in sorted(names)]
    if all(name.isdecimal() for name in given):
        rows = {label: int(name) for label, name in names.items()}
        map_of_names = f"[{', '.join(given)}]"
    else:
        if not row_names and all(map(_WORDNET_ID.fullmatch, given)):
            with suppress(ValueError):  # the head has no known label set
                row_names = list(rows_of_names(label_set_of(num_classes), num_classes))
        by_name = {name: row for row, name in enumerate(row_names)}
        rows = {label: by_name.get(name, -1) for label, name in names.items()}
        map_of_names = "[...]"
    if all(rows[label] == label for label in classes):
        return ""
    return _positions_hint(classes, f" ({shorten([repr(name) for name in given], 3)})", map_of_names)


def _positions_hint(classes: Sequence[int], names: str = "", map_of_names: str = "[...]") -> str:
    """Return what to do about labels that look like positions in a list of folders, or an empty string."""
    in_order = list(classes) == list(range(len(classes)))
    if not classes or not (in_order or names):
        return ""
    rows = f"0 to {len(classes) - 1}" if in_order else shorten(list(classes))
    return (
        f" The labels are {rows}: they look like positions in a list of folders{names}, not like rows of the head. Say"
        f" which row each is with `class_map={map_of_names}`, or with `class_map=dataset.classes, label_names=...` by"
        f" the names of folders and rows. A training step that took the cross-entropy with these labels has trained"
        f" rows {rows}: map them there too."
    )


def warn_of_many_absent_rows(num_seen: int, num_absent: int) -> None:
    """Warn if most rows of the head may never occur, where that moves gamma and nothing was said about it."""
    if num_absent > 10 * num_seen and rank_and_world_size()[0] == 0:
        warnings.warn(
            f"The head has {num_absent} rows that are not in the training data, which has {num_seen} classes. All of"
            " them count as absent classes, and those that never occur move gamma, too. If you know the classes that"
            " can occur, pass `absent_classes=[...]`. If you know how many samples are of absent classes, pass their"
            " share as `absent_share`.",
            stacklevel=2,
        )
