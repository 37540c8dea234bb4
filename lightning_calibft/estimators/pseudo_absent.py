"""The gamma that best separates seen samples from pseudo-absent copies of them, over many batches."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn
from typing_extensions import Unpack

from lightning_calibft._arguments import check_absent_share
from lightning_calibft.functional._inputs import real_dtype
from lightning_calibft.functional.pseudo_absent_gamma import (
    WeighedSamples,
    accuracy_change,
    break_even_share,
    pseudo_absent_compute,
    pseudo_absent_table,
    pseudo_absent_update,
    weigh,
)
from lightning_calibft.functional.share_table import ShareTable
from lightning_calibft.metrics.absent_class_metric import MetricOptions, append_part
from lightning_calibft.metrics.gamma_estimator import GammaEstimator
from lightning_calibft.split import ClassIds


class AccuracyChange(NamedTuple):
    """What gamma changes in the accuracy among all classes on samples of seen and of absent classes, in [-1, 1]."""

    seen: Tensor
    absent: Tensor


class PseudoAbsent(GammaEstimator):
    r"""The gamma that best separates seen samples from copies of them whose class is treated as absent.

    .. math::
        (1 - p) \operatorname{mean} a \, \sigma\Big(2.5 \, \frac{\gamma - m}{\operatorname{std} m}\Big)
        = p \operatorname{mean} a' \, \sigma\Big(\frac{m' - \gamma}{2}\Big)

    where :math:`p` is the share of absent samples, :math:`m` and :math:`a` are the margins of the samples and whether
    they are right among the seen classes, and :math:`m'` and :math:`a'` the same of their copies. See
    :func:`lightning_calibft.functional.pseudo_absent_gamma` for the definitions and the limitations. Feed it with
    samples that were not trained on: margins of training samples are too large. It also needs the model from before
    fine-tuning, but trains no model.

    The state is 12 bytes per sample. After ``compute`` on all processes, the other properties need no further
    communication.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``preds``: A float tensor of shape ``(N, C)`` from the fine-tuned model in eval mode, not probabilities.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids. Samples of classes that are not seen are left out.
    - ``pretrained_preds``: The logits of the same samples from the model before fine-tuning, ``(N, C)``.

    As output of ``forward`` and ``compute`` the metric returns gamma, a float64 scalar, or NaN with a warning if no
    sample counts.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data, at least two.
        absent_classes: Ids of the absent classes that can occur. ``None``: all classes that are not seen.
        absent_share: The share of samples of absent classes that the model will meet, in (0, 1). ``None``: 0.5, which
            lost least on average over shares from 5 to 90 % in the recorded runs.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.
        class_map: The head's row for each target, if targets are not row numbers. See
            :func:`~lightning_calibft.resolve_class_map`. In either case ``seen_classes`` holds row numbers.
        label_names: Names of the head's rows, needed if ``class_map`` contains names.
        kwargs: Arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If there are fewer than two seen classes, or ``absent_share`` is not in (0, 1).
        TypeError: If ``absent_share`` is not a number.

    Example:
        >>> import torch
        >>> from lightning_calibft.estimators import PseudoAbsent
        >>> pretrained = torch.tensor([[2.0, 0.0, 0.0, -1.0], [0.0, 2.0, 0.0, -1.0]])
        >>> logits = torch.tensor([[6.0, 0.0, -3.0, -4.0], [0.0, 6.0, -3.0, -4.0]])
        >>> metric = PseudoAbsent(4, seen_classes=[0, 1])
        >>> metric.update(logits, torch.tensor([0, 1]), pretrained)
        >>> metric.compute()
        tensor(6.5291, dtype=torch.float64)
        >>> metric.break_even_share  # with fewer absent samples, this gamma is expected to cost more than it brings
        tensor(0.0354, dtype=torch.float64)
    """

    needs_pretrained_logits = True
    needs_held_out_samples = True
    knows_margins = True
    leads: list[Tensor] | Tensor
    sums: Tensor

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        absent_share: float | None = None,
        **kwargs: Unpack[MetricOptions],
    ) -> None:
        super().__init__(num_classes, seen_classes, absent_classes, **kwargs)
        self.absent_share = check_absent_share(absent_share)
        self._samples: WeighedSamples | None = None
        self.add_state("leads", [], dist_reduce_fx="cat")
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor, pretrained_preds: Tensor) -> None:
        """Add a batch of logits ``(N, C)``, class ids ``(N,)`` and logits from before fine-tuning ``(N, C)``."""
        target = self._rows(preds, target, probabilities=True)
        self._check_pretrained_preds(pretrained_preds, target)
        leads, terms = pseudo_absent_update(preds, target, pretrained_preds, self._groups)
        counted = self._counted(target).unsqueeze(1)
        # Samples that do not count become NaN, which needs no host synchronization. NaN in counted ones becomes inf.
        leads = leads.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        append_part(cast("list[Tensor]", self.leads), torch.where(counted, leads, torch.nan).float())
        self.sums = self.sums + torch.where(counted, terms, 0.0).sum(0)

    def compute(self) -> Tensor:
        """Return gamma for all samples so far."""
        self._append_nothing()
        leads = dim_zero_cat(self.leads)
        leads = leads[~leads.isnan().any(1)].to(real_dtype(leads.device))
        # Kept here because only here do the states include all processes.
        self._samples = weigh(leads, self.sums, len(self.split.absent_classes))
        gamma, _ = pseudo_absent_compute(self._samples, self.absent_share)
        if not len(leads):
            rank_zero_warn("The estimate of gamma received no samples of seen classes, so gamma is NaN.")
        elif gamma.isnan():
            rank_zero_warn("The estimate of gamma received logits that are NaN or infinite, so gamma is NaN.")
        return gamma

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes."""
        self._append_nothing()
        super().sync(*args, **kwargs)

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        self._samples = None

    @property
    def standard_error(self) -> Tensor:
        """Standard error of gamma, the sampling error alone. NaN for fewer than two samples."""
        return pseudo_absent_compute(self._gathered()[1], self.absent_share).standard_error

    @property
    def num_samples(self) -> int:
        """Number of samples used for gamma."""
        return len(self._gathered()[1].margin)

    @property
    def seen_accuracy(self) -> Tensor:
        """Accuracy on the samples among the seen classes alone.

        If it is near 1, and lower on other samples, the margins of these samples are too large.
        """
        right = self._gathered()[1].right  # smoothed, so neither 0 nor 1
        return (right > 0.5).to(right).mean()

    @property
    def expected_change(self) -> AccuracyChange:
        """What gamma is expected to change in the accuracy on samples of seen and of absent classes.

        On seen samples these are the samples so far. On absent samples it is an estimate, and a careful one: it was too
        low by up to 30 points on small networks, and within 4 points on most runs of an ImageNet network.
        """
        gamma, samples = self._gathered()
        return AccuracyChange(*accuracy_change(samples, gamma))

    @property
    def break_even_share(self) -> Tensor:
        """The share of samples of absent classes above which a positive gamma is expected to pay.

        A negative gamma is expected to pay below it. On nine of ten recorded runs it was right within a factor of two.
        """
        gamma, samples = self._gathered()
        return break_even_share(samples, gamma)

    @property
    def share_table(self) -> ShareTable | None:
        """Gamma, and what it is expected to do, for each share of absent samples. ``None`` if gamma is NaN."""
        gamma, samples = self._gathered()
        return None if gamma.isnan() else pseudo_absent_table(samples)

    def _gathered(self) -> tuple[Tensor, WeighedSamples]:
        gamma = self.compute()
        assert self._samples is not None
        return gamma, self._samples

    def _append_nothing(self) -> None:
        # A process without samples must share an empty tensor of the right shape. After gathering, it is not a list.
        if isinstance(self.leads, list) and not self.leads:
            self.leads.append(torch.empty(0, 3, device=self.device))
