"""Relatives of the average logit gap that look at the large logits."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightning_calibft._arguments import check_number
from lightning_calibft.functional.gaps import log_sum_exp_gaps, matched_maxima_gaps, quantile_gaps
from lightning_calibft.functional.pseudo_absent import pseudo_absent_margins
from lightning_calibft.metrics.mean_gap import MeanGap
from lightning_calibft.split import ClassIds


class MatchedMaxima(MeanGap):
    r"""How far the maximum of some absent logits lies below that of as many seen ones.

    The average logit gap compares averages, but the prediction compares maxima, and the maximum of many classes is
    larger than that of few. So both groups are cut to the same number of classes,
    :math:`k = \min(|S| - 1, |U|)`:

    .. math::
        \gamma = \frac{1}{n} \sum_{i=1}^n \Big[ \mathop{\mathrm{E}}_{A \subset S \setminus y_i, |A| = k}
        \max_{c \in A} z_{ic} - \mathop{\mathrm{E}}_{A \subset U, |A| = k} \max_{c \in A} z_{ic} \Big]

    The expectations over random subsets have a closed form: the logit of rank :math:`j` (from 0, increasing) among
    :math:`m` is the maximum of :math:`\binom{j}{k - 1}` of the :math:`\binom{m}{k}` subsets. This estimator is the
    project's own. Its limits are those of the average logit gap, but for the numbers of classes: it looks at no sample
    of an absent class, so it cannot know how high their own logits rise.

    The state is three numbers; an update sorts the logits of its batch. Input and output are those of
    :class:`~lightning_calibft.metrics.AverageLogitGap`, which also has the same arguments.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the at least two classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        kwargs: The other arguments of :class:`~lightning_calibft.metrics.AverageLogitGap`.

    Raises:
        ValueError: If there are fewer than two seen classes.

    Example:
        >>> import torch
        >>> from lightning_calibft.estimators import MatchedMaxima
        >>> metric = MatchedMaxima(6, seen_classes=[0, 1, 2])
        >>> metric.update(torch.tensor([[9.0, 2.0, 4.0, 0.0, -1.0, 1.0]]), torch.tensor([0]))
        >>> metric.compute()  # 4 less the mean of 0, 1 and 1, the maxima of two absent logits
        tensor(3.3333, dtype=torch.float64)
    """

    def _gaps(self, logits: Tensor, target: Tensor) -> Tensor:
        return matched_maxima_gaps(logits, target, self._groups)


class QuantileGap(MeanGap):
    r"""How far a quantile of the absent logits lies below that of the seen ones.

    .. math::
        \gamma = \frac{1}{n} \sum_{i=1}^n \Big[ Q_q\big(z_{ic} : c \in S, c \neq y_i\big)
        - Q_q\big(z_{ic} : c \in U\big) \Big]

    with quantiles :math:`Q_q` that interpolate linearly. This estimator is the project's own. Among few classes a high
    quantile is the maximum, and the maxima of groups of different sizes do not compare: see
    :class:`MatchedMaxima`.

    The state is three numbers; an update sorts the logits of its batch. Input and output are those of
    :class:`~lightning_calibft.metrics.AverageLogitGap`.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the at least two classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        quantile: Which quantile, in [0, 1].
        kwargs: The other arguments of :class:`~lightning_calibft.metrics.AverageLogitGap`.

    Raises:
        ValueError: If there are fewer than two seen classes, or ``quantile`` is not in [0, 1].

    Example:
        >>> import torch
        >>> from lightning_calibft.estimators import QuantileGap
        >>> metric = QuantileGap(6, seen_classes=[0, 1, 2], quantile=0.5)
        >>> metric.update(torch.tensor([[9.0, 2.0, 4.0, 0.0, -1.0, 1.0]]), torch.tensor([0]))
        >>> metric.compute()  # the medians: 3 less 0
        tensor(3., dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        quantile: float = 0.9,
        **kwargs: Any,
    ) -> None:
        quantile = check_number("quantile", quantile)
        if not 0 <= quantile <= 1:
            raise ValueError(f"Expected argument `quantile` to be in [0, 1], but got {quantile}.")
        super().__init__(num_classes, seen_classes, absent_classes, configuration=(quantile,), **kwargs)
        self.quantile = quantile

    def _gaps(self, logits: Tensor, target: Tensor) -> Tensor:
        return quantile_gaps(logits, target, self._groups, self.quantile)


