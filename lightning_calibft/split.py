"""The split of classes into seen ones, which are in the fine-tuning data, and absent ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_calibft._arguments import check_class_ids, check_integer, check_tensor, is_integer

ClassIds = Iterable[int] | Tensor

_MOST_CLASSES = 2**31 - 1


@dataclass(frozen=True, init=False, repr=False)
class ClassSplit:
    """The seen (fine-tuned) and the absent classes of a classifier, validated.

    A class in neither list is an *other* class: it never competes, and its samples are not counted.

    Args:
        num_classes: Number of classes ``C`` of the classifier, the width of its logits.
        seen_classes: Ids of the classes in the fine-tuning data, each in ``[0, C)``.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.

    Raises:
        TypeError: If ``num_classes`` or a class id is not an integer (a ``bool`` is not accepted).
        ValueError: If a list is empty, repeats a class, has an id outside ``[0, C)``, or shares a class with the other.

    Example:
        >>> split = ClassSplit(5, seen_classes=[3, 0])
        >>> split.seen_classes, split.absent_classes
        ((0, 3), (1, 2, 4))
        >>> split.absent_mask
        tensor([False,  True,  True, False,  True])
    """

    num_classes: int
    seen_classes: tuple[int, ...]
    absent_classes: tuple[int, ...]

    def __init__(self, num_classes: int, seen_classes: ClassIds, absent_classes: ClassIds | None = None) -> None:
        check_integer("num_classes", num_classes, least=2, most=_MOST_CLASSES)
        seen = class_ids("seen_classes", seen_classes, num_classes)
        if absent_classes is None:
            if len(seen) == num_classes:
                raise ValueError(
                    f"Expected argument `seen_classes` to leave out at least one of the {num_classes} classes, but it"
                    " names them all. Without an absent class there is nothing to calibrate."
                )
            absent = tuple(sorted(set(range(int(num_classes))).difference(seen)))
        else:
            absent = class_ids("absent_classes", absent_classes, num_classes)
            if both := sorted(set(seen).intersection(absent)):
                raise ValueError(
                    f"Expected arguments `seen_classes` and `absent_classes` to share no class, but both hold"
                    f" {shorten(both)}. Remove them from one of the two."
                )
        object.__setattr__(self, "num_classes", int(num_classes))
        object.__setattr__(self, "seen_classes", seen)
        object.__setattr__(self, "absent_classes", absent)

    def __repr__(self) -> str:
        """Show at most ten classes of each kind, so that the split of a wide head fits a screen."""
        seen, absent = (
            repr(classes) if len(classes) <= 10 else f"({shorten(classes)})"
            for classes in (self.seen_classes, self.absent_classes)
        )
        return f"ClassSplit(num_classes={self.num_classes}, seen_classes={seen}, absent_classes={absent})"

    @classmethod
    def from_targets(cls, target: Tensor, num_classes: int) -> ClassSplit:
        """Treat the classes found in the fine-tuning labels as seen and all others as absent.

        Args:
            target: Class ids of the fine-tuning data, integers of any shape.
            num_classes: Number of classes ``C`` of the classifier.

        Raises:
            TypeError: If ``target`` is not an integer tensor.
            ValueError: If ``target`` is empty, has an id outside ``[0, C)``, or holds every class.

        Example:
            >>> ClassSplit.from_targets(torch.tensor([2, 2, 0]), num_classes=4)
            ClassSplit(num_classes=4, seen_classes=(0, 2), absent_classes=(1, 3))
        """
        check_tensor("target", target)
        check_class_ids("argument `target`", target, "Pass `seen_classes` instead.")
        return cls(num_classes, target.unique())  # type: ignore[no-untyped-call]

    @property
    def seen_mask(self) -> Tensor:
        """Which classes are seen, as a boolean tensor of shape ``(C,)``."""
        return self._mask(self.seen_classes)

    @property
    def absent_mask(self) -> Tensor:
        """Which classes are absent, as a boolean tensor of shape ``(C,)``."""
        return self._mask(self.absent_classes)

    def _mask(self, classes: tuple[int, ...]) -> Tensor:
        mask = torch.zeros(self.num_classes, dtype=torch.bool)
        mask[list(classes)] = True
        return mask


def class_ids(name: str, classes: ClassIds, num_classes: int) -> tuple[int, ...]:
    """Return the class ids of an argument in order. The errors are those of :class:`ClassSplit`."""
    if isinstance(classes, (str, bytes, dict)) or not isinstance(classes, (Iterable, Tensor)):
        raise TypeError(f"Expected argument `{name}` to be a list of class ids, but got {classes!r}.")
    shape = getattr(classes, "shape", (0,))  # for a tensor or a NumPy array
    if len(shape) != 1:
        raise ValueError(f"Expected argument `{name}` to be one-dimensional, but got shape {tuple(shape)}.")
    values = classes.tolist() if isinstance(classes, Tensor) else list(classes)
    # Most are plain integers, and there may be many thousands, so check those first.
    if wrong := [value for value in values if type(value) is not int and not is_integer(value)]:
        raise TypeError(
            f"Expected argument `{name}` to hold integers, but got {wrong[0]!r}."
            " Pass the ids of the classes, not a mask or their names."
        )
    if not values:
        raise ValueError(f"Expected argument `{name}` to name at least one class, but it is empty.")
    if outside := [value for value in values if not 0 <= value < num_classes]:
        raise ValueError(
            f"Expected argument `{name}` to hold class ids in [0, {num_classes}), but got {shorten(outside)}."
            " Ids are rows of the classification head."
        )
    ids = sorted({int(value) for value in values})
    if len(ids) < len(values):
        twice = sorted(value for value, count in Counter(map(int, values)).items() if count > 1)
        raise ValueError(
            f"Expected argument `{name}` to hold each class once, but got {shorten(twice)} more than once."
        )
    return tuple(ids)


def shorten(ids: Sequence[object], limit: int = 10) -> str:
    """List at most ``limit`` ids, so that an error about thousands of classes stays readable."""
    return ", ".join(map(str, ids[:limit])) + (f" and {len(ids) - limit} more" if len(ids) > limit else "")
