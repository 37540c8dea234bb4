"""The estimators by name, and checks of estimators that users pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import NoneType
from typing import Any, Protocol

from torch import Tensor
from torchmetrics import Metric

from lightning_calibft._arguments import check_absent_share
from lightning_calibft.estimators.fixed_gamma import FixedGamma
from lightning_calibft.estimators.operating_point import OperatingPoint
from lightning_calibft.estimators.pseudo_absent import PseudoAbsent
from lightning_calibft.metrics import AverageLogitGap
from lightning_calibft.metrics.gamma_estimator import GammaEstimator
from lightning_calibft.split import ClassSplit


class Estimator(Protocol):
    """The interface of a torchmetrics ``Metric`` that chooses gamma from fine-tuning samples.

    If its attribute ``needs_pretrained_logits`` is true, ``update`` gets a third argument: the logits of the same
    samples from the model before fine-tuning. If ``needs_absent_samples`` is true, ``update`` also gets labeled samples
    of absent classes. If ``needs_held_out_samples`` is true, the callback prefers validation data to training data. If
    ``knows_margins`` is true, its ``share_table`` has the margins of seen and of absent samples, and a share can be
    estimated from unlabeled samples.
    """

    split: ClassSplit

    def update(self, preds: Tensor, target: Tensor, *pretrained_preds: Tensor) -> None:
        """Add a batch of raw logits ``(N, C)`` and class ids ``(N,)``. Only samples of seen classes count."""

    def compute(self) -> Tensor:
        """Return gamma, the same on all processes."""

    @property
    def standard_error(self) -> Tensor:
        """The standard error of the gamma computed last."""

    @property
    def num_samples(self) -> int:
        """The number of samples used for the gamma computed last."""

    def reset(self) -> None:
        """Forget all samples."""

    def to(self, device: Any) -> Any:
        """Move to a device, in place."""


_ATTRIBUTES = {"split", "standard_error", "num_samples"}

ESTIMATORS: dict[str, Any] = {
    "alg": AverageLogitGap,
    "pseudo_absent": PseudoAbsent,
    "operating_point": OperatingPoint,
    "fixed": FixedGamma,
}


def needs_pretrained_logits(estimator: str | Estimator) -> bool:
    """Return whether an estimator, given by name or as an object, needs the model from before fine-tuning."""
    kind = ESTIMATORS.get(estimator) if isinstance(estimator, str) else estimator
    return bool(getattr(kind, "needs_pretrained_logits", False))


def needs_absent_samples(estimator: str | Estimator) -> bool:
    """Return whether an estimator, given by name or as an object, needs labeled samples of absent classes."""
    kind = ESTIMATORS.get(estimator) if isinstance(estimator, str) else estimator
    return bool(getattr(kind, "needs_absent_samples", False))


def needs_held_out_samples(estimator: str | Estimator) -> bool:
    """Return whether an estimator, given by name or as an object, is misled by samples that were trained on."""
    kind = ESTIMATORS.get(estimator) if isinstance(estimator, str) else estimator
    return bool(getattr(kind, "needs_held_out_samples", False))


def with_absent_share(
    estimator: str | Estimator, estimator_kwargs: Mapping[str, Any] | None, absent_share: float | None
) -> Mapping[str, Any] | None:
    """Return the options of an estimator, with the share of absent samples among them if it is given.

    Raises:
        ValueError: If the share is not in (0, 1), or is given for an estimator that does not depend on it, or twice.
        TypeError: If the share is not a number.
    """
    share = check_absent_share(absent_share)
    if share is None or not isinstance(estimator_kwargs, (Mapping, NoneType)):
        return estimator_kwargs
    options = dict(estimator_kwargs or {})
    if not isinstance(estimator, str):
        reason = "with an `estimator` that is a metric", "Pass it to the metric itself."
    elif estimator in ESTIMATORS and "absent_share" not in inspect.signature(ESTIMATORS[estimator]).parameters:
        reason = f"with the estimator {estimator!r}, which does not depend on it", "Leave it out."
    elif "absent_share" in options:
        reason = "with `estimator_kwargs` that hold it as well", "Pass it once."
    else:
        return {**options, "absent_share": share}
    raise ValueError(f"Expected argument `absent_share` to be None {reason[0]}, but got {share}. {reason[1]}")


def check_unlabeled(
    estimator: str | Estimator, estimator_kwargs: Mapping[str, Any] | None, absent_share: float | None
) -> None:
    """Check that a share of absent samples can be estimated from unlabeled samples, and is not given.

    Raises:
        ValueError: If the share is given, or the estimator does not know the margins of seen and of absent samples.
    """
    options = dict(estimator_kwargs or {})
    told = (absent_share, options.get("absent_share"), getattr(estimator, "absent_share", None))
    if any(share is not None for share in told):
        raise ValueError(
            f"Expected argument `absent_share` to be None with `unlabeled` samples, from which it is estimated, but got"
            f" {next(share for share in told if share is not None)!r}. Leave one of both out."
        )
    known: Any = ESTIMATORS.get(estimator) if isinstance(estimator, str) else estimator
    if estimator == "operating_point":
        known = OperatingPoint(3, [0, 1], **options)
    if not getattr(known, "knows_margins", False):
        name = estimator if isinstance(estimator, str) else type(estimator).__name__
        raise ValueError(
            f"Expected argument `estimator` to know the margins of seen and of absent samples with `unlabeled` samples,"
            f" but got {name!r}, which does not. Use 'pseudo_absent', or pass `absent_share`."
        )


def check_estimator(
    estimator: str | Estimator,
    estimator_kwargs: Mapping[str, Any] | None = None,
    seen_classes: Any = None,
    absent_classes: Any = None,
) -> None:
    """Raise if this is not an estimator, or if classes or options are passed for a metric that has its own.

    Raises:
        ValueError: If a name is not in ``ESTIMATORS``; if an option is unknown, missing or out of range; if classes or
            options are passed along with a metric; or if the metric has a ``class_map``.
        TypeError: If an object is not a ``Metric`` with ``split``, ``standard_error`` and ``num_samples``, or the
            options are not a mapping.
    """
    if not isinstance(estimator_kwargs, (Mapping, NoneType)):
        raise TypeError(f"Expected argument `estimator_kwargs` to be a mapping, but got {estimator_kwargs!r}.")
    if isinstance(estimator, str):
        if estimator == "pcv":
            raise ValueError(
                "Expected argument `estimator` to read the fine-tuned model, but got 'pcv', which fine-tunes other"
                " models. Call `pseudo_cross_validation` and pass its result to `set_gamma`."
            )
        if estimator not in ESTIMATORS:
            raise ValueError(
                f"Expected argument `estimator` to be one of {', '.join(map(repr, ESTIMATORS))} (the callback also"
                f" accepts 'pcv') or a metric, but got {estimator!r}."
            )
        _check_options(estimator, estimator_kwargs or {})
    elif not (isinstance(estimator, Metric) and _ATTRIBUTES.issubset(dir(estimator))):  # `hasattr` would compute them
        raise TypeError(
            f"Expected argument `estimator` to be a name or a torchmetrics Metric with `split`, `standard_error` and"
            f" `num_samples`, such as `AverageLogitGap`, but got {estimator!r}."
        )
    elif not (seen_classes is absent_classes is None):
        raise ValueError(
            f"Expected arguments `seen_classes` and `absent_classes` to be None with an `estimator` that already has"
            f" its own classes, but got {seen_classes!r} and {absent_classes!r}. Leave them out."
        )
    elif estimator_kwargs:
        raise ValueError(
            f"Expected argument `estimator_kwargs` to be None with an `estimator` that is a metric, but got"
            f" {estimator_kwargs!r}. Pass these options to the metric itself."
        )
    elif getattr(estimator, "class_map", None) is not None:
        raise ValueError(
            "Expected argument `estimator` to take rows of the head, but got a metric with a `class_map`. Pass"
            " `class_map` as its own argument instead."
        )


def check_estimator_width(estimator: str | Estimator, num_classes: int) -> None:
    """Raise if a metric does not have the same number of classes as the head.

    Raises:
        ValueError: If the numbers differ.
    """
    if not isinstance(estimator, str) and estimator.split.num_classes != num_classes:
        raise ValueError(
            f"Expected argument `estimator` to be made for the {num_classes} classes of the head, but got one for"
            f" {estimator.split.num_classes}."
        )


def make_estimator(
    estimator: str | Estimator, split: ClassSplit, estimator_kwargs: Mapping[str, Any] | None = None
) -> Estimator:
    """Create the estimator with this name for ``split``, or reset the given metric and return it."""
    if isinstance(estimator, str):
        made: Estimator = ESTIMATORS[estimator](
            split.num_classes, split.seen_classes, split.absent_classes, validate_args=False, **(estimator_kwargs or {})
        )
        return made
    estimator.reset()
    return estimator


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    own, common = (inspect.signature(kind).parameters for kind in (ESTIMATORS[name], GammaEstimator))
    known = {key: value for key, value in own.items() if key not in common and key != "absent_share"}
    if unknown := options.keys() - (known.keys() | own.keys() & {"absent_share"}):  # an argument of its own elsewhere
        raise ValueError(
            f"Expected argument `estimator_kwargs` to hold {' or '.join(map(repr, known)) or 'nothing'} for the"
            f" estimator {name!r}, but got {sorted(unknown)[0]!r}."
        )
    if missing := [key for key, value in known.items() if value.default is value.empty and key not in options]:
        raise ValueError(
            f"Expected argument `estimator_kwargs` to hold {missing[0]!r} for the estimator {name!r}, but got"
            f" {dict(options)!r}."
        )
    ESTIMATORS[name](3, [0, 1], **options)  # raises if a value is out of range
