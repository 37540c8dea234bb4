"""The result of a calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lightning_calibft._format import verdict
from lightning_calibft.estimators import Estimator
from lightning_calibft.functional.share_table import ShareTable
from lightning_calibft.plotting import _AX_TYPE, _PLOT_OUT_TYPE, plot_share_table
from lightning_calibft.split import ClassSplit


@dataclass(frozen=True)
class CalibrationResult:
    """Gamma and the samples and classes behind it.

    Attributes:
        gamma: The number that is added to the logits of the absent classes.
        standard_error: Standard error of ``gamma`` over the samples, in logits. It is the sampling error alone:
            ``gamma`` can be further off if the samples or the estimator's assumptions are.
        num_samples: Number of fine-tuning samples that ``gamma`` was computed from.
        split: The seen and the absent classes.
        estimator: Name of the estimator that found ``gamma``.
        absent_share: The share of samples of absent classes that ``gamma`` is for. ``None`` if none was given or
            estimated.
        seen_accuracy: Accuracy on the samples among the seen classes alone, in [0, 1]. ``None`` if the estimator cannot
            tell, and likewise the next three.
        seen_change: What ``gamma`` is expected to change in the accuracy on samples of seen classes, in [-1, 1].
        absent_change: The same on samples of absent classes.
        break_even_share: The share of samples of absent classes above which a positive ``gamma`` is expected to pay,
            and below which a negative one is.
        absent_share_interval: Both ends of the 90 % interval of ``absent_share``, if it was estimated from unlabeled
            samples.
        held_out: Whether the samples are known to be held out from training, as validation data is, or because
            :func:`~lightning_calibft.calibrate` was told.
        share_table: Gamma, and what it is expected to do, for other shares. ``None`` if gamma does not depend on the
            share, as one that was given or that pseudo cross-validation has found.

    Example:
        >>> from lightning_calibft import ClassSplit
        >>> result = CalibrationResult(1.5, 0.1, 64, ClassSplit(3, [0, 1]), "alg")
        >>> result.as_dict()["absent_classes"]
        [2]
    """

    gamma: float
    standard_error: float
    num_samples: int
    split: ClassSplit
    estimator: str
    absent_share: float | None = None
    seen_accuracy: float | None = None
    seen_change: float | None = None
    absent_change: float | None = None
    break_even_share: float | None = None
    absent_share_interval: tuple[float, float] | None = None
    held_out: bool = False
    share_table: ShareTable | None = field(default=None, repr=False)

    def for_share(self, absent_share: float, interval: Sequence[float] | None = None) -> CalibrationResult:
        """Return the result for another share of samples of absent classes, from ``share_table``.

        The standard error remains that of the gamma that was found on the samples.

        Args:
            absent_share: A share in the table.
            interval: Both ends of its interval, if it was estimated.

        Raises:
            ValueError: If there is no table, or the share is outside of it.
        """
        if self.share_table is None:
            raise ValueError(
                f"Expected argument `absent_share` to be that of the result of {self.estimator!r}, which does not know"
                f" gammas of other shares, but got {absent_share}."
            )
        row = self.share_table.at(absent_share)
        return replace(
            self,
            gamma=row["gamma"],
            absent_share=absent_share,
            absent_share_interval=None if interval is None else (interval[0], interval[1]),
            seen_change=row.get("seen_change"),
            absent_change=row.get("absent_change"),
            break_even_share=row.get("break_even_share"),
        )

    @property
    def verdict(self) -> str:
        """Whether gamma is expected to help.

        One of ``helps``, ``does not matter``, ``hurts`` and ``cannot be told``. It is about the accuracy on all
        samples, at ``absent_share`` or, if no share was given, at all shares from 2 to 90 %. Less than a quarter of a
        point does not matter, and between that and one point, it cannot be told. It cannot be told either if the
        samples behind gamma look as if the model had learned them by heart. Of the recorded runs with held-out samples,
        it was right in more than nine of ten cases, and could not be told in one of seven.
        """
        return verdict(self.as_dict())[0]

    @property
    def reason(self) -> str:
        """A sentence that says why the verdict is what it is, and what accuracy is expected."""
        return verdict(self.as_dict())[1]

    def plot(self, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Draw gamma and the expected accuracies over the share of absent samples, see ``share_table``.

        The accuracy on all samples is drawn with the gamma for each share and, for comparison, with this gamma and
        without one. The last two meet at the break-even share.

        Args:
            ax: A matplotlib axis to draw on. ``None``: a new figure.

        Returns:
            The figure and the axis. The figure is ``None`` if ``ax`` was given.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            ValueError: If the estimator knows no other shares.
        """
        if self.share_table is None:
            raise ValueError(
                f"Expected a result that knows gamma for other shares of absent samples, but the estimator"
                f" {self.estimator!r} knows none. Calibrate with 'alg', 'pseudo_absent' or 'operating_point'."
            )
        changes = (
            None if self.seen_change is None or self.absent_change is None else (self.seen_change, self.absent_change)
        )
        return plot_share_table(self.share_table, self.gamma, changes, self.absent_share, self.break_even_share, ax)

    def as_dict(self) -> dict[str, Any]:
        """Return plain Python numbers, strings and lists, which are safe in a checkpoint, in JSON, and in YAML.

        What is not known is left out.
        """
        values = {
            "gamma": self.gamma,
            "standard_error": self.standard_error,
            "num_samples": self.num_samples,
            "estimator": self.estimator,
            "num_classes": self.split.num_classes,
            "seen_classes": list(self.split.seen_classes),
            "absent_classes": list(self.split.absent_classes),
            "absent_share": self.absent_share,
            "absent_share_interval": self.absent_share_interval and list(self.absent_share_interval),
            "seen_accuracy": self.seen_accuracy,
            "seen_change": self.seen_change,
            "absent_change": self.absent_change,
            "break_even_share": self.break_even_share,
            "held_out": self.held_out or None,
            "share_table": self.share_table and self.share_table.as_dict(),
        }
        known = {key: value for key, value in values.items() if value is not None}
        return {**known, "verdict": verdict(known)[0]}


def result_of(estimator: Estimator, choice: str | Estimator, held_out: bool = False) -> CalibrationResult:
    """Return the result of an estimator, with the name by which it was chosen. It is the same on all processes.

    Args:
        estimator: It has seen all samples.
        choice: What the user has chosen it by.
        absent_share_interval: Both ends of the 90 % interval of ``absent_share``, if it was estimated from unlabeled
            samples.
        held_out: Whether the samples are known to be held out from training.

    Raises:
        ValueError: If gamma is not finite in float32.
    """
    change = getattr(estimator, "expected_change", None)
    result = CalibrationResult(
        gamma=float(estimator.compute()),
        standard_error=float(estimator.standard_error),
        num_samples=int(estimator.num_samples),
        split=estimator.split,
        estimator=choice if isinstance(choice, str) else type(choice).__name__,
        absent_share=getattr(estimator, "absent_share", None),
        seen_accuracy=_known(getattr(estimator, "seen_accuracy", None)),
        seen_change=_known(change and change.seen),
        absent_change=_known(change and change.absent),
        break_even_share=_known(getattr(estimator, "break_even_share", None)),
        held_out=held_out,
        share_table=getattr(estimator, "share_table", None),
    )
    if not abs(result.gamma) <= torch.finfo(torch.float32).max:  # the head keeps it in float32
        raise ValueError(
            f"Expected the estimator {result.estimator!r} to find a finite gamma, but got {result.gamma} from"
            f" {result.num_samples} samples. The model is unchanged. Check the logits, or choose another `estimator`."
        )
    return result


def _known(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
