"""Pseudo cross-validation without Lightning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from torchmetrics.utilities.prints import rank_zero_info
from tqdm.auto import tqdm

from lightning_calibft._arguments import check_absent_share, check_integer, check_model
from lightning_calibft._format import StrPath
from lightning_calibft.calibration.batch_reader import BatchReader, UnpackBatch, check_rows
from lightning_calibft.calibration.data_check import empty_error
from lightning_calibft.calibration.evaluation_pass import EvaluationPass, head_width, preserve_random_state
from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.cross_validation.splits import Candidates, CrossValidationPlan, cross_validate
from lightning_calibft.head.attach import attach, reset_gamma
from lightning_calibft.labels.class_map import IGNORE_INDEX, ClassMap, resolve_class_map
from lightning_calibft.labels.label_names import LabelNames
from lightning_calibft.split import ClassIds, ClassSplit


def pseudo_cross_validation(
    model: nn.Module,
    dataset: Dataset[Any],
    fit_fn: Callable[[Any, Subset[Any]], nn.Module | None],
    seen_classes: ClassIds | None = None,
    *,
    absent_classes: ClassIds | None = None,
    absent_share: float | None = None,
    num_splits: int = 3,
    candidates: Candidates = "seen",
    head: str | None = None,
    unpack_batch: UnpackBatch | str | None = None,
    class_map: ClassMap | None = None,
    label_names: LabelNames | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    seed: int = 0,
    folder: StrPath | None = None,
    progress: bool = True,
) -> CalibrationResult:
    r"""Find gamma by fine-tuning on halves of the seen classes, while the other halves play absent.

    A copy of the model before fine-tuning is fine-tuned on a random half of :math:`S`. It is then evaluated on all
    fine-tuning samples, where the other half plays the absent classes. Some gammas bring these pseudo-absent classes
    back to the accuracy that the model had before fine-tuning. Among them, the gamma with the best overall accuracy is
    chosen. The result is the mean over the splits; splits without such a gamma are left out. Mai et al.,
    "Fine-Tuning is Fine, if Calibrated", NeurIPS 2024, section 5.

    This takes ``num_splits`` more trainings, each on about half of the samples. A model that is fine-tuned on half of
    the classes, with half of the data, may need a different gamma than a model that is fine-tuned on all of them.

    Args:
        model: The classifier before fine-tuning. It is not changed.
        dataset: The fine-tuning data, a map-style dataset. Batches of its samples are read as by ``calibrate``.
        fit_fn: Called as ``fit_fn(copy, subset)`` with a copy of the model and the samples of a split's classes. It
            fine-tunes the copy and returns it, or changes the copy in place and returns ``None``.
        seen_classes: Head rows of the fine-tuning classes, at least three. ``None``: the labels in ``dataset``.
        absent_classes: Head rows of the absent classes. ``None``: all classes that are not seen.
        absent_share: The share of samples of absent classes that the model will meet, in (0, 1), which weights the
            accuracies on both halves. ``None``: the share of the pseudo-absent samples.
        num_splits: Number of splits. They all differ, as long as there are enough different halves.
        candidates: The classes that the argmax runs over, as in ``SplitAccuracy``: ``"seen"``, or ``"all"``, where the
            absent classes are shifted together with the pseudo-absent classes.
        head: Dotted name of the module that outputs the logits, if it is not found automatically.
        unpack_batch: As in :func:`~lightning_calibft.calibrate`.
        class_map: As in :func:`~lightning_calibft.calibrate`.
        label_names: As in :func:`~lightning_calibft.calibrate`.
        batch_size: Samples per batch when the data is read without training.
        num_workers: Number of processes that read these batches.
        collate_fn: Makes a batch from samples, as in a ``DataLoader``.
        seed: Seed of the splits and of the random numbers in training.
        folder: Where finished splits are stored. A run that was stopped continues from there. The stored splits do not
            record what ``fit_fn`` does, so name another folder if you change it.
        progress: Whether to show a progress bar of the splits.

    Returns:
        Gamma, its standard error over the splits, the number of samples and the class split.

    Raises:
        ValueError: If there are fewer than three seen classes, if no split has such a gamma, if ``folder`` holds the
            splits of a run with other settings, or if ``calibrate`` would raise it.
        TypeError: If a target does not hold class ids, or if ``dataset`` or the return value of ``fit_fn`` is of the
            wrong type.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from lightning_calibft import pseudo_cross_validation, set_gamma
        >>> _ = torch.manual_seed(0)
        >>> pretrained = torch.nn.Linear(8, 6)
        >>> _ = pretrained.weight.data.copy_(torch.eye(6, 8))
        >>> target = torch.arange(4).repeat(16)
        >>> dataset = TensorDataset(torch.eye(8)[target] + 0.3 * torch.randn(64, 8), target)
        >>> def fit(model, data):
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        ...     for inputs, target in DataLoader(data, 8, shuffle=True):
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.cross_entropy(model(inputs), target).backward()
        ...         optimizer.step()
        >>> result = pseudo_cross_validation(pretrained, dataset, fit, progress=False)
        >>> result.estimator, result.num_samples, result.split.absent_classes
        ('pcv', 64, (4, 5))
        >>> fit(pretrained, dataset)
        >>> _ = set_gamma(pretrained, result.gamma, result.split.seen_classes, result.split.absent_classes)
    """
    check_model("model", model)
    check_integer("batch_size", batch_size, least=1)
    check_integer("num_workers", num_workers, least=0)
    plan = CrossValidationPlan(num_splits, candidates, seed, folder, check_absent_share(absent_share))
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"Expected argument `dataset` to be map-style, so that parts of it can be taken, but got a"
            f" {type(dataset).__name__}. Read it into a list."
        )
    if collate_fn is not None and not callable(collate_fn):
        raise TypeError(f"Expected argument `collate_fn` to be a function, but got {collate_fn!r}.")
    if not callable(fit_fn):
        raise TypeError(f"Expected argument `fit_fn` to be a function, but got {fit_fn!r}.")
    before = reset_gamma(attach(copy.deepcopy(model), head))
    width = head_width(before)
    reader = BatchReader(unpack_batch, resolve_class_map(class_map, label_names, width))
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=collate_fn)
    with (
        preserve_random_state(),
        tqdm(total=num_splits, desc="Cross-validating", unit="split", disable=not progress) as bar,
    ):
        rows = read_rows(loader, reader)
        split = ClassSplit(width, classes_of(rows, width) if seen_classes is None else seen_classes, absent_classes)
        rank_zero_info(cost(plan, split, rows))

        def fit(_: int, pseudo_split: ClassSplit) -> nn.Module:
            tuned = copy.deepcopy(before)
            returned = fit_fn(tuned, Subset(dataset, of_classes(rows, pseudo_split.seen_classes)))
            if not isinstance(returned, (nn.Module, type(None))):
                raise TypeError(f"Expected argument `fit_fn` to return a model or None, but got {returned!r}.")
            tuned = tuned if returned is None else returned
            bar.update()
            return attach(tuned, head)

        return cross_validate(
            plan,
            split,
            before,
            fit,
            lambda net: EvaluationPass(net, [loader], reader=reader, bar=None),
            settings={"num_samples": len(of_classes(rows, split.seen_classes))},
        )


def read_rows(loader: DataLoader[Any], reader: BatchReader) -> Tensor:
    """Return the head's row of each sample, in the order of the loader.

    Raises:
        ValueError: If there are no samples.
    """
    rows = [reader.rows(batch).cpu() for batch in loader]
    if not rows:
        raise empty_error()
    return torch.cat(rows)


def classes_of(rows: Tensor, num_classes: int) -> list[int]:
    """Return the classes of the samples.

    Raises:
        ValueError: If a label is not a row of the head.
    """
    rows = rows[rows != IGNORE_INDEX]
    check_rows(rows, num_classes)
    return sorted(set(rows.tolist()))


def of_classes(rows: Tensor, classes: Sequence[int]) -> list[int]:
    """Return the positions of the samples of some classes."""
    positions: list[int] = torch.isin(rows, torch.tensor(classes)).nonzero().flatten().tolist()
    return positions


def cost(plan: CrossValidationPlan, split: ClassSplit, rows: Tensor) -> str:
    """Return a line that says how much training the splits take.

    Raises:
        ValueError: If a half of the classes has no samples.
    """
    total = len(of_classes(rows, split.seen_classes))
    parts = [len(of_classes(rows, part.seen_classes)) for part in plan.pseudo_splits(split)]
    if 0 in parts or total in parts:
        raise ValueError(
            "Expected argument `seen_classes` to name classes of which each half has samples in the fine-tuning data,"
            f" but one half has {'none' if 0 in parts else 'all'} of the {total} samples. Leave out the classes without"
            " samples."
        )
    shares = ", ".join(f"{100 * part / max(1, total):.0f} %" for part in parts)
    return f"Pseudo cross-validation: {len(parts)} more trainings, on {shares} of the {total:,} samples."
