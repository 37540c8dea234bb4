"""The seen-unseen curve and the area under it, over many batches."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE
from typing_extensions import Unpack

from lightning_calibft._arguments import check_choice, check_number
from lightning_calibft.functional._group_logits import BatchReduction, reduce_batch
from lightning_calibft.functional._inputs import Average
from lightning_calibft.functional.seen_unseen_curve import (
    Criterion,
    Curve,
    Goal,
    curve_accuracies,
    curve_area,
    curve_best_gamma,
    curve_codes,
    curve_compute,
    to_real,
)
from lightning_calibft.metrics.absent_class_metric import AbsentClassMetric, MetricOptions, append_part
from lightning_calibft.plotting import plot_seen_unseen_curve
from lightning_calibft.split import ClassIds


class SeenUnseenCurve(AbsentClassMetric):
    r"""Accuracies of seen and absent classes, both among all classes, for every gamma.

    The curve consists of the points :math:`(Acc_{S/Y}, Acc_{U/Y})` as gamma, which is added to the absent logits, goes
    from minus to plus infinity. See :func:`lightning_calibft.functional.seen_unseen_curve`. The state is 8 bytes per
    sample for any number of classes. Margins are kept in float32. If rounding makes two margins equal, the function and
    the metric differ by about 1 / N^2. After ``compute`` on all processes, :meth:`accuracies` and :meth:`best_gamma`
    need no further communication.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds``: A float tensor of shape ``(N, C)``, not probabilities.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids.

    As output of ``forward`` and ``compute`` the metric returns ``seen_accuracy (K + 1,)``, ``absent_accuracy (K + 1,)``
    and ``gamma (K,)``, the margins at which they change, in increasing order. (As with every torchmetrics metric, a
    tensor with one element comes back as a scalar.)

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        average: ``"micro"`` weights samples equally, ``"macro"`` weights classes that have samples equally.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.
        class_map: The head's row for each target, if targets are not row numbers. See
            :func:`~lightning_calibft.resolve_class_map`. In either case ``seen_classes`` holds row numbers.
        label_names: Names of the head's rows, needed if ``class_map`` contains names.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_calibft.metrics import SeenUnseenCurve
        >>> metric = SeenUnseenCurve(3, seen_classes=[0, 1])
        >>> metric.update(torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 4.0, 1.0]]), torch.tensor([0, 2, 1]))
        >>> seen_accuracy, absent_accuracy, gamma = metric.compute()
        >>> seen_accuracy.tolist(), absent_accuracy.tolist(), gamma.tolist()
        ([1.0, 1.0, 0.5, 0.0], [0.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
        >>> metric.accuracies(gamma=0.0)["absent"]
        tensor(0., dtype=torch.float64)
        >>> metric.best_gamma()
        tensor(1.5000, dtype=torch.float64)
    """

    higher_is_better: bool | None = None
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0

    margin: list[Tensor] | Tensor
    code: list[Tensor] | Tensor

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        average: Average = "micro",
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        super().__init__(num_classes, seen_classes, absent_classes, **kwargs)
        check_choice("average", average, ("micro", "macro"))
        self.average: Average = average  # does not affect the update
        self._curve: Curve | None = None
        self.add_state("margin", [], dist_reduce_fx="cat")
        self.add_state("code", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of logits ``(N, C)`` and class ids ``(N,)``."""
        rows = self._rows(preds, target, probabilities=True)
        # For logits of at most float32, rounding the difference once or twice gives the same float32.
        dtype = torch.promote_types(preds.dtype, torch.float32)
        self._append(reduce_batch(preds, rows, self._groups, self._ignored_row, dtype, self.validate_args))

    def _append(self, reduction: BatchReduction) -> None:
        append_part(cast("list[Tensor]", self.margin), reduction.margin.float())
        append_part(cast("list[Tensor]", self.code), curve_codes(reduction, self._groups))

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return seen accuracy, absent accuracy and gamma of all samples so far."""
        self._append_nothing()
        margin, code = dim_zero_cat(self.margin), dim_zero_cat(self.code)
        self._curve = curve_compute(margin, code, self._groups.of_class, self.average)
        seen, absent, gamma = (to_real(value, self.device) for value in self._curve[:3])
        return seen, absent, gamma

    def accuracies(self, gamma: float) -> dict[str, Tensor]:
        """Return the accuracies ``seen``, ``absent`` and ``all`` among all classes, and ``harmonic``, at one gamma.

        ``harmonic`` is the harmonic mean of the first two.

        If a seen and an absent class tie for the largest logit, the sample is wrong, whichever class is true.

        Raises:
            TypeError: If ``gamma`` is not a number.
            ValueError: If ``gamma`` is NaN.
        """
        gamma = check_number("gamma", gamma)
        if math.isnan(gamma):
            raise ValueError("Expected argument `gamma` to be a number, but got nan.")
        values = curve_accuracies(self._computed_curve(), gamma)
        return {name: to_real(value, self.device) for name, value in values.items()}

    def best_gamma(
        self,
        criterion: Criterion = "accuracy",
        *,
        min_seen_accuracy: float | None = None,
        min_absent_accuracy: float | None = None,
        absent_share: float | None = None,
    ) -> Tensor:
        """Return the gamma that is best, as defined by :func:`lightning_calibft.functional.best_gamma`."""
        goal = Goal(criterion, min_seen_accuracy, min_absent_accuracy, absent_share)
        return to_real(curve_best_gamma(self._computed_curve(), goal), self.device)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes."""
        self._append_nothing()
        super().sync(*args, **kwargs)

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._curve = None

    def plot(  # type: ignore[override]
        self,
        curve: tuple[Tensor, Tensor, Tensor] | None = None,
        score: Tensor | bool | None = None,
        ax: _AX_TYPE | None = None,
        gamma: float | None = None,
    ) -> _PLOT_OUT_TYPE:
        """Draw the curve. If ``curve`` is ``None``, also mark gamma 0 and the best gamma.

        Args:
            curve: Output of ``compute`` or ``forward``. ``None``: call ``compute``.
            score: Area under the curve for the legend. ``True``: compute it, if ``curve`` is ``None``.
            ax: A matplotlib axis to draw on. ``None``: a new figure.
            gamma: The operating point in use, to be marked too.

        Returns:
            Figure and axis.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        gammas = {"uncalibrated": 0.0}
        if curve is None:
            computed = self._computed_curve()
            curve = computed[:3]
            score = curve_area(computed.seen, computed.absent) if score is True else score
            best = self.best_gamma().item()
            if best == best:  # NaN if a group has no samples
                gammas["best"] = best
        if gamma is not None:
            gammas["calibrated"] = gamma
        score = score if isinstance(score, Tensor) else None
        return plot_seen_unseen_curve(curve, gammas=gammas, score=score, ax=ax, name=type(self).__name__)

    def _computed_curve(self) -> Curve:
        self.compute()
        assert self._curve is not None
        return self._curve

    def _append_nothing(self) -> None:
        # torchmetrics gathers an empty list as floats, which another process would read as class codes.
        for name, dtype in (("margin", torch.float32), ("code", torch.int32)):
            state = getattr(self, name)
            if isinstance(state, list) and not state:
                state.append(torch.empty(0, dtype=dtype, device=self.device))


class AUSUC(SeenUnseenCurve):
    r"""Area under the seen-unseen curve, by the trapezoidal rule in the order of gamma.

    It judges the features independently of gamma: adding one number to the absent logits does not change it. See
    :func:`lightning_calibft.functional.ausuc`. In a :class:`torchmetrics.MetricCollection` it shares its state with a
    :class:`SeenUnseenCurve` of the same split. It also has the methods :meth:`accuracies` and :meth:`best_gamma`.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds``: A float tensor of shape ``(N, C)``, not probabilities.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids.

    As output of ``forward`` and ``compute`` the metric returns a float64 scalar in [0, 1], or NaN with a warning if a
    group has no samples.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        average: ``"micro"`` weights samples equally, ``"macro"`` weights classes that have samples equally.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.
        class_map: The head's row for each target, if targets are not row numbers. See
            :func:`~lightning_calibft.resolve_class_map`. In either case ``seen_classes`` holds row numbers.
        label_names: Names of the head's rows, needed if ``class_map`` contains names.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_calibft.metrics import AUSUC
        >>> metric = AUSUC(3, seen_classes=[0, 1])
        >>> metric(torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0], [0.0, 4.0, 1.0]]), torch.tensor([0, 2, 1]))
        tensor(1., dtype=torch.float64)
    """

    higher_is_better: bool | None = True

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the area under the curve of all samples so far."""
        seen, absent, _ = super().compute()
        return curve_area(seen, absent)

    plot = AbsentClassMetric.plot  # type: ignore[assignment]
