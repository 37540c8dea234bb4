"""Code shared by all functions on logits: input checks and the split as tensors."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_calibft._arguments import check_class_ids, check_integer, check_tensor, check_values
from lightning_calibft.split import ClassIds, ClassSplit

Average = Literal["micro", "macro"]
Group = Literal["all", "seen", "absent"]

_OTHER, _SEEN, _ABSENT = -1, 0, 1
FOLD = 64  # columns of a range that are so far apart are reduced together, in whole vectors of the processor
_NARROW = 32  # up to this many classes, it is faster to take a separate maximum for each question


class Groups(NamedTuple):
    """The classes of a split as tensors on one device, built once.

    ``zero`` and ``lowest`` are 0 and minus infinity: a comparison with a tensor takes half as long as one with a
    number. ``of_class (C + 1,)`` is the group of each class, ``members (C + 1, 2)`` says whether it is seen and whether
    it is absent, and ``codes (C + 1,)`` is twice its id, or -2 for other classes. Their last entry is for labels that
    do not count. ``competing`` lists the classes of both groups in order, if there are others. ``gap_weights`` has one
    weight per competing class: its product with their logits is the sum over seen classes divided by ``|S| - 1``, minus
    the mean over absent classes.

    There are three ways to the maxima of a row. What is not needed is ``None``.

    If there are few classes, ``contests (7, C + 1, C)`` says for each label over which classes to take them: the seen
    ones; the absent ones; the label; those of its group with a lower id; it and those with a higher id; and the last
    two for both groups.

    If each group is a range of columns, these are the ``ranges``. If few classes compete, they are gathered into such
    ranges: ``order`` lists the seen classes and then the absent ones, and ``position (C,)`` is the column of each class
    in it. ``slots (C,)`` is the place of each class after folding, out of ``2 * FOLD``, and ``mates (2 * FOLD, K)``
    holds the columns at each place. The last one is repeated.

    Otherwise, ``lowered (2, 1, C)`` is added to a row, which makes the columns of all other classes minus infinity.
    """

    seen: Tensor
    absent: Tensor
    zero: Tensor
    lowest: Tensor
    of_class: Tensor
    members: Tensor
    codes: Tensor
    competing: Tensor | None
    gap_weights: Tensor
    contests: Tensor | None = None
    ranges: tuple[tuple[int, int], ...] = ()
    order: Tensor | None = None
    position: Tensor | None = None
    slots: Tensor | None = None
    mates: Tensor | None = None
    lowered: Tensor | None = None

    @classmethod
    def from_split(cls, split: ClassSplit, device: torch.device) -> Groups:
        """Build the tensors from a validated split."""
        of_class = torch.full((split.num_classes + 1,), _OTHER)
        of_class[list(split.seen_classes)] = _SEEN
        of_class[list(split.absent_classes)] = _ABSENT
        seen, absent = torch.tensor(split.seen_classes), torch.tensor(split.absent_classes)
        members = torch.stack([of_class == _SEEN, of_class == _ABSENT], 1)
        weights = torch.zeros(split.num_classes, dtype=torch.float64)
        weights[seen], weights[absent] = 1 / max(len(seen) - 1, 1), -1 / len(absent)
        classes = torch.cat([seen, absent])
        competing = classes.sort().values if len(classes) < split.num_classes else None
        weights = weights if competing is None else weights[competing]
        codes = torch.where(of_class < 0, -2, 2 * torch.arange(len(of_class))).int()
        zero, lowest = torch.tensor(0), torch.tensor(-torch.inf)
        groups = cls(seen, absent, zero, lowest, of_class, members, codes, competing, weights)
        return groups._with_ways().to(device)

    def _with_ways(self) -> Groups:
        """Add what the way to the maxima needs."""
        num_classes, group = len(self.of_class) - 1, self.of_class[:-1]
        classes = torch.arange(num_classes)
        if num_classes <= _NARROW:
            label = torch.arange(num_classes + 1).unsqueeze(1)
            both = (group >= 0).expand(num_classes + 1, -1)
            same, own = both & (group == self.of_class.unsqueeze(1)), both & (classes == label)
            lower, higher = classes < label, classes > label
            seen, absent = (of_group.expand_as(both) for of_group in self.members[:-1].unbind(1))
            every = [seen, absent, own, same & lower, same & higher | own, both & lower, both & higher | own]
            return self._replace(contests=torch.stack(every))
        parts = [self.seen, self.absent]
        ranges = tuple((int(part[0]), int(part[-1]) + 1) for part in parts)
        order = position = None
        if any(stop - start > len(part) for (start, stop), part in zip(ranges, parts, strict=True)):
            order = torch.cat(parts)
            if 2 * len(order) > num_classes:
                lowered = torch.where(self.members[:-1].t().contiguous(), 0.0, -torch.inf)
                return self._replace(lowered=lowered.unsqueeze(1))
            ranges = (0, len(self.seen)), (len(self.seen), len(order))
            position = torch.zeros_like(classes).index_copy(0, order, classes[: len(order)])
        slots, place = torch.zeros_like(classes), torch.arange(FOLD).unsqueeze(1)
        steps = torch.arange(0, max(stop - start for start, stop in ranges), FOLD)
        mates = []
        for number, (start, stop) in enumerate(ranges):
            slots[start:stop] = number * FOLD + torch.arange(stop - start) % FOLD
            last = stop - 1 - (stop - 1 - start - place) % FOLD
            mates.append(torch.minimum(start + place + steps, last).clamp(min=0))
        order = None if order is None else order.int()  # which is faster to gather by
        return self._replace(ranges=ranges, order=order, position=position, slots=slots, mates=torch.cat(mates))

    def to(self, device: torch.device) -> Groups:
        """Move to a device."""
        largest = real_dtype(device)
        moved: dict[str, Any] = {
            name: value.to(device, largest if value.dtype == torch.float64 else value.dtype)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor)
        }
        return self._replace(**moved)

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
        return self.members[:, 0].index_select(0, self.places(target, ignore_index, checked)[1])


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
