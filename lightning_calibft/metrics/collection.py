"""The metrics that are usually reported for seen and absent classes, in one call."""

from __future__ import annotations

from typing import Any

from torchmetrics import MetricCollection

from lightning_calibft.functional._inputs import Average
from lightning_calibft.labels.class_map import ClassMap, resolve_class_map
from lightning_calibft.labels.label_names import LabelNames
from lightning_calibft.metrics.accuracy import HarmonicMeanAccuracy, SplitAccuracy
from lightning_calibft.metrics.ausuc_with_accuracies import AUSUCWithAccuracies
from lightning_calibft.split import ClassIds, ClassSplit


class _OfOneState(MetricCollection):
    """A collection whose metrics all read the states of the first one of their only compute group.

    :class:`torchmetrics.MetricCollection` hands these states on after each batch, which takes about as long as the
    update itself if batches are small. They are handed on anyway when the metrics are read.
    """

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add a batch of logits ``preds (N, C)`` and class ids ``target (N,)``."""
        if len(self.compute_groups) > 1:  # metrics were added
            super().update(*args, **kwargs)
            return
        first = self._modules[self.compute_groups[0][0]]
        first.update(*args, **(first._filter_kwargs(**kwargs) if kwargs else {}))
        self._state_is_copy = False
        for metric in self._modules.values():
            if metric._computed is not None:
                metric._computed = None  # type: ignore[unreachable]


def absent_class_metrics(
    num_classes: int,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    prefix: str | None = None,
    postfix: str | None = None,
    average: Average = "micro",
    ignore_index: int | None = None,
    validate_args: bool = True,
    class_map: ClassMap | None = None,
    label_names: LabelNames | None = None,
    **kwargs: Any,
) -> MetricCollection:
    """Create the metrics of a fine-tuned classifier, which all share one pass over the logits.

    - ``ausuc``: area under the seen-unseen curve, which no gamma changes.
    - ``acc_all``, ``acc_seen``, ``acc_absent``: accuracy of all, seen, and absent samples among all classes.
    - ``acc_harmonic``: harmonic mean of the last two.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        prefix: Text to put before each name.
        postfix: Text to put after each name.
        average: ``"micro"`` weights samples equally, ``"macro"`` weights classes that have samples equally.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.
        class_map: The head's row for each target, if targets are not row numbers. See
            :func:`~lightning_calibft.resolve_class_map`. In either case ``seen_classes`` holds row numbers.
        label_names: Names of the head's rows, needed if ``class_map`` contains names.
        kwargs: Arguments of :class:`torchmetrics.Metric`, for each metric.

    Example:
        >>> import torch
        >>> from lightning_calibft.metrics import absent_class_metrics
        >>> metrics = absent_class_metrics(3, seen_classes=[0, 1], prefix="val_")
        >>> metrics.update(torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 1.0]]), torch.tensor([0, 2]))
        >>> {name: value.item() for name, value in metrics.compute().items()}
        {'val_acc_absent': 0.0, 'val_acc_all': 0.5, 'val_acc_harmonic': 0.0, 'val_acc_seen': 1.0, 'val_ausuc': 1.0}
    """
    split = ClassSplit(num_classes, seen_classes, absent_classes)
    seen, absent = split.seen_classes, split.absent_classes
    common = {
        "average": average,
        "ignore_index": ignore_index,
        "validate_args": validate_args,
        "class_map": resolve_class_map(class_map, label_names, num_classes),
        **kwargs,
    }
    return _OfOneState(
        {
            "ausuc": AUSUCWithAccuracies(num_classes, seen, absent, **common),
            "acc_all": SplitAccuracy(num_classes, seen, absent, **common),
            "acc_seen": SplitAccuracy(num_classes, seen, absent, samples="seen", **common),
            "acc_absent": SplitAccuracy(num_classes, seen, absent, samples="absent", **common),
            "acc_harmonic": HarmonicMeanAccuracy(num_classes, seen, absent, **common),
        },
        prefix=prefix,
        postfix=postfix,
        compute_groups=[["ausuc", "acc_all", "acc_absent", "acc_harmonic", "acc_seen"]],
    )
