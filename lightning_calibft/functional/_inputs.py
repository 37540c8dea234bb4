"""Code shared by all functions on logits: input checks and the split as tensors."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_calibft._arguments import check_class_ids, check_integer, check_tensor, check_values
from lightning_calibft.split import ClassIds, ClassSplit

Average = Literal["micro", "macro"]
Group = Literal["all", "seen", "absent"]

_OTHER, _SEEN, _ABSENT = -1, 0, 1
_NARROW = 128  # up to here, adding a row takes less time than making two parts
_NUMBERS = torch.tensor([[_SEEN], [_ABSENT]])


class Groups(NamedTuple):
    """The classes of a split as tensors on one device, built once.

    ``numbers (2, 1)`` holds the numbers of the two groups, seen and absent. ``zero`` is 0: a comparison with a tensor
    takes half as long as one with a number. ``of_class (C + 1,)`` is the group of each class, ``members (2, C + 1)``
    says whether it is in the one or the other, and ``codes (C + 1,)`` is twice its id, or -2 for other classes. Their
    last entry is for labels that do not count. ``competing`` lists the classes of both groups in order, if there are
    others. ``gap_weights`` has one weight per competing class: its product with their logits is the sum over seen
    classes divided by ``|S| - 1``, minus the mean over absent classes.

    There are three ways to the columns of the two groups. If the first columns are the seen classes and the next ones
    the absent ones, they are parts of a wide row. If few columns compete, they are gathered: ``order`` lists the seen
    classes and then the absent ones, and ``position (C,)`` is the position of each class in it. Otherwise
    ``rows (2, 1, C)`` is added to a batch, which makes the columns of all other classes ``-inf``. What is not needed is
    ``None``.
    """

    seen: Tensor
    absent: Tensor
    numbers: Tensor
    zero: Tensor
    of_class: Tensor
    members: Tensor
    codes: Tensor
    order: Tensor | None
    position: Tensor | None
    rows: Tensor | None
    competing: Tensor | None
    gap_weights: Tensor

    @classmethod
    def from_split(cls, split: ClassSplit, device: torch.device) -> Groups:
        """Build the tensors from a validated split."""
        of_class = torch.full((split.num_classes + 1,), _OTHER)
        of_class[list(split.seen_classes)] = _SEEN
        of_class[list(split.absent_classes)] = _ABSENT
        seen, absent, numbers = torch.tensor(split.seen_classes), torch.tensor(split.absent_classes), _NUMBERS
        members, zero = of_class == numbers, torch.tensor(0)
        weights = torch.zeros(split.num_classes, dtype=torch.float64)
        weights[seen], weights[absent] = 1 / max(len(seen) - 1, 1), -1 / len(absent)
        classes = torch.cat([seen, absent])
        competing = classes.sort().values if len(classes) < split.num_classes else None
        order = classes if 2 * len(classes) <= split.num_classes else None
        position = rows = None
        if order is not None:
            position = torch.zeros(split.num_classes, dtype=torch.long)
            position[order] = torch.arange(len(order))
        elif competing is not None or split.seen_classes[-1] > split.absent_classes[0] or split.num_classes <= _NARROW:
            rows = torch.where(members[:, :-1], 0.0, -torch.inf).unsqueeze(1)
        weights = weights if competing is None else weights[competing]
        codes = torch.where(of_class < 0, -2, 2 * torch.arange(len(of_class))).int()
        groups = cls(seen, absent, numbers, zero, of_class, members, codes, order, position, rows, competing, weights)
        return groups.to(device)

    def to(self, device: torch.device) -> Groups:
        """Move to a device."""
        largest = real_dtype(device)
        return self._replace(
            **{
                name: value.to(device, largest if value.dtype == torch.float64 else value.dtype)
                for name, value in self._asdict().items()
                if value is not None
            }
        )

    def classes(self, group: Group) -> Tensor:
        """Return the sorted class ids of a group; ``"all"`` omits classes that are neither seen nor absent."""
        if group == "all":
            return torch.cat([self.seen, self.absent]).sort().values
        return self.seen if group == "seen" else self.absent

    def places(self, target: Tensor, ignore_index: int | None, checked: bool = False) -> tuple[Tensor, Tensor]:
        """Return the column of each label, and its place in ``of_class``, which is the last if it does not count.

        Labels outside of ``[0, C)`` do not count, and get any column. If they are ``checked``, there are none.
        """
        target, num_classes = target.long(), len(self.of_class) - 1
        if checked and ignore_index is None:
            return target, target
        column = target.clamp(0, num_classes - 1)
        counted = column == target if ignore_index is None else (column == target) & (target != ignore_index)
        return column, torch.where(counted, column, num_classes)

    def of_samples(self, target: Tensor, ignore_index: int | None) -> Tensor:
        """Return the group of each label, or -1 if the sample does not count, without a host synchronization."""
        return self.of_class.index_select(0, self.places(target, ignore_index)[1])

    def are_seen(self, target: Tensor, ignore_index: int | None, checked: bool = False) -> Tensor:
        """Return which samples count and belong to seen classes, without a host synchronization."""
        return self.members[0].index_select(0, self.places(target, ignore_index, checked)[1])


def prepare(
    preds: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None,
    ignore_index: int | None,
    validate_args: bool,
) -> Groups:
    """Validate the arguments of a functional and return its split on the device of the logits."""
    check_tensor("preds", preds)
    if preds.ndim != 2:
        raise ValueError(f"Expected argument `preds` to have shape (N, C), but got {tuple(preds.shape)}.")
    if preds.shape[1] < 2:
        raise ValueError(f"Expected argument `preds` to have a column for each class, but got {tuple(preds.shape)}.")
    check_ignore_index(ignore_index)
    split = ClassSplit(preds.shape[1], seen_classes, absent_classes)
    if validate_args:
        check_inputs(preds, target, split.num_classes, ignore_index)
    return Groups.from_split(split, preds.device)


def check_inputs(
    preds: Tensor, target: Tensor, num_classes: int, ignore_index: int | None, name: str = "preds"
) -> None:
    """Raise if logits (the argument ``name``) and labels do not form a valid batch."""
    check_matrix(name, preds)
    if preds.shape[1] != num_classes:
        raise ValueError(
            f"Expected argument `{name}` to have {num_classes} columns, one per class, but got {preds.shape[1]}."
            " Argument `num_classes` is the width of the classification head."
        )
    check_target(target, len(preds), num_classes, ignore_index)


def check_matrix(name: str, value: Tensor) -> None:
    """Raise if an argument is not a floating point matrix."""
    check_floating(name, value)
    check_values(name, value)
    if value.ndim != 2:
        raise ValueError(f"Expected argument `{name}` to be two-dimensional, but got shape {tuple(value.shape)}.")


def check_floating(name: str, value: Tensor) -> None:
    """Raise if an argument is not a floating point tensor."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(
            f"Expected argument `{name}` to be a floating point tensor, but got {value.dtype}."
            f" Pass the raw outputs of the model, not predicted classes."
        )


