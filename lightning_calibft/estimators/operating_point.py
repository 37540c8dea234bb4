"""The gamma of a chosen operating point, from labeled samples of seen and absent classes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from torch import Tensor
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.exceptions import TorchMetricsUserError
from typing_extensions import Unpack

from lightning_calibft._arguments import check_absent_share
from lightning_calibft.functional._inputs import _SEEN, Average
from lightning_calibft.functional.seen_unseen_curve import (
    Criterion,
    Goal,
    UnreachableAccuracyError,
    best_gamma_error,
    counted_samples,
    curve_best_gamma,
    point_at,
    to_real,
)
from lightning_calibft.functional.share_table import ShareTable
from lightning_calibft.metrics.absent_class_metric import AbsentClassMetric, MetricOptions
from lightning_calibft.metrics.seen_unseen_curve import SeenUnseenCurve
from lightning_calibft.split import ClassIds


class OperatingPoint(SeenUnseenCurve):
    r"""The best gamma on labeled validation samples of seen and absent classes.

    .. math::
        \hat\gamma = \arg\max_\gamma f\big(Acc_{S/Y}(\gamma), Acc_{U/Y}(\gamma)\big) \quad \text{subject to} \quad
        Acc_{S/Y}(\gamma) \ge a_S, \; Acc_{U/Y}(\gamma) \ge a_U

    over the points of the seen-unseen curve (Chao et al., "An Empirical Study and Analysis of Generalized Zero-Shot
    Learning for Object Recognition in the Wild", ECCV 2016). If :math:`f` is the accuracy of all samples and
    there is no constraint, this is the :math:`\gamma^\star` of Mai et al., "Fine-Tuning is Fine, if Calibrated",
    NeurIPS 2024. See :func:`lightning_calibft.functional.best_gamma` for the exact rule.

    Limitations: it needs labeled samples of the absent classes, the very classes that it should recover. With
    ``criterion="accuracy"``, gamma also depends on the share of absent samples: that in use should be that in these
    samples, or be given as ``absent_share``. With ``average="macro"``, the other criteria, or constraints, only the mix
    within each group matters. Accuracies on the samples used to choose gamma are slightly optimistic.

    The standard error is the standard deviation over 200 bootstrap samples. Those where no gamma reaches the required
    accuracies are left out, and it is NaN if fewer than two remain. It is reliable if a constraint or the point of
    equal accuracies determines gamma. It is rough at the top of a flat curve, where gamma jumps between intervals.

    The state is 8 bytes per sample for any number of classes, and twice that after ``compute``. It is shared with a
    :class:`~lightning_calibft.metrics.SeenUnseenCurve` of the same split in a :class:`torchmetrics.MetricCollection`.
    After ``compute`` on all processes, :attr:`standard_error`, :attr:`num_samples` and :meth:`accuracies` need no
    further communication. Use ``update`` instead of ``forward``, which requires the accuracies of each
    batch alone.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds``: A float tensor of shape ``(N, C)`` from the fine-tuned model in eval mode, not probabilities.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids, of seen and of absent classes.

    As output of ``forward`` and ``compute`` the metric returns gamma, a float64 scalar, or NaN with a warning if a
    group has no samples. ``compute`` raises a ``ValueError`` if no gamma reaches the required accuracies.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        criterion: ``"accuracy"`` of all samples, the ``"harmonic_mean"`` of both groups' accuracies, or
            ``"equal_accuracies"``, the smallest difference between those two.
        min_seen_accuracy: Consider only gammas with at least this accuracy of seen samples among all classes.
        min_absent_accuracy: The same for absent samples.
        absent_share: The share of samples of absent classes that the model will meet, in (0, 1), which weights the
            two accuracies in ``"accuracy"``. ``None``: the share in these samples.
        average: ``"micro"`` weights samples equally, ``"macro"`` weights classes that have samples equally.
        kwargs: The arguments ``ignore_index``, ``validate_args``, ``class_map`` and ``label_names`` of all metrics of
            this package, see :class:`~lightning_calibft.metrics.AUSUC`, and those of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the criterion is unknown, an accuracy is not in [0, 1], ``absent_share`` is not in (0, 1), or it
            is given along with a criterion that does not depend on it.

    Example:
        >>> import torch
        >>> from lightning_calibft.estimators import OperatingPoint
        >>> logits = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 0.0], [2.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
        >>> target = torch.tensor([0, 0, 2, 2])
        >>> metric = OperatingPoint(3, seen_classes=[0, 1])
        >>> metric.update(logits, target)
        >>> metric.compute()  # the first best interval: up to 1, which ties with 2 to 3 and with 4 and up
        tensor(0., dtype=torch.float64)
        >>> metric = OperatingPoint(3, seen_classes=[0, 1], min_absent_accuracy=0.5)
        >>> metric.update(logits, target)
        >>> metric.compute()
        tensor(2.5000, dtype=torch.float64)
    """

    needs_absent_samples = True
    needs_held_out_samples = True
    plot_lower_bound: float | None = None  # type: ignore[assignment]
    plot_upper_bound: float | None = None  # type: ignore[assignment]

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        criterion: Criterion = "accuracy",
        min_seen_accuracy: float | None = None,
        min_absent_accuracy: float | None = None,
        absent_share: float | None = None,
        average: Average = "micro",
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        super().__init__(num_classes, seen_classes, absent_classes, average=average, **kwargs)
        self.absent_share = check_absent_share(absent_share)
        self._goal = Goal(criterion, min_seen_accuracy, min_absent_accuracy, self.absent_share)
        self._samples: tuple[Tensor, Tensor] | None = None

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return gamma for all samples so far."""
        super().compute()
        assert self._curve is not None
        # Kept here because only here do the states include all processes.
        self._samples = counted_samples(dim_zero_cat(self.margin), dim_zero_cat(self.code))
        try:
            return to_real(curve_best_gamma(self._curve, self._goal), self.device)
        except UnreachableAccuracyError:
            with suppress(TorchMetricsUserError):  # else each process would keep the samples of all processes
                self.unsync()
            raise

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._samples = None

    @property
    def standard_error(self) -> Tensor:
        """Bootstrap standard error of gamma, computed with the same draws at each access. NaN if gamma is NaN."""
        gamma, (margin, code) = self.compute(), self._gathered()
        if gamma.isnan():
            return gamma
        error = best_gamma_error(margin, code, self._groups.of_class, self.average, self._goal)
        return to_real(error, self.device)

    @property
    def num_samples(self) -> int:
        """Number of samples of seen and absent classes used for gamma."""
        return len(self._gathered()[1])

    @property
    def knows_margins(self) -> bool:
        """Whether ``share_table`` has the margins of seen and of absent samples."""
        return self._goal.criterion == "accuracy"

    @property
    def share_table(self) -> ShareTable | None:
        """The best gamma for each share of absent samples, and what it does to these samples.

        Where it jumps between two shares, gammas between both are interpolated. ``None`` if gamma is NaN or the
        criterion does not depend on the share.
        """
        gamma, (margin, code) = self.compute(), self._gathered()
        if gamma.isnan() or self._goal.criterion != "accuracy":
            return None
        curve = self._computed_curve()
        without = [accuracy.item() for accuracy in point_at(*curve[:3], 0.0)]
        is_seen = self._groups.of_class.cpu()[(code >> 1).long()] == _SEEN

        def row(share: float) -> dict[str, float]:
            gamma = curve_best_gamma(curve, replace(self._goal, absent_share=share))
            seen, absent = (accuracy.item() for accuracy in point_at(*curve[:3], gamma))
            lost, won = without[0] - seen, absent - without[1]
            below = (margin < gamma).double()
            return {
                "gamma": gamma.item(),
                "seen_accuracy": seen,
                "absent_accuracy": absent,
                "seen_below": below[is_seen].mean().item(),
                "absent_below": below[~is_seen].mean().item(),
                "break_even_share": lost / (lost + won) if lost + won else share,
            }

        return ShareTable.of(row, *without)

    def _gathered(self) -> tuple[Tensor, Tensor]:
        self.compute()
        assert self._samples is not None
        return self._samples

    plot = AbsentClassMetric.plot  # type: ignore[assignment]
