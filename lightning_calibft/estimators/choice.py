"""The estimators by name, and the check of one that a user gives."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import NoneType
from typing import Any, Protocol

from torch import Tensor
from torchmetrics import Metric

from lightning_calibft.estimators.confusion_matched import ConfusionMatched
from lightning_calibft.estimators.fixed_gamma import FixedGamma
from lightning_calibft.estimators.log_sum_exp_gap import LogSumExpGap
from lightning_calibft.estimators.matched_maxima import MatchedMaxima
from lightning_calibft.estimators.midpoint import Midpoint
from lightning_calibft.estimators.operating_point import OperatingPoint
from lightning_calibft.estimators.pseudo_absent import PseudoAbsent
from lightning_calibft.estimators.quantile_gap import QuantileGap
from lightning_calibft.metrics import AverageLogitGap
from lightning_calibft.metrics.gamma_estimator import GammaEstimator
from lightning_calibft.split import ClassSplit


class Estimator(Protocol):
    """What a torchmetrics ``Metric`` must offer to choose gamma: it is fed with fine-tuning samples.

    One with an attribute ``needs_pretrained_logits`` that is true gets a third argument in ``update``: the logits of
    the same samples from the model before fine-tuning. One with ``needs_absent_samples`` is fed with labelled samples
    of absent classes as well.
    """

    split: ClassSplit

    def update(self, preds: Tensor, target: Tensor, *pretrained_preds: Tensor) -> None:
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

ESTIMATORS: dict[str, Any] = {
    "alg": AverageLogitGap,
    "pseudo_absent": PseudoAbsent,
    "matched_maxima": MatchedMaxima,
    "quantile_gap": QuantileGap,
    "log_sum_exp_gap": LogSumExpGap,
    "midpoint": Midpoint,
    "confusion_matched": ConfusionMatched,
    "operating_point": OperatingPoint,
    "fixed": FixedGamma,
}


def needs_pretrained_logits(estimator: str | Estimator) -> bool:
    """Tell whether an estimator, or one of a known name, asks for the model before fine-tuning."""
    kind = ESTIMATORS.get(estimator) if isinstance(estimator, str) else estimator
    return bool(getattr(kind, "needs_pretrained_logits", False))


def needs_absent_samples(estimator: str | Estimator) -> bool:
    """Tell whether an estimator, or one of a known name, asks for labelled samples of absent classes."""
    kind = ESTIMATORS.get(estimator) if isinstance(estimator, str) else estimator
    return bool(getattr(kind, "needs_absent_samples", False))


def check_estimator(
    estimator: str | Estimator,
    estimator_kwargs: Mapping[str, Any] | None = None,
    seen_classes: Any = None,
    absent_classes: Any = None,
) -> None:
    """Refuse what is no estimator, and classes or options beside a metric that has its own.

    Raises:
        ValueError: If a name is not in ``ESTIMATORS``, if an option is unknown, missing or out of its range, if
            classes or options are given beside a metric, or if it maps targets.
        TypeError: If an object is not a ``Metric`` with a ``split``, a ``standard_error`` and ``num_samples``, or the
            options are no mapping.
    """
    if not isinstance(estimator_kwargs, (Mapping, NoneType)):
        raise TypeError(f"Expected argument `estimator_kwargs` to be a mapping, but got {estimator_kwargs!r}.")
    if isinstance(estimator, str):
        if estimator == "pcv":
            raise ValueError(
                "Expected argument `estimator` to read the fine-tuned model, but got 'pcv', which fine-tunes others."
                " Call `pseudo_cross_validation`, and `set_gamma` with its result."
            )
        if estimator not in ESTIMATORS:
            raise ValueError(
                f"Expected argument `estimator` to be one of {', '.join(map(repr, ESTIMATORS))} (of the callback also"
                f" 'pcv') or a metric, but got {estimator!r}."
            )
        _check_options(estimator, estimator_kwargs or {})
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
    elif estimator_kwargs:
        raise ValueError(
            f"Expected argument `estimator_kwargs` to be None beside an `estimator` that is a metric, but got"
            f" {estimator_kwargs!r}. Give them to the metric."
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


def make_estimator(
    estimator: str | Estimator, split: ClassSplit, estimator_kwargs: Mapping[str, Any] | None = None
) -> Estimator:
    """Return an estimator by its name, made for ``split``, or the given one with its state reset."""
    if isinstance(estimator, str):
        made: Estimator = ESTIMATORS[estimator](
            split.num_classes, split.seen_classes, split.absent_classes, validate_args=False, **(estimator_kwargs or {})
        )
        return made
    estimator.reset()
    return estimator


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    own, common = (inspect.signature(kind).parameters for kind in (ESTIMATORS[name], GammaEstimator))
    known = {key: value for key, value in own.items() if key not in common}
    if unknown := options.keys() - known.keys():
        raise ValueError(
            f"Expected argument `estimator_kwargs` to hold {' or '.join(map(repr, known)) or 'nothing'} for the"
            f" estimator {name!r}, but got {sorted(unknown)[0]!r}."
        )
    if missing := [key for key, value in known.items() if value.default is value.empty and key not in options]:
        raise ValueError(
            f"Expected argument `estimator_kwargs` to hold {missing[0]!r} for the estimator {name!r}, but got"
            f" {dict(options)!r}."
        )
    ESTIMATORS[name](3, [0, 1], **options)  # refuses values that are out of range
