"""Calibrate a model, with or without Lightning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lightning_calibft._arguments import check_model
from lightning_calibft._format import warning_of_harm
from lightning_calibft.calibration.batch_reader import BatchReader, UnpackBatch
from lightning_calibft.calibration.data_check import check_weights, warn_of_many_absent_rows
from lightning_calibft.calibration.distributed import SharedErrors
from lightning_calibft.calibration.evaluation_pass import (
    EvaluationPass,
    check_tolerance,
    head_width,
    plain_bar,
    preserve_random_state,
)
from lightning_calibft.calibration.loaders import calibration_loaders, check_max_samples, unlabeled_loaders
from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.estimators import Estimator, check_estimator, check_unlabeled, needs_absent_samples
from lightning_calibft.estimators.choice import with_absent_share
from lightning_calibft.head.attach import attach, detach, set_attached_gamma
from lightning_calibft.head.offset import attached_heads, offset_of, remove_offset
from lightning_calibft.labels.class_map import ClassMap, resolve_class_map
from lightning_calibft.labels.label_names import LabelNames
from lightning_calibft.split import ClassSplit


def calibrate(
    model: nn.Module,
    loader: Any,
    seen_classes: Iterable[int] | Tensor | None = None,
    *,
    absent_classes: Iterable[int] | Tensor | None = None,
    head: str | nn.Module | None = None,
    estimator: str | Estimator = "alg",
    estimator_kwargs: Mapping[str, Any] | None = None,
    absent_share: float | None = None,
    unlabeled: Any = None,
    unpack_batch: UnpackBatch | str | None = None,
    class_map: ClassMap | None = None,
    label_names: LabelNames | None = None,
    max_samples: int | None = None,
    tolerance: float | None = None,
    pretrained: nn.Module | Mapping[str, Tensor] | None = None,
    held_out: bool = False,
    progress: bool = True,
) -> CalibrationResult:
    r"""Find gamma on the fine-tuning data and put it into the head of the model.

    With the default estimator, gamma is the average logit gap (Mai et al., "Fine-Tuning is Fine, if Calibrated",
    NeurIPS 2024): the mean over the samples :math:`(x, y)` of

    .. math:: \operatorname{mean}_{c \in S,\, c \neq y} z_c(x) - \operatorname{mean}_{c \in U} z_c(x)

    The model runs in eval mode and without gradients. Its train and eval modes, its BatchNorm statistics, and the
    random state are restored afterwards. In a process group, each process reads its share of the samples, and all of
    them get the same result.

    Args:
        model: A classifier. It stays on its device, and batches are moved there.
        loader: The fine-tuning data, or, better for ``"pseudo_absent"``, samples of its classes that were not trained
            on (accuracies on these samples are then slightly optimistic): a
            ``DataLoader``, a collection of them, or any iterable of batches. A batch is a pair ``(inputs, target)``, a
            longer tuple with one vector of class ids, or a mapping or object with its target under ``label``,
            ``labels``, ``target``, ``targets``, ``y`` or the like. One-hot vectors are class ids, too. A plain
            ``DataLoader`` is read in order and completely: no shuffling, no dropped last batch.
        seen_classes: Head rows of the fine-tuning classes. ``None``: the labels in ``loader``, which is then read
            twice.
        absent_classes: Head rows of the absent classes. ``None``: all classes that are not seen.
        head: The module that outputs the logits, or its dotted name, if it is not found automatically.
        estimator: ``"alg"``, ``"pseudo_absent"`` (needs ``pretrained``), another name in
            :data:`~lightning_calibft.estimators.ESTIMATORS`, or an instance of such a metric with its own classes.
            ``"operating_point"`` needs a ``loader`` of validation data that includes absent classes.
        estimator_kwargs: Further arguments of the estimator, such as ``{"min_seen_accuracy": 0.9}`` for
            ``"operating_point"``.
        absent_share: The share of samples of absent classes that the model will meet, in (0, 1). ``None``: as the
            estimator documents it. ``"alg"`` then is that of the paper, ``"pseudo_absent"`` assumes 0.5, and
            ``"operating_point"`` takes the share in its samples.
        unlabeled: Samples from where the model will be used, as a loader like the others. Labels in its batches are
            ignored: a batch can also be a tensor, a tuple of inputs, or a mapping without a target. The share of
            samples of absent classes in them is estimated as by :class:`~lightning_calibft.metrics.AbsentShare`, and
            gamma is the one for it. With ``pretrained``, the margins of the model before fine-tuning count as well,
            and the samples run through both models. Takes the place of ``absent_share``, and needs the estimator
            ``"pseudo_absent"`` or ``"operating_point"``.
        unpack_batch: A function, or its import path, that takes a batch and returns ``(inputs, target)``. A tuple of
            inputs becomes the positional arguments of ``model``, and a mapping its keyword arguments.
        class_map: The head's row for each target in ``loader``, if they differ, as with image folders, which number
            their classes from 0. See :func:`~lightning_calibft.resolve_class_map`.
        label_names: Names of the head's rows, for a ``class_map`` of names.
        max_samples: Read at most about this many samples, drawn at random with a fixed seed.
        tolerance: Stop reading when the standard error of gamma is at most this, in logits. A plain ``DataLoader`` is
            then read in random order, any other loader in its own order. The result has the number of samples read.
            Works with one loader only. Without ``seen_classes``, the labels of all its samples are read first.
        pretrained: The model before fine-tuning, or its state dict, for the estimators that need it
            (``"pseudo_absent"``).
        held_out: Whether the samples in ``loader`` were not trained on. Changes no number, but the verdict on gamma can
            then rely on samples that the model is nearly always right on.
        progress: Whether to show a progress bar (on the first process).

    Returns:
        Gamma, its standard error, the number of samples and the class split.

    Raises:
        ValueError: If the head is not found or its output is not the logits, if the loader is empty, if a target is out
            of range, if a logit is not finite, or if the arguments do not fit together. The model is then unchanged.
        TypeError: If a target does not hold class ids.

    Example:
        >>> import torch
        >>> from lightning_calibft import calibrate, get_gamma
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 4))
        >>> batches = [(torch.randn(16, 2, 4), torch.randint(2, (16,))) for _ in range(3)]
        >>> result = calibrate(model, batches, progress=False)
        >>> result.split.absent_classes, result.num_samples
        ((2, 3), 48)
        >>> abs(get_gamma(model) - result.gamma) < 1e-6  # the head keeps it in float32
        True

        If the backbone is frozen, or its features are kept, only the head has to run:

        >>> features, target = torch.randn(48, 8), torch.randint(2, (48,))
        >>> before, head = torch.nn.Linear(8, 4), model[1]
        >>> options = {"estimator": "pseudo_absent", "pretrained": before, "progress": False}
        >>> calibrate(head, [(features, target)], **options).num_samples  # gamma is in the head of `model`
        48
    """
    errors = SharedErrors()
    with errors.shared():
        if unlabeled is not None:
            check_unlabeled(estimator, estimator_kwargs, absent_share)
        estimator_kwargs = with_absent_share(estimator, estimator_kwargs, absent_share)
        check_estimator(estimator, estimator_kwargs, seen_classes, absent_classes)
        check_max_samples(max_samples)
        check_tolerance(tolerance)
        if seen_classes is None and isinstance(estimator, str):
            _check_classes_can_be_read(loader, estimator)
        check_model("model", model)
        fresh = not attached_heads(model)
        attach(model, head)
    try:
        with preserve_random_state():
            with errors.shared():
                reader = BatchReader(unpack_batch, resolve_class_map(class_map, label_names, head_width(model)))
                reading = EvaluationPass(
                    model,
                    calibration_loaders(loader, max_samples, at_random=tolerance is not None, errors=errors),
                    estimator,
                    estimator_kwargs,
                    reader,
                    max_samples,
                    tolerance=tolerance,
                    bar=plain_bar if progress else None,
                    pretrained=_weights(pretrained),
                    unlabeled=None if unlabeled is None else unlabeled_loaders(unlabeled, max_samples, errors=errors),
                )
                check_weights(reading.device)
                errors.agree()
                if not isinstance(estimator, str):
                    split = estimator.split
                else:
                    seen = reading.read_classes() if seen_classes is None else seen_classes
                    split = ClassSplit(reading.num_classes, seen, absent_classes)
                    said = absent_classes is not None or "absent_share" in (estimator_kwargs or {})
                    # Of labels that look like positions in a list, there is another warning.
                    in_order = split.seen_classes == tuple(range(len(split.seen_classes)))
                    said = said or (seen_classes is None and not reader.maps and in_order)
                    if estimator in ("alg", "pseudo_absent") and not said:
                        warn_of_many_absent_rows(len(split.seen_classes), len(split.absent_classes))
                errors.agree()
            result = replace(reading.for_unlabeled(reading.run(split)), held_out=bool(held_out))
    except BaseException:
        if fresh:
            detach(model)
        raise
    for module in attached_heads(model).values() if fresh else ():
        if offset_of(module).coefficient == 0:  # in a copy of the model that does not give the logits
            remove_offset(module)
    set_attached_gamma(model, result.gamma, result.split, result.as_dict())
    if harm := warning_of_harm(result.as_dict()):
        warnings.warn(harm, stacklevel=2)
    return result


def _weights(model: nn.Module | Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
    return model.state_dict() if isinstance(model, nn.Module) else model


def _check_classes_can_be_read(loader: Any, estimator: str) -> None:
    expected = "Expected argument `seen_classes` to name the classes of the fine-tuning data for"
    if isinstance(loader, Iterator):
        raise ValueError(
            f"{expected} a `loader` that can be read only once, but got None and a {type(loader).__name__}. Name them,"
            " or pass a list or a DataLoader as `loader`."
        )
    if needs_absent_samples(estimator):
        raise ValueError(
            f"{expected} the estimator {estimator!r}, whose `loader` also has absent classes, but got None."
        )
