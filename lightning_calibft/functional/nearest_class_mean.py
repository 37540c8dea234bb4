"""Nearest class mean: a measure of the features that does not depend on the head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_calibft._arguments import check_integer
from lightning_calibft.functional._inputs import Average, Group, check_ignore_index, check_matrix, check_target
from lightning_calibft.functional.accuracy import split_accuracy
from lightning_calibft.split import _MOST_CLASSES, ClassIds


def class_means(
    features: Tensor, target: Tensor, num_classes: int, *, ignore_index: int | None = None, validate_args: bool = True
) -> Tensor:
    """Mean of the L2-normalized features of each class.

    Args:
        features: Features of shape ``(N, D)``, the input of the classification head.
        target: Class ids of shape ``(N,)``.
        num_classes: Number of classes ``C``.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization, and leaves
            out samples whose label is not in ``[0, C)``.

    Returns:
        Means of shape ``(C, D)`` in at least float32; the row of a class without samples is NaN.

    Raises:
        ValueError: If shapes or labels do not match, or ``num_classes`` is not positive.
        TypeError: If ``features`` or ``target`` has the wrong dtype, or ``num_classes`` is not an integer.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import class_means
        >>> class_means(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([1, 1]), num_classes=2)
        tensor([[   nan,    nan],
                [0.5000, 0.5000]])
    """
    check_integer("num_classes", num_classes, least=1, most=_MOST_CLASSES)
    check_ignore_index(ignore_index)
    if validate_args:
        check_matrix("features", features)
        check_target(target, len(features), num_classes, ignore_index)
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    target = target.long()
    counted = (target >= 0) & (target < num_classes)
    if ignore_index is not None:
        counted &= target != ignore_index
    label = target.where(counted, num_classes)  # an extra row collects the samples that are left out
    sums = features.new_zeros(num_classes + 1, features.shape[1]).index_add(0, label, F.normalize(features))
    counts = features.new_zeros(num_classes + 1).index_add(0, label, counted.to(features.dtype))
    return (sums / counts.unsqueeze(1))[:num_classes]


def nearest_class_mean_logits(features: Tensor, class_means: Tensor) -> Tensor:
    """Cosine similarity of features to class means.

    Args:
        features: Features of shape ``(N, D)``.
        class_means: Means of shape ``(C, D)`` from :func:`class_means`.

    Returns:
        Similarities of shape ``(N, C)`` in at least float32; ``-inf`` for the classes whose mean is NaN.

    Raises:
        ValueError: If the shapes do not match.
        TypeError: If ``features`` or ``class_means`` is not a floating point tensor.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import nearest_class_mean_logits
        >>> means = torch.tensor([[1.0, 0.0], [0.0, 0.5], [torch.nan, torch.nan]])
        >>> nearest_class_mean_logits(torch.tensor([[3.0, 4.0]]), means)
        tensor([[0.6000, 0.8000,   -inf]])
    """
    check_matrix("class_means", class_means)
    check_features(features, class_means)
    dtype = torch.promote_types(torch.promote_types(features.dtype, class_means.dtype), torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        cosine = F.normalize(features.to(dtype)) @ F.normalize(class_means.to(dtype)).T
    return cosine.masked_fill(class_means.isnan().any(1), -torch.inf)


def nearest_class_mean_accuracy(
    features: Tensor,
    target: Tensor,
    class_means: Tensor,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    samples: Group = "all",
    candidates: Group = "all",
    average: Average = "micro",
    ignore_index: int | None = None,
    validate_args: bool = True,
) -> Tensor:
    """Accuracy of the class whose mean is nearest to the features in cosine similarity.

    Args:
        features: Features of shape ``(N, D)``.
        target: Class ids of shape ``(N,)``.
        class_means: Means of shape ``(C, D)`` from :func:`class_means`. A class whose row is NaN is never predicted.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        samples: Which samples to score: those of ``"all"``, ``"seen"`` or ``"absent"`` classes.
        candidates: The classes among which to find the nearest mean.
        average: ``"micro"`` weights samples equally, ``"macro"`` weights classes that have samples equally.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.

    Returns:
        A float64 scalar in [0, 1], or NaN with a warning if no sample counts.

    Raises:
        ValueError: If an argument is out of range, or shapes or labels do not match.
        TypeError: If ``features``, ``class_means`` or ``target`` has the wrong dtype.

    Example:
        >>> import torch
        >>> from lightning_calibft.functional import nearest_class_mean_accuracy
        >>> means = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> features = torch.tensor([[0.9, 0.1], [0.2, 0.3]])
        >>> nearest_class_mean_accuracy(features, torch.tensor([0, 1]), means, seen_classes=[0])
        tensor(1., dtype=torch.float64)
    """
    return split_accuracy(
        nearest_class_mean_logits(features, class_means),
        target,
        seen_classes,
        absent_classes,
        samples=samples,
        candidates=candidates,
        average=average,
        ignore_index=ignore_index,
        validate_args=validate_args,
    )


def check_features(features: Tensor, class_means: Tensor) -> None:
    """Raise if features are not a matrix as wide as the means."""
    check_matrix("features", features)
    if features.shape[1] != class_means.shape[1]:
        raise ValueError(
            f"Expected argument `features` to have {class_means.shape[1]} columns, as `class_means` has, but got"
            f" {features.shape[1]}. Take both from the input of the same head."
        )
