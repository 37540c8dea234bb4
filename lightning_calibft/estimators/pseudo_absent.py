"""Gamma that best tells seen samples from pseudo-absent copies of them, over many batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_calibft.class_map import ClassMap
from lightning_calibft.functional._inputs import check_inputs
from lightning_calibft.functional.logit_gap import check_seen_classes
from lightning_calibft.functional.pseudo_absent import pseudo_absent_compute, pseudo_absent_update
from lightning_calibft.label_names import LabelNames
from lightning_calibft.metrics.base import AbsentClassMetric
from lightning_calibft.split import ClassIds


class PseudoAbsent(AbsentClassMetric):
    r"""Where seen samples part from copies of themselves whose class plays an absent one.

    .. math:: |S| \, \operatorname{mean} \sigma(\gamma - m) = |U| \, \operatorname{mean} \sigma(m' - \gamma)

    with :math:`m` the margins of the samples and :math:`m'` those of their copies. See
    :func:`lightning_calibft.functional.pseudo_absent_gamma` for both, and for the limits. It needs the model from
    before fine-tuning as well, and trains none. The state is 8 bytes a sample. After ``compute`` on all processes,
    :attr:`standard_error` and :attr:`num_samples` need no further communication.

    As input to ``forward`` and ``update`` the metric accepts:

    - ``logits``: A float tensor of shape ``(N, C)`` from the fine-tuned model in eval mode, not probabilities.
    - ``target``: An integer tensor of shape ``(N,)`` with class ids. Samples of classes that are not seen are left out.
    - ``pretrained_logits``: The logits of the same samples from the model before fine-tuning, ``(N, C)``.

    As output of ``forward`` and ``compute`` the metric returns gamma, a float64 scalar, NaN with a warning if no sample
    counts.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the at least two classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        ignore_index: A label whose samples are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronisation.
        class_map: The head's row of each target, where they differ, as
            :func:`~lightning_calibft.class_map.resolve_class_map` takes it. The ``seen_classes`` are rows all the same.
        label_names: Names of the head's rows, for a ``class_map`` of names.
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

    is_differentiable: bool = False
    higher_is_better: bool | None = None
    needs_pretrained_logits = True

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        ignore_index: int | None = None,
        validate_args: bool = True,
        class_map: ClassMap | None = None,
        label_names: LabelNames | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_classes,
            seen_classes,
            absent_classes,
            ignore_index,
            validate_args,
            class_map,
            label_names,
            **kwargs,
        )
        check_seen_classes(len(self.split.seen_classes))
        self._uncertainty: tuple[Tensor, Tensor] | None = None
        self._name_states("pseudo-absent")
        self._add("margins", [], "cat")

    def update(self, logits: Tensor, target: Tensor, pretrained_logits: Tensor) -> None:
        """Add a batch of logits ``(N, C)``, class ids ``(N,)`` and logits from before fine-tuning ``(N, C)``."""
        target = self._rows(logits, target, probabilities=True)
        if self.validate_args:
            check_inputs(pretrained_logits, target, self.split.num_classes, self._ignored_row)
        margins = pseudo_absent_update(logits, target, pretrained_logits, self._groups, self._ignored_row)
        self._get("margins").append(margins.float())

    def compute(self) -> Tensor:
        """Return gamma of all samples so far."""
        self._append_nothing()
        margins = dim_zero_cat(self._get("margins"))
        gamma, error, count = pseudo_absent_compute(
            margins, len(self.split.seen_classes), len(self.split.absent_classes)
        )
        # Kept because here, and only here, the states are those of all processes.
        self._uncertainty = error, count
        return gamma

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes."""
        self._append_nothing()
        super().sync(*args, **kwargs)

    @property
    def standard_error(self) -> Tensor:
        """Standard error of gamma, NaN for fewer than two samples."""
        return self._error()[0].to(self.device)

    @property
    def num_samples(self) -> int:
        """Number of samples that gamma rests on."""
        return int(self._error()[1])

    def _error(self) -> tuple[Tensor, Tensor]:
        self.compute()
        assert self._uncertainty is not None
        return self._uncertainty

    def _append_nothing(self) -> None:
        # A process without samples has an empty tensor to share, of the right shape. Gathered, it is no list.
        margins = self._get("margins")
        if isinstance(margins, list) and not margins:
            margins.append(torch.empty(0, 2, device=self.device))
