"""Gamma, and what it is expected to do, for each share of samples of absent classes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
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

    @classmethod
    def of(cls, row: Callable[[float], Mapping[str, float]]) -> ShareTable:
        """Return the table whose row for a share of absent samples is ``row(share)``."""
        rows = [row(share) for share in ABSENT_SHARES]
        columns = {name: tuple(round(float(each[name]), _DIGITS) for each in rows) for name in rows[0]}
        return cls(absent_share=ABSENT_SHARES, **columns)

    def at(self, absent_share: float) -> dict[str, float]:
        """Return the row for a share, by linear interpolation in the log-odds of shares.

        Args:
            absent_share: A share between the first and the last of the table.

        Returns:
            The columns that are known, by name.

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
        return {
            name: (1 - weight) * column[above - 1] + weight * column[above] for name, column in self.as_dict().items()
        } | {"absent_share": absent_share}

    def as_dict(self) -> dict[str, list[float]]:
        """Return the columns that are known as lists of plain numbers."""
        return {name: list(column) for name, column in asdict(self).items() if column is not None}

    @classmethod
    def from_dict(cls, columns: Mapping[str, Any]) -> ShareTable:
        """Return the table that :meth:`as_dict` has described."""
        return cls(**{name: tuple(map(float, column)) for name, column in columns.items()})


def _log_odds(share: float) -> float:
    return math.log(share / (1 - share))
