"""What fine-tuning does to the rows of the classification head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_calibft.functional._inputs import check_matrix, real_dtype
from lightning_calibft.head import find_head
from lightning_calibft.head.layers import as_tuple, is_linear
from lightning_calibft.split import ClassIds, ClassSplit


@dataclass(frozen=True)
class RowNorms:
    """L2 norms of the rows of a head: mean and (population) standard deviation over the classes of each group."""

    seen_mean: float
    seen_std: float
    absent_mean: float
    absent_std: float


@dataclass(frozen=True)
class MeanSimilarity:
    """Mean cosine between the updates of two different classes, NaN where there are no two that changed."""

    within_seen: float
    within_absent: float
    between: float


@dataclass(frozen=True)
class UpdateSimilarity:
    """Cosines between the updates of the rows of a head.

    Attributes:
        matrix: One row and column for each class, of shape ``(C, C)``; NaN for a class that did not change.
        means: Means over pairs of different classes.
        split: The seen and the absent classes.
    """

    matrix: Tensor
    means: MeanSimilarity
    split: ClassSplit


def head_weight(model: nn.Module, head: str | nn.Module | None = None) -> Tensor:
    """Return a copy of the weight of the head of a model, one row a class.

    Args:
        model: Any module with a linear head (``Linear`` or a 1x1 ``Conv2d``).
        head: As in :func:`~lightning_calibft.find_head`.

    Returns:
        The weight, of shape ``(C, D)``. Heads whose logits are averaged count as one of the features of all of them.

    Raises:
        ValueError: If the head is not found, or is not linear by itself, as one with an adapter.

    Example:
        >>> import torch
        >>> from lightning_calibft.analysis import head_weight
        >>> head_weight(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5))).shape
        torch.Size([5, 16])
    """
    heads = as_tuple(find_head(model, head))
    weights = []
    for module in heads:
        weight = module.weight if is_linear(module) else None
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"Expected the head to be Linear or a 1x1 Conv2d, whose rows are those of the classes, but got"
                f" {type(module).__name__}. Merge adapters first, or name another `head`."
            )
        weights.append(weight.detach().flatten(1) / len(heads))
    return torch.cat(weights, 1).clone()


def row_norms(
    weight: Tensor | nn.Module,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    head: str | nn.Module | None = None,
) -> RowNorms:
    """L2 norms of the rows of seen and of absent classes.

    Training on imbalanced data lets rows of rare classes shrink; fine-tuning hardly changes those of absent ones.
    Mai et al., "Fine-Tuning is Fine, if Calibrated", NeurIPS 2024, section 5.

    Args:
        weight: Weight of the head of shape ``(C, D)``, or a model.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        head: Of a model, as in :func:`~lightning_calibft.find_head`.

    Raises:
        ValueError: If the head is not found or not linear, or the classes do not fit it.
        TypeError: If ``weight`` is no floating point tensor.

    Example:
        >>> import torch
        >>> from lightning_calibft.analysis import row_norms
        >>> row_norms(torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]]), seen_classes=[0, 1])
        RowNorms(seen_mean=3.0, seen_std=2.0, absent_mean=2.0, absent_std=0.0)
    """
    weight, split = _weight_and_split("weight", weight, seen_classes, absent_classes, head)
    norms = weight.to(real_dtype(weight.device)).norm(dim=1).cpu()
    seen, absent = norms[list(split.seen_classes)], norms[list(split.absent_classes)]
    return RowNorms(
        seen.mean().item(), seen.std(correction=0).item(), absent.mean().item(), absent.std(correction=0).item()
    )


def update_similarity(
    before: Tensor | nn.Module,
    after: Tensor | nn.Module,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    head: str | nn.Module | None = None,
) -> UpdateSimilarity:
    """Cosines between what fine-tuning added to the rows of the head.

    Rows of absent classes that were all pushed the same way keep their order among each other, which is why one number
    can bring them back. Mai et al., "Fine-Tuning is Fine, if Calibrated", NeurIPS 2024, section 5.

    Args:
        before: Weight of the head of shape ``(C, D)`` before fine-tuning, or the model.
        after: The same after it.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all that are not seen.
        head: Of a model, as in :func:`~lightning_calibft.find_head`.

    Raises:
        ValueError: If the head is not found or not linear, or the shapes or classes do not fit.
        TypeError: If a weight is no floating point tensor.

    Example:
        >>> import torch
        >>> from lightning_calibft.analysis import update_similarity
        >>> after = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-2.0, 0.0]])
        >>> update_similarity(torch.zeros(3, 2), after, seen_classes=[0]).means
        MeanSimilarity(within_seen=nan, within_absent=1.0, between=-1.0)
    """
    before, split = _weight_and_split("before", before, seen_classes, absent_classes, head)
    after, _ = _weight_and_split("after", after, seen_classes, absent_classes, head)
    if before.shape != after.shape:
        raise ValueError(
            f"Expected arguments `before` and `after` to have one shape, but got {tuple(before.shape)} and"
            f" {tuple(after.shape)}. Both must be weights of the same head."
        )
    update = _update(before, after)
    directions = update / update.norm(dim=1, keepdim=True)  # NaN where nothing changed
    return UpdateSimilarity((directions @ directions.T).cpu(), _means(update, split), split)


def mean_similarity(before: Tensor, after: Tensor, split: ClassSplit) -> MeanSimilarity:
    """Return the means of :func:`update_similarity` without the matrix: in time and memory O(C * D)."""
    return _means(_update(before, after), split)


def _weight_and_split(
    name: str,
    weight: Tensor | nn.Module,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None,
    head: str | nn.Module | None,
) -> tuple[Tensor, ClassSplit]:
    if isinstance(weight, nn.Module):
        weight = head_weight(weight, head)
    check_matrix(name, weight)
    return weight.detach(), ClassSplit(len(weight), seen_classes, absent_classes)


def _update(before: Tensor, after: Tensor) -> Tensor:
    dtype = real_dtype(after.device)
    return after.to(dtype) - before.to(after.device, dtype)


def _means(update: Tensor, split: ClassSplit) -> MeanSimilarity:
    """Sums over pairs are products of sums: the cosines of a group add up to the squared length of its sum."""
    norms = update.norm(dim=1)
    changed = torch.stack([split.seen_mask, split.absent_mask]).to(update.device) & (norms > 0)
    sums = torch.where(changed, 1 / norms, 0) @ update
    (seen, between), (_, absent) = (sums @ sums.T).tolist()
    num_seen, num_absent = changed.sum(1).tolist()
    return MeanSimilarity(
        (seen - num_seen) / (num_seen * (num_seen - 1)) if num_seen > 1 else math.nan,
        (absent - num_absent) / (num_absent * (num_absent - 1)) if num_absent > 1 else math.nan,
        between / (num_seen * num_absent) if num_seen and num_absent else math.nan,
    )
