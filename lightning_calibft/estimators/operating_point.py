"""The gamma of an operating point of one's choice, from labelled samples of seen and absent classes."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.exceptions import TorchMetricsUserError
from typing_extensions import Unpack

from lightning_calibft.functional._inputs import Average
from lightning_calibft.functional.seen_unseen_curve import (
    Criterion,
    Goal,
    UnreachableAccuracyError,
    best_gamma_error,
    counted_samples,
    curve_best_gamma,
    to_real,
)
from lightning_calibft.metrics.absent_class_metric import AbsentClassMetric, MetricOptions
from lightning_calibft.metrics.seen_unseen_curve import SeenUnseenCurve
from lightning_calibft.split import ClassIds


class OperatingPoint(SeenUnseenCurve):
    r"""The best gamma on labelled validation samples that hold absent classes too.

    .. math::
        \hat\gamma = \arg\max_\gamma f\big(Acc_{S/Y}(\gamma), Acc_{U/Y}(\gamma)\big) \quad \text{subject to} \quad
        Acc_{S/Y}(\gamma) \ge a_S, \; Acc_{U/Y}(\gamma) \ge a_U

    over the points of the seen-unseen curve (Chao et al., "An Empirical Study and Analysis of Generalized Zero-Shot
    Learning for Object Recognition in the Wild", ECCV 2016). With :math:`f` the accuracy of all samples and no
    constraint this is the :math:`\gamma^\star` of Mai et al., "Fine-Tuning is Fine, if Calibrated", NeurIPS 2024.
    See :func:`lightning_calibft.functional.best_gamma` for the exact rule.

    Its limits: it needs labels of absent classes, of the very classes that it is to bring back. Under
    ``criterion="accuracy"`` it also fits the mix of seen and absent samples, so they should be mixed as in use; with
    ``average="macro"``, the other criteria and the constraints only the mix within a group matters. Accuracies on the
    samples that gamma was chosen on are a little too good.

    The standard error is the standard deviation over 200 bootstrap samples; those without a gamma that has the
    accuracies asked for are left out, and it is NaN if fewer than two remain. Where gamma sits at a constraint or where
    two accuracies meet it is a good figure. At the top of a flat curve, which jumps from one interval to another, it is
    a rough one.

    The state is 8 bytes a sample, whatever the number of classes, and once more after ``compute``. It is shared with a
    :class:`~lightning_calibft.metrics.SeenUnseenCurve` of the same split in a :class:`torchmetrics.MetricCollection`.
    After ``compute`` on all processes, :attr:`standard_error`, :attr:`num_samples` and :meth:`accuracies` need no
    further communication. Feed it by ``update``: ``forward`` asks each batch alone for the accuracies.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds``: A float tensor of shape ``(N, C)`` from the fine-tuned model in eval mode, not probabilities.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids, of seen and of absent classes.

    As output of ``forward`` and ``compute`` the metric returns gamma, a float64 scalar, NaN with a warning if a group
    has no samples. ``compute`` raises a ``ValueError`` if no gamma has the accuracies asked for.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        criterion: ``"accuracy"`` of all samples, the ``"harmonic_mean"`` of both groups' accuracies, or
            ``"equal_accuracies"``, where those differ least.
        min_seen_accuracy: Only gammas with at least this accuracy of the seen samples, among all classes, count.
        min_absent_accuracy: The same for the absent samples.
        average: ``"micro"`` weighs samples equally, ``"macro"`` classes that have samples.
        kwargs: The arguments ``ignore_index``, ``validate_args``, ``class_map`` and ``label_names`` of all metrics of
            this package, see :class:`~lightning_calibft.metrics.AUSUC`, and those of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the criterion is unknown or an accuracy leaves [0, 1].

    Example:
        >>> import torch
        >>> from lightning_calibft.estimators import OperatingPoint
        >>> logits = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 0.0], [2.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
        >>> target = torch.tensor([0, 0, 2, 2])
        >>> metric = OperatingPoint(3, seen_classes=[0, 1])
        >>> metric.update(logits, target)
        >>> metric.compute()  # of the intervals up to 1 and from 2 to 3 and from 4 on, the first that is best
        tensor(0., dtype=torch.float64)
        >>> metric = OperatingPoint(3, seen_classes=[0, 1], min_absent_accuracy=0.5)
        >>> metric.update(logits, target)
        >>> metric.compute()
        tensor(2.5000, dtype=torch.float64)
    """

    needs_absent_samples = True
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
        average: Average = "micro",
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        super().__init__(num_classes, seen_classes, absent_classes, average=average, **kwargs)
        self._goal = Goal(criterion, min_seen_accuracy, min_absent_accuracy)
        self._samples: tuple[Tensor, Tensor] | None = None

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return gamma of all samples so far."""
        super().compute()
        assert self._curve is not None
        # Kept because here, and only here, the states are those of all processes.
        self._samples = counted_samples(dim_zero_cat(self.margin), dim_zero_cat(self.code))
        try:
            return to_real(curve_best_gamma(self._curve, self._goal), self.device)
        except UnreachableAccuracyError:
            with suppress(TorchMetricsUserError):  # torchmetrics would leave the samples of all processes to each
                self.unsync()
            raise

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._samples = None

    @property
    def standard_error(self) -> Tensor:
        """Standard error of gamma by the bootstrap, drawn anew, and alike, at each reading. NaN if gamma is."""
        gamma, (margin, code) = self.compute(), self._gathered()
        if gamma.isnan():
            return gamma
        error = best_gamma_error(margin, code, self._groups.of_class, self.average, self._goal)
        return to_real(error, self.device)

    @property
    def num_samples(self) -> int:
        """Number of samples of seen and absent classes that gamma rests on."""
        return len(self._gathered()[1])

    def _gathered(self) -> tuple[Tensor, Tensor]:
        self.compute()
        assert self._samples is not None
        return self._samples

    plot = AbsentClassMetric.plot  # type: ignore[assignment]
