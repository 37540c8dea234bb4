"""Gamma at which absent classes outrank the true class of a seen sample as often as other seen classes do."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_calibft.estimators.sample_estimator import SampleEstimator
from lightning_calibft.functional._group_logits import in_row_chunks
from lightning_calibft.functional._inputs import Groups, real_dtype

_STEPS = 60  # bisection steps: enough to reach the last bits from a range of e^30
_RESAMPLES = 200


class ConfusionMatched(SampleEstimator):
    r"""Lets absent classes outrank the true class of a seen sample as often as the same number of seen classes would.

    Let :math:`c_i` be the number of the other :math:`|S| - 1` seen classes with a larger logit than the true class. A
    negative binomial distribution is fitted to the mean of :math:`c` and to the share of :math:`c = 0`. For :math:`|U|`
    classes its mean is :math:`|U| / (|S| - 1)` times as large, and

    .. math::
        r = P(c > 0) = 1 - \Big(1 + \frac{|U| \, \bar c}{(|S| - 1) \, s}\Big)^{-s}, \qquad
        \gamma = Q_r\big(z_{iy} - \max_U z_i\big)

    where :math:`s` is the shape of the fit and :math:`Q_r` the :math:`r`-quantile. If the counts vary less than in a
    Poisson distribution, the Poisson limit is used, :math:`r = 1 - e^{-|U| \bar c / (|S| - 1)}`. This estimator is
    original to this project.

    Limitations: it needs mistakes. If the model makes none among the seen classes, gamma is the smallest of the
    differences. So it works better on held-out samples of the seen classes than on training samples.

    Input and output are those of :class:`~lightning_calibft.metrics.AverageLogitGap`. The state is 8 bytes per sample.
    The standard error is estimated from 200 bootstrap samples.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data, at least two.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.
        class_map: The head's row for each target, if targets are not row numbers. See
            :func:`~lightning_calibft.resolve_class_map`. In either case ``seen_classes`` holds row numbers.
        label_names: Names of the head's rows, needed if ``class_map`` contains names.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If there are fewer than two seen classes.

    Example:
        >>> import torch
        >>> from lightning_calibft.estimators import ConfusionMatched
        >>> logits = torch.tensor([[4.0, 0.0, -1.0], [3.0, 2.0, -1.0], [0.0, 5.0, -2.0]])
        >>> metric = ConfusionMatched(3, seen_classes=[0, 1])
        >>> metric.update(logits, torch.tensor([0, 0, 1]))
        >>> metric.compute()  # no mistakes: the smallest of 5, 4 and 7
        tensor(4., dtype=torch.float64)
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch of logits ``(N, C)`` and class ids ``(N,)``."""
        target = self._rows(preds, target, probabilities=True)
        self._keep(confusions(preds, target, self._groups), target)

    def _gamma(self, samples: Tensor) -> Tensor:
        return self._of_sorted(_sorted(samples)).to(samples.device)

    def _gamma_error(self, samples: Tensor) -> Tensor:
        ordered, draws = _sorted(samples), torch.Generator().manual_seed(0)
        indices = (torch.randint(len(ordered), (len(ordered),), generator=draws) for _ in range(_RESAMPLES))
        return (
            torch.stack([self._of_sorted(ordered[index.sort().values]) for index in indices]).std().to(samples.device)
        )

    def _of_sorted(self, samples: Tensor) -> Tensor:
        lead, above = samples.unbind(1)
        rate = _rate(above, len(self.split.absent_classes) / (len(self.split.seen_classes) - 1))
        place = rate * (len(lead) - 1)
        below = place.floor().long()
        return lead[below].lerp(lead[(below + 1).clamp(max=len(lead) - 1)], place - below)


def confusions(preds: Tensor, target: Tensor, groups: Groups) -> Tensor:
    """Return the lead of the true class over the absent ones and the number of seen classes above it, ``(N, 2)``."""
    dtype = real_dtype(preds.device)

    def compare(preds: Tensor, target: Tensor) -> tuple[Tensor]:
        own = preds.gather(1, target.long().clamp(0, preds.shape[1] - 1).unsqueeze(1))
        lead = own.squeeze(1).to(dtype) - preds.index_select(1, groups.absent).amax(1).to(dtype)
        seen = preds.index_select(1, groups.seen)
        above = (seen > own).sum(1).to(dtype) + 0 * seen.amax(1)  # comparisons hide NaN, so this keeps it
        return (torch.stack([lead, above], 1),)

    return in_row_chunks(compare, preds, target)[0]


def _sorted(samples: Tensor) -> Tensor:
    """Sort the samples on the CPU, so that the bootstrap does not depend on batches or processes."""
    samples = samples.cpu()
    for column in (1, 0):
        samples = samples[samples[:, column].argsort(stable=True)]
    return samples


def _rate(above: Tensor, factor: float) -> Tensor:
    """Return P(count > 0) for ``factor`` times as many classes, from the negative binomial fitted to these counts."""
    mean, none = above.mean(), (above == 0).double().mean()

    def probability_of_none(mean: Tensor, log_shape: Tensor) -> Tensor:
        return (-log_shape.exp() * torch.log1p(mean * (-log_shape).exp())).exp()

    low, high = torch.full_like(mean, -15.0), torch.full_like(mean, 15.0)
    for _ in range(_STEPS):  # a larger shape gives fewer samples with a count of 0
        middle = (low + high) / 2
        more = probability_of_none(mean, middle) > none
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return 1 - probability_of_none(factor * mean, (low + high) / 2)
