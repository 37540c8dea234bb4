"""Gamma, and what it is expected to do, for each share of samples of absent classes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Column = tuple[float, ...]

_DIGITS = 6  # after the point: enough for the accuracies of a million samples
_LARGEST, _POINTS = math.log(0.999 / 0.001), 61
_LOG_ODDS = [_LARGEST * (2 * point / (_POINTS - 1) - 1) for point in range(_POINTS)]
ABSENT_SHARES: Column = tuple(round(1 / (1 + math.exp(-value)), _DIGITS) for value in _LOG_ODDS)


@dataclass(frozen=True)
class ShareTable:
    """Gamma, and what it is expected to do, for each share of samples of absent classes that a model can meet.

    The columns have equal lengths. Row by row, they belong to one share. Columns that an estimator cannot tell are
    ``None``.

    Attributes:
        absent_share: The shares, from 0.001 to 0.999 in equal steps of their log-odds.
        gamma: The gamma of a calibration for each share.
        seen_accuracy: Expected accuracy on samples of seen classes, among all classes, at each gamma, in [0, 1].
        absent_accuracy: The same on samples of absent classes.
        seen_below: Expected fraction of all samples of seen classes whose margin is below each gamma, in [0, 1]. The
            margin of a sample is its largest logit of a seen class less its largest one of an absent class, before
            gamma.
        absent_below: The same of all samples of absent classes.
        break_even_share: The share of samples of absent classes above which each gamma is expected to pay, if it is
            positive, and below which, if it is negative.
        seen_accuracy_without: Expected accuracy on samples of seen classes without gamma, one number.
        absent_accuracy_without: The same on samples of absent classes.

    Example:
        >>> table = ShareTable(absent_share=(0.1, 0.5, 0.9), gamma=(1.0, 2.0, 4.0))
        >>> table.at(0.75)["gamma"]
        3.0
    """

    absent_share: Column
    gamma: Column
    seen_accuracy: Column | None = None
    absent_accuracy: Column | None = None
    seen_below: Column | None = None
    absent_below: Column | None = None
    break_even_share: Column | None = None
    seen_accuracy_without: float | None = None
    absent_accuracy_without: float | None = None

    @classmethod
    def of(cls, row: Callable[[float], Mapping[str, float]], *without: float) -> ShareTable:
        """Return the table whose row for a share is ``row(share)``, and the accuracies without gamma."""
        rows = [row(share) for share in ABSENT_SHARES]
        columns = {name: tuple(round(each[name], _DIGITS) for each in rows) for name in rows[0]}
        seen, absent = (round(accuracy, _DIGITS) for accuracy in without) if without else (None, None)
        return cls(ABSENT_SHARES, **columns, seen_accuracy_without=seen, absent_accuracy_without=absent)

    def at(self, absent_share: float) -> dict[str, float]:
        """Return what is known of a share, by linear interpolation in the log-odds of shares.

        Args:
            absent_share: A share between the first and the last of the table.

        Returns:
            The values of the columns that are known, by name, and ``seen_change`` and ``absent_change``, which are the
            differences from the accuracies without gamma.

        Raises:
            ValueError: If the share is outside the table.
        """
        first, last = self.absent_share[0], self.absent_share[-1]
        if not first <= absent_share <= last:
            raise ValueError(
                f"Expected argument `absent_share` to be in [{first:g}, {last:g}], which the calibration has a gamma"
                f" for, but got {absent_share!r}. Calibrate again for shares beyond."
            )
        above = max(bisect_left(self.absent_share, absent_share), 1)
        low, share, high = map(_log_odds, (self.absent_share[above - 1], absent_share, self.absent_share[above]))
        weight = (share - low) / (high - low)
        columns = {name: column for name, column in vars(self).items() if isinstance(column, tuple)}
        row = {name: (1 - weight) * column[above - 1] + weight * column[above] for name, column in columns.items()}
        for side in ("seen", "absent"):
            without = getattr(self, f"{side}_accuracy_without")
            if without is not None and f"{side}_accuracy" in row:
                row[f"{side}_change"] = row[f"{side}_accuracy"] - without
        return {**row, "absent_share": absent_share}

    def as_dict(self) -> dict[str, Any]:
        """Return what is known as lists of plain numbers, and plain numbers."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> ShareTable:
        """Return the table that :meth:`as_dict` has described."""
        columns = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**{**known, **columns})


def _log_odds(share: float) -> float:
    return math.log(share / (1 - share))
