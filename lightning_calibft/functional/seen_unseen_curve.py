"""The seen-unseen curve: every trade-off between seen and absent accuracy that a gamma can reach."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_calibft._arguments import check_absent_share, check_choice
from lightning_calibft.functional._group_logits import BatchReduction, reduce_batch
from lightning_calibft.functional._inputs import (
    _ABSENT,
    _SEEN,
    Average,
    Groups,
    prepare,
    real_dtype,
    warn_if_empty,
    warn_if_probabilities,
)
from lightning_calibft.functional.accuracy import harmonic_mean
from lightning_calibft.split import ClassIds

Criterion = Literal["accuracy", "harmonic_mean", "equal_accuracies"]

_TOLERANCE = 1e-12  # sums of macro weights differ in their last bits
_RESAMPLES = 200


class UnreachableAccuracyError(ValueError):
    """No gamma reaches the requested accuracy."""


@dataclass(frozen=True)
class Goal:
    """What gamma should achieve: the best criterion, subject to minimum accuracies."""

    criterion: Criterion = "accuracy"
    min_seen_accuracy: float | None = None
    min_absent_accuracy: float | None = None
    absent_share: float | None = None

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, ("accuracy", "harmonic_mean", "equal_accuracies"))
        check_absent_share(self.absent_share)
        if self.absent_share is not None and self.criterion != "accuracy":
            raise ValueError(
                f"Expected argument `absent_share` to be None with the criterion {self.criterion!r}, which does not"
                f" depend on it, but got {self.absent_share!r}. Leave it out, or use the criterion 'accuracy'."
            )
        for name in ("min_seen_accuracy", "min_absent_accuracy"):
            value = getattr(self, name)
            real = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (real and 0 <= value <= 1):
                raise ValueError(
                    f"Expected argument `{name}` to be a number in [0, 1], but got {value!r}. Accuracies are fractions,"
                    " not percentages."
                )


class Curve(NamedTuple):
    """Accuracies of both groups in each interval between the margins ``gamma``, and the weight of the seen group."""

    seen: Tensor
    absent: Tensor
    gamma: Tensor
    seen_share: Tensor

    def overall(self, absent_share: float | None = None) -> Tensor:
        """Return the accuracy of all samples, or at another share of absent ones; an empty group has no weight."""
        seen_share = self.seen_share if absent_share is None else 1 - absent_share
        return seen_share * self.seen.nan_to_num() + (1 - seen_share) * self.absent.nan_to_num()


def seen_unseen_curve(
    preds: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    average: Average = "micro",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Accuracies :math:`(Acc_{S/Y}, Acc_{U/Y})` for every gamma added to the absent logits.

    The margin of a sample is :math:`m_i = \max_{c \in S} z_{ic} - \max_{c \in U} z_{ic}`. A sample that is right among
    the classes of its own group is right among all classes while :math:`\gamma < m_i` (seen) or
    :math:`\gamma > m_i` (absent), so the accuracies change only at the margins of such samples. One sort gives the
    whole curve, in O(N log N).
    Chao et al., "An Empirical Study and Analysis of Generalized Zero-Shot Learning", ECCV 2016.

    Args:
        preds: Logits of shape ``(N, C)``.
        target: Class ids of shape ``(N,)``.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        average: ``"micro"`` weights samples equally, ``"macro"`` weights classes that have samples equally.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.

    Returns:
        ``seen_accuracy (K + 1,)``, falling to 0, ``absent_accuracy (K + 1,)``, rising from 0, and ``gamma (K,)``, the
        distinct margins in increasing order. Point ``k`` holds for gamma between ``gamma[k - 1]`` and ``gamma[k]``.
        All float64. A group without samples is NaN, with a warning.

    Raises:
        ValueError: If an argument is out of range, or shapes or labels do not match.
        TypeError: If ``preds`` or ``target`` has the wrong dtype.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import seen_unseen_curve
        >>> logits = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 4.0, 1.0]])
        >>> seen, absent, gamma = seen_unseen_curve(logits, torch.tensor([0, 2, 1]), seen_classes=[0, 1])
        >>> seen.tolist(), absent.tolist(), gamma.tolist()
        ([1.0, 1.0, 0.5, 0.0], [0.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    """
    curve = _curve(preds, target, seen_classes, absent_classes, average, ignore_index, validate_args)
    seen, absent, gamma = (to_real(value, preds.device) for value in curve[:3])
    return seen, absent, gamma


