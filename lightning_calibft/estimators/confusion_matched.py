"""Gamma with which absent classes outrank the truth of a seen sample as often as other seen classes would."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_calibft.estimators.sample_estimator import SampleEstimator
from lightning_calibft.functional._group_logits import in_row_chunks
from lightning_calibft.functional._inputs import Groups, real_dtype

_STEPS = 60  # of bisection, of a range of e^30 to the last bits
_RESAMPLES = 200


class ConfusionMatched(SampleEstimator):
    r"""Lets the absent classes outrank the truth of a seen sample as often as so many other seen classes would.

    With :math:`c_i` the number of seen classes above the true one, a negative binomial distribution of :math:`|S| - 1`
    classes is fitted to the mean of :math:`c` and to the share of :math:`c = 0`. For :math:`|U|` classes its mean is
    :math:`|U| / (|S| - 1)` times as large, and

    .. math::
        r = P(c > 0) = 1 - \Big(1 + \frac{|U| \, \bar c}{(|S| - 1) \, s}\Big)^{-s}, \qquad
        \gamma = Q_r\big(z_{iy} - \max_U z_i\big)

    with :math:`s` the shape of the fit and :math:`Q_r` the :math:`r`-quantile. Counts that spread less than a Poisson
    distribution's take its limit, :math:`r = 1 - e^{-|U| \bar c / (|S| - 1)}`. This estimator is the project's own.

    Its limits: it needs mistakes. Where the model makes none among the seen classes, gamma is the smallest of the
    differences. So it does better on held-out samples of the seen classes than on those that were trained on.

    Input and output are those of :class:`~lightning_calibft.metrics.AverageLogitGap`. The state is 8 bytes a sample.
    The standard error is that of 200 bootstrap samples.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the at least two classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        ignore_index: A label whose samples are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.
        class_map: The head's row of each target, where they differ, as
            :func:`~lightning_calibft.resolve_class_map` takes it. The ``seen_classes`` are rows all the same.
        label_names: Names of the head's rows, for a ``class_map`` of names.
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
    """By how much the true class outranks the absent ones, and how many other seen classes outrank it, ``(N, 2)``."""
    dtype = real_dtype(preds.device)

    def compare(preds: Tensor, target: Tensor) -> tuple[Tensor]:
        own = preds.gather(1, target.long().clamp(0, preds.shape[1] - 1).unsqueeze(1))
        lead = own.squeeze(1).to(dtype) - preds.index_select(1, groups.absent).amax(1).to(dtype)
        seen = preds.index_select(1, groups.seen)
        above = (seen > own).sum(1).to(dtype) + 0 * seen.amax(1)  # NaN, which no comparison shows, stays NaN
        return (torch.stack([lead, above], 1),)

    return in_row_chunks(compare, preds, target)[0]


def _sorted(samples: Tensor) -> Tensor:
    """Order samples by themselves, on the CPU: then neither batches nor processes matter to the bootstrap."""
    samples = samples.cpu()
    for column in (1, 0):
        samples = samples[samples[:, column].argsort(stable=True)]
    return samples


def _rate(above: Tensor, factor: float) -> Tensor:
    """Probability of a count above 0 for ``factor`` times as many classes, by the negative binomial of these counts."""
    mean, none = above.mean(), (above == 0).double().mean()

    def probability_of_none(mean: Tensor, log_shape: Tensor) -> Tensor:
        return (-log_shape.exp() * torch.log1p(mean * (-log_shape).exp())).exp()

    low, high = torch.full_like(mean, -15.0), torch.full_like(mean, 15.0)
    for _ in range(_STEPS):  # the larger the shape, the fewer samples without a count
        middle = (low + high) / 2
        more = probability_of_none(mean, middle) > none
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return 1 - probability_of_none(factor * mean, (low + high) / 2)
