"""The gamma that best separates seen samples from pseudo-absent copies of them, over many batches."""

from __future__ import annotations

from torch import Tensor

from lightning_calibft.estimators.sample_estimator import SampleEstimator
from lightning_calibft.functional.average_logit_gap import GammaEstimate
from lightning_calibft.functional.pseudo_absent_gamma import pseudo_absent_compute, pseudo_absent_margins


class PseudoAbsent(SampleEstimator):
    r"""The gamma that best separates seen samples from copies of them whose class is treated as absent.

    .. math:: |S| \, \operatorname{mean} \sigma(\gamma - m) = |U| \, \operatorname{mean} \sigma(m' - \gamma)

    where :math:`m` are the margins of the samples and :math:`m'` those of their copies. See
    :func:`lightning_calibft.functional.pseudo_absent_gamma` for their definitions and the limitations. It also needs
    the model from before fine-tuning, but trains no model. The state is 8 bytes per sample. After ``compute`` on all
    processes, :attr:`standard_error` and :attr:`num_samples` need no further communication.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds``: A float tensor of shape ``(N, C)`` from the fine-tuned model in eval mode, not probabilities.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids. Samples of classes that are not seen are left out.
    - ``pretrained_preds``: The logits of the same samples from the model before fine-tuning, ``(N, C)``.

    As output of ``forward`` and ``compute`` the metric returns gamma, a float64 scalar, or NaN with a warning if no
    sample counts.

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
        >>> from lightning_calibft.estimators import PseudoAbsent
        >>> pretrained = torch.tensor([[2.0, 0.0, 0.0, -1.0], [0.0, 2.0, 0.0, -1.0]])
        >>> logits = torch.tensor([[6.0, 0.0, -3.0, -4.0], [0.0, 6.0, -3.0, -4.0]])
        >>> metric = PseudoAbsent(4, seen_classes=[0, 1])
        >>> metric.update(logits, torch.tensor([0, 1]), pretrained)
        >>> metric.compute()
        tensor(5., dtype=torch.float64)
    """

    needs_pretrained_logits = True

    def update(self, preds: Tensor, target: Tensor, pretrained_preds: Tensor) -> None:
        """Add a batch of logits ``(N, C)``, class ids ``(N,)`` and logits from before fine-tuning ``(N, C)``."""
        target = self._rows(preds, target, probabilities=True)
        self._check_pretrained_preds(pretrained_preds, target)
        self._keep(pseudo_absent_margins(preds, target, pretrained_preds, self._groups), target)

    def _gamma(self, samples: Tensor) -> Tensor:
        return self._estimate(samples).gamma

    def _gamma_error(self, samples: Tensor) -> Tensor:
        return self._estimate(samples).standard_error

    def _estimate(self, samples: Tensor) -> GammaEstimate:
        return pseudo_absent_compute(samples, len(self.split.seen_classes), len(self.split.absent_classes))