def ausuc(
    preds: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    average: Average = "micro",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """Area under the seen-unseen curve, by the trapezoidal rule in the order of gamma.

    It judges the features independently of gamma: adding one number to the absent logits does not change it.

    Args:
        preds: Logits of shape ``(N, C)``.
        target: Class ids of shape ``(N,)``.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        average: ``"micro"`` weights samples equally, ``"macro"`` weights classes that have samples equally.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.

    Returns:
        A float64 scalar in [0, 1], or NaN with a warning if a group has no samples.

    Raises:
        ValueError: If an argument is out of range, or shapes or labels do not match.
        TypeError: If ``preds`` or ``target`` has the wrong dtype.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import ausuc
        >>> logits = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 4.0, 1.0]])
        >>> ausuc(logits, torch.tensor([0, 2, 1]), seen_classes=[0, 1])
        tensor(1., dtype=torch.float64)
    """
    curve = _curve(preds, target, seen_classes, absent_classes, average, ignore_index, validate_args)
    return to_real(curve_area(curve.seen, curve.absent), preds.device)


def best_gamma(
    preds: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    criterion: Criterion = "accuracy",
    min_seen_accuracy: float | None = None,
    min_absent_accuracy: float | None = None,
    absent_share: float | None = None,
    average: Average = "micro",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """Find the gamma that is best on these labeled samples, which must include seen and absent classes.

    On test data this is an oracle, not a method.

    Args:
        preds: Logits of shape ``(N, C)``.
        target: Class ids of shape ``(N,)``.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        criterion: ``"accuracy"`` of all samples, the ``"harmonic_mean"`` of both groups' accuracies, or
            ``"equal_accuracies"``, the smallest difference between those two.
        min_seen_accuracy: Consider only gammas with at least this accuracy of seen samples among all classes.
        min_absent_accuracy: The same for absent samples.
        absent_share: The share of samples of absent classes that the model will meet, in (0, 1), which weights the
            two accuracies in ``"accuracy"``. ``None``: the share in these samples.
        average: ``"micro"`` weights samples equally, ``"macro"`` weights classes that have samples equally.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.

    Returns:
        A float64 scalar: the middle of the first best interval. If that interval is unbounded, 0 if it contains 0, else
        its finite end moved by one logit into the interval. NaN with a warning if a group has no samples.

    Raises:
        ValueError: If an argument is out of range, shapes or labels do not match, or no gamma reaches the requested
            accuracies.
        TypeError: If ``preds`` or ``target`` has the wrong dtype.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import best_gamma
        >>> logits = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 4.0, 1.0]])
        >>> best_gamma(logits, torch.tensor([0, 2, 1]), seen_classes=[0, 1])
        tensor(1.5000, dtype=torch.float64)
    """
    goal = Goal(criterion, min_seen_accuracy, min_absent_accuracy, absent_share)
    curve = _curve(preds, target, seen_classes, absent_classes, average, ignore_index, validate_args)
    return to_real(curve_best_gamma(curve, goal), preds.device)


def _curve(
    preds: Tensor,
    target: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None,
    average: Average,
    ignore_index: int | None,
    validate_args: bool,
) -> Curve:
    check_choice("average", average, ("micro", "macro"))
    groups = prepare(preds, target, seen_classes, absent_classes, ignore_index, validate_args)
    if validate_args:
        warn_if_probabilities(preds)
    reduction = reduce_batch(preds, target, groups, ignore_index, real_dtype(preds.device), validate_args)
    return curve_compute(reduction.margin, curve_codes(reduction, groups), groups.of_class, average)


def point_at(seen: Tensor, absent: Tensor, gamma: Tensor, at: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the accuracies of a curve at one gamma. A sample whose margin equals gamma is wrong in either group."""
    value = torch.as_tensor(at, dtype=gamma.dtype, device=gamma.device)
    return seen[torch.searchsorted(gamma, value, right=True)], absent[torch.searchsorted(gamma, value)]


def to_real(value: Tensor, device: torch.device) -> Tensor:
    """Move a float64 result from the CPU to the device of the input."""
    return value.to(device, real_dtype(device))


def curve_codes(reduction: BatchReduction, groups: Groups) -> Tensor:
    """Return an int32 code for each sample: 2 * class + (right in its group), or a negative one if not counted."""
    return groups.codes.index_select(0, reduction.place) + reduction.right


def curve_compute(margin: Tensor, code: Tensor, of_class: Tensor, average: Average) -> Curve:
    """Build the curve in float64 on the CPU: CUDA has no deterministic cumulative sum, and MPS has no float64."""
    curve = _build(*counted_samples(margin, code), of_class.cpu(), average, torch.unique)
    warn_if_empty(seen=bool(curve.seen[-1].isnan()), absent=bool(curve.absent[0].isnan()))
    return curve


def counted_samples(margin: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Return the margins and codes of the counted samples, on the CPU."""
    margin, code = margin.cpu(), code.cpu()
    return margin[code >= 0], code[code >= 0]


def _build(margin: Tensor, code: Tensor, of_class: Tensor, average: Average, unique: Callable[..., Any]) -> Curve:
    counts = (code >> 1).long().bincount(minlength=len(of_class))
    mass = (counts if average == "micro" else counts > 0).double()  # weight of a class in its group's accuracy
    weight = mass / counts.clamp(min=1)  # weight of a sample
    seen_mass, absent_mass = mass[of_class == _SEEN].sum(), mass[of_class == _ABSENT].sum()

    right = (code & 1).bool() & ~margin.isnan()  # a sample with a NaN logit is wrong at every gamma
    label = (code >> 1)[right].long()
    gamma, step = unique(margin[right], return_inverse=True)
    in_seen = of_class[label] == _SEEN
    zeros = torch.zeros(len(gamma), dtype=torch.float64)
    lost = zeros.index_add(0, step[in_seen], weight[label[in_seen]])
    gained = zeros.index_add(0, step[~in_seen], weight[label[~in_seen]])
    end = torch.zeros(1, dtype=torch.float64)
    seen = torch.cat([lost.flip(0).cumsum(0).flip(0), end]) / seen_mass
    absent = torch.cat([end, gained.cumsum(0)]) / absent_mass
    return Curve(seen, absent, gamma.double(), seen_mass / (seen_mass + absent_mass))


def curve_area(seen: Tensor, absent: Tensor) -> Tensor:
    """Compute the trapezoidal area. The first term is 0, or NaN for an empty group, which a single point would hide."""
    return seen[-1] * absent[0] + torch.trapezoid(seen, absent)


def curve_best_gamma(curve: Curve, goal: Goal) -> Tensor:
    """Return the middle of the first best interval of a curve.

    Raises:
        UnreachableAccuracyError: If no gamma reaches the accuracies that the goal requires.
    """
    if (curve.seen + curve.absent).isnan().any():
        return torch.tensor(torch.nan, dtype=torch.float64)
    infinity = torch.tensor([torch.inf], dtype=torch.float64)
    lower, upper = torch.cat([-infinity, curve.gamma]), torch.cat([curve.gamma, infinity])
    allowed = lower < upper  # infinite margins leave empty intervals
    allowed = _at_least("min_seen_accuracy", goal, curve.seen, allowed)
    allowed = _at_least("min_absent_accuracy", goal, curve.absent, allowed)
    score = _score(curve, goal).masked_fill(~allowed, -torch.inf)
    first = (score >= score.max() - _TOLERANCE).nonzero()[0, 0]
    low, high = lower[first], upper[first]
    if low.isfinite() and high.isfinite():
        return low / 2 + high / 2  # adding them first could overflow
    if low < 0 < high:
        return torch.zeros_like(low)
    # If logits are so large that adding 1 changes nothing, move to the next representable number.
    return (
        torch.minimum(high - 1, high.nextafter(low)) if high.isfinite() else torch.maximum(low + 1, low.nextafter(high))
    )


def _score(curve: Curve, goal: Goal) -> Tensor:
    if goal.criterion == "accuracy":
        return curve.overall(goal.absent_share)
    if goal.criterion == "harmonic_mean":
        return harmonic_mean(curve.seen, curve.absent)
    return -(curve.seen - curve.absent).abs()


def _at_least(name: str, goal: Goal, accuracy: Tensor, allowed: Tensor) -> Tensor:
    """Return which of the allowed intervals reach the accuracy that the goal requires."""
    least = getattr(goal, name)
    if least is None:
        return allowed
    enough: Tensor = allowed & (accuracy >= least - _TOLERANCE)
    if not enough.any():
        other = goal.min_seen_accuracy if name == "min_absent_accuracy" else None
        condition = "" if other is None else f" with `min_seen_accuracy` {other}"
        raise UnreachableAccuracyError(
            f"Expected argument `{name}` to be an accuracy that some gamma reaches, but got {least}, and the best"
            f"{condition} is {accuracy[allowed].max().item()}. Ask for less."
        )
    return enough


def best_gamma_error(margin: Tensor, code: Tensor, of_class: Tensor, average: Average, goal: Goal) -> Tensor:
    """Return the standard deviation of the best gamma over bootstrap resamples, held in memory one at a time.

    Resamples without seen or without absent samples are left out, and so are those where no gamma reaches the required
    accuracies.
    """
    order = code.argsort()
    order = order[margin[order].argsort(stable=True)]  # sorted, so that batches and processes do not matter
    margin, code = margin[order], code[order]
    of_class, draws, gammas = of_class.cpu(), torch.Generator().manual_seed(0), []
    for _ in range(_RESAMPLES):
        times = torch.randint(len(code), (len(code),), generator=draws).bincount(minlength=len(code))
        index = torch.arange(len(code)).repeat_interleave(times)  # in order, so no resample needs a sort
        curve = _build(margin[index], code[index], of_class, average, torch.unique_consecutive)
        with suppress(UnreachableAccuracyError):
            gammas.append(curve_best_gamma(curve, goal).item())
    found = torch.tensor(gammas, dtype=torch.float64)
    found = found[~found.isnan()]
    return found.std() if len(found) > 1 else torch.tensor(torch.nan, dtype=torch.float64)


def curve_accuracies(curve: Curve, gamma: float | Tensor) -> dict[str, Tensor]:
    """Return the accuracies of each group and of all samples, and the harmonic mean, at one gamma."""
    seen, absent = point_at(curve.seen, curve.absent, curve.gamma, gamma)
    overall = Curve(seen, absent, curve.gamma, curve.seen_share).overall()
    return {"seen": seen, "absent": absent, "all": overall, "harmonic": harmonic_mean(seen, absent)}
