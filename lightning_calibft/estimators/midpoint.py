"""Gamma halfway between the margins of seen samples and of pseudo-absent copies of them."""

from __future__ import annotations

from torch import Tensor

from lightning_calibft.functional.pseudo_absent_gamma import pseudo_absent_margins
from lightning_calibft.metrics.mean_gap_estimator import MeanGapEstimator


class Midpoint(MeanGapEstimator):
    r"""The midpoint between the margins of seen samples and those of pseudo-absent copies of them.

    .. math:: \gamma = \frac{1}{2n} \sum_{i=1}^n (m_i + m'_i)

    The margins are those of :func:`~lightning_calibft.functional.pseudo_absent_gamma`, of which this is a simpler
    variant. It also needs the model from before fine-tuning, but it uses only the means of the two margins, not their
    spread or the numbers of classes. This estimator is original to this project.

    The state is three numbers. Input and output are those of :class:`~lightning_calibft.estimators.PseudoAbsent`.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data, at least two.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
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

    def update(self, preds: Tensor, target: Tensor, pretrained_preds: Tensor) -> None:  # type: ignore[override]
        """Add a batch of logits ``(N, C)``, class ids ``(N,)`` and logits from before fine-tuning ``(N, C)``."""
        target = self._rows(preds, target, probabilities=True)
        self._check_pretrained_preds(pretrained_preds, target)
        margins = pseudo_absent_margins(preds, target, pretrained_preds, self._groups)
        self._add_gaps(margins.mean(1), target)
