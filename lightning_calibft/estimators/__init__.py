"""Ways to choose gamma."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from torchmetrics import Metric

from lightning_calibft.estimators.pseudo_absent import PseudoAbsent
from lightning_calibft.metrics import AverageLogitGap
from lightning_calibft.split import ClassSplit

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "PseudoAbsent",
    "check_estimator",
    "check_estimator_width",
    "make_estimator",
    "needs_pretrained_logits",
]


class Estimator(Protocol):
    """What a torchmetrics ``Metric`` must offer to choose gamma: it is fed with fine-tuning samples.

    One with an attribute ``needs_pretrained_logits`` that is true gets a third argument in ``update``: the logits of
    the same samples from the model before fine-tuning.
    """

    split: ClassSplit

    def update(self, logits: Tensor, target: Tensor, *pretrained_logits: Tensor) -> None:
        """Take a batch: raw logits ``(N, C)`` and class ids ``(N,)``; ids that are not seen classes do not count."""

    def compute(self) -> Tensor:
        """Return gamma, the same on all processes."""

    @property
    def standard_error(self) -> Tensor:
        """The uncertainty of the gamma last computed."""

    @property
    def num_samples(self) -> int:
        """The number of samples behind the gamma last computed."""

    def reset(self) -> None:
        """Forget all samples."""

    def to(self, device: Any) -> Any:
        """Move to a device, in place."""


_ATTRIBUTES = {"split", "standard_error", "num_samples"}

ESTIMATORS: dict[str, Any] = {"alg": AverageLogitGap, "pseudo_absent": PseudoAbsent}


def needs_pretrained_logits(estimator: str | Estimator) -> bool:
    """Tell whether an estimator, or one of a known name, asks for the model before fine-tuning."""
    kind = ESTIMATORS[estimator] if isinstance(estimator, str) else estimator
    return bool(getattr(kind, "needs_pretrained_logits", False))


def check_estimator(estimator: str | Estimator, seen_classes: Any = None, absent_classes: Any = None) -> None:
    """Refuse what is no estimator, and classes beside a metric that has its own.

    Raises:
        ValueError: If a name is not in ``ESTIMATORS``, if classes are given beside a metric, or if it maps targets.
        TypeError: If an object is not a ``Metric`` with a ``split``, a ``standard_error`` and ``num_samples``.
    """
    if isinstance(estimator, str):
        if estimator not in ESTIMATORS:
            raise ValueError(
                f"Expected argument `estimator` to be one of {', '.join(map(repr, ESTIMATORS))} or a metric, but got"
                f" {estimator!r}."
            )
    elif not (isinstance(estimator, Metric) and _ATTRIBUTES.issubset(dir(estimator))):  # `hasattr` would compute them
        raise TypeError(
            f"Expected argument `estimator` to be a name or a torchmetrics Metric with `split`, `standard_error` and"
            f" `num_samples`, such as `AverageLogitGap`, but got {estimator!r}."
        )
    elif not (seen_classes is absent_classes is None):
        raise ValueError(
            f"Expected arguments `seen_classes` and `absent_classes` to be None beside an `estimator` that was made for"
            f" its own classes, but got {seen_classes!r} and {absent_classes!r}. Leave them out."
        )
    elif getattr(estimator, "class_map", None) is not None:
        raise ValueError(
            "Expected argument `estimator` to take rows of the head, but got a metric with a `class_map`. Give the"
            " `class_map` beside it instead."
        )


def check_estimator_width(estimator: str | Estimator, num_classes: int) -> None:
    """Refuse a metric that was made for another number of classes than the head has.

    Raises:
        ValueError: If it was.
    """
    if not isinstance(estimator, str) and estimator.split.num_classes != num_classes:
        raise ValueError(
            f"Expected argument `estimator` to be made for the {num_classes} classes of the head, but got one for"
            f" {estimator.split.num_classes}."
        )


def make_estimator(estimator: str | Estimator, split: ClassSplit) -> Estimator:
    """Return an estimator by its name, made for ``split``, or the given one with its state reset."""
    if isinstance(estimator, str):
        return ESTIMATORS[estimator](split.num_classes, split.seen_classes, split.absent_classes, validate_args=False)
    estimator.reset()
    return estimator