class LogSumExpGap(MeanGap):
    r"""How far the soft maximum of the absent logits lies below that of the seen ones, both per class.

    .. math::
        \gamma = \frac{T}{n} \sum_{i=1}^n \Big[
        \log \frac{1}{|S| - 1} \sum_{c \in S, c \neq y_i} e^{z_{ic} / T}
        - \log \frac{1}{|U|} \sum_{c \in U} e^{z_{ic} / T} \Big]

    With it a wrong seen class and an absent one get the same softmax probability on (geometric) average. A high
    temperature :math:`T` makes it the average logit gap, a low one the gap of the maxima. This estimator is the
    project's own, with the limits of the average logit gap: it looks at no sample of an absent class.

    The state is three numbers; an update needs all logits of its batch at once. Input and output are those of
    :class:`~lightning_calibft.metrics.AverageLogitGap`.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the at least two classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        temperature: By what the logits are divided; 1 is that of the softmax.
        kwargs: The other arguments of :class:`~lightning_calibft.metrics.AverageLogitGap`.

    Raises:
        ValueError: If there are fewer than two seen classes, or ``temperature`` is not positive and finite.

    Example:
        >>> import torch
        >>> from lightning_calibft.estimators import LogSumExpGap
        >>> metric = LogSumExpGap(6, seen_classes=[0, 1, 2])
        >>> metric.update(torch.tensor([[9.0, 3.0, 3.0, 1.0, 1.0, 1.0]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(2.0000, dtype=torch.float64)
    """

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        temperature = check_number("temperature", temperature)
        if not 0 < temperature < math.inf:
            raise ValueError(f"Expected argument `temperature` to be positive and finite, but got {temperature}.")
        super().__init__(num_classes, seen_classes, absent_classes, configuration=(temperature,), **kwargs)
        self.temperature = temperature

    def _gaps(self, logits: Tensor, target: Tensor) -> Tensor:
        return log_sum_exp_gaps(logits, target, self._groups, self.temperature)


class Midpoint(MeanGap):
    r"""Halfway between the margins of seen samples and those of pseudo-absent copies of them.

    .. math:: \gamma = \frac{1}{2n} \sum_{i=1}^n (m_i + m'_i)

    with the margins of :func:`~lightning_calibft.functional.pseudo_absent_gamma`, of which this is the simpler
    relative: it needs the model from before fine-tuning as well, but only the means of the two margins count, not how
    they spread nor how many classes there are. This estimator is the project's own.

    The state is three numbers. Input and output are those of :class:`PseudoAbsent`.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the at least two classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        kwargs: The other arguments of :class:`~lightning_calibft.metrics.AverageLogitGap`.

    Raises:
        ValueError: If there are fewer than two seen classes.

    Example:
        >>> import torch
        >>> from lightning_calibft.estimators import Midpoint
        >>> pretrained = torch.tensor([[2.0, 0.0, 0.0, -1.0], [0.0, 2.0, 0.0, -1.0]])
        >>> logits = torch.tensor([[6.0, 0.0, -3.0, -4.0], [0.0, 6.0, -3.0, -4.0]])
        >>> metric = Midpoint(4, seen_classes=[0, 1])
        >>> metric.update(logits, torch.tensor([0, 1]), pretrained)
        >>> metric.compute()  # between 9 and 1
        tensor(5., dtype=torch.float64)
    """

    needs_pretrained_logits = True

    def update(self, logits: Tensor, target: Tensor, pretrained_logits: Tensor) -> None:  # type: ignore[override]
        """Add a batch of logits ``(N, C)``, class ids ``(N,)`` and logits from before fine-tuning ``(N, C)``."""
        target = self._rows(logits, target, probabilities=True)
        self._check_pretrained_logits(pretrained_logits, target)
        margins = pseudo_absent_margins(logits, target, pretrained_logits, self._groups)
        self._add_gaps(margins.mean(1), target)