def check_target(target: Tensor, num_samples: int, num_classes: int, ignore_index: int | None) -> None:
    """Raise if labels are not one class id per sample."""
    check_tensor("target", target)
    check_values("target", target)
    check_class_ids("argument `target`", target, "Pass the ids from before label mixing.")
    if target.shape != (num_samples,):
        raise ValueError(
            f"Expected argument `target` to have shape ({num_samples},), one class id per sample, but got"
            f" {tuple(target.shape)}."
        )
    target = target.long()
    if not target.numel():
        return
    least, most = target.aminmax()
    if least.item() >= 0 and most.item() < num_classes:
        return
    outside = (target < 0) | (target >= num_classes)
    if ignore_index is not None:
        outside &= target != ignore_index
    if outside.any():
        raise ValueError(
            f"Expected argument `target` to hold class ids in [0, {num_classes}), but got {target[outside][0].item()}."
            " Pass `ignore_index` if this label marks samples to leave out."
        )


def check_ignore_index(ignore_index: int | None) -> None:
    """Raise if ``ignore_index`` is neither ``None`` nor an integer."""
    if ignore_index is not None:
        check_integer("ignore_index", ignore_index)


def warn_if_probabilities(preds: Tensor) -> None:
    """Warn if the first rows look like the output of a softmax: margins between probabilities are meaningless."""
    rows = preds[:64].float()
    if len(rows) and bool(((rows >= 0) & (rows <= 1)).all() & ((rows.sum(1) - 1).abs() < 1e-2).all()):
        rank_zero_warn(
            "Argument `preds` holds values in [0, 1] that sum to 1 in each row, so they look like probabilities. Gamma"
            " is defined on logits: pass the output of the classification head from before the softmax."
        )


def warn_if_empty(seen: bool, absent: bool) -> None:
    """Warn once about the groups that have no samples."""
    if groups := " and no ".join(["seen"] * seen + ["absent"] * absent):
        rank_zero_warn(f"The metric received no {groups} samples, so values that depend on them are NaN.")


def real_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on devices without float64."""
    return torch.float32 if device.type == "mps" else torch.float64
