"""What fine-tuning does to the rows of the classification head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_calibft.functional._inputs import check_matrix, real_dtype
from lightning_calibft.head.find import find_head
from lightning_calibft.head.layers import as_tuple, is_linear
from lightning_calibft.plotting import _AX_TYPE, _PLOT_OUT_TYPE, new_axis
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
    """Mean cosine between the updates of two different classes, NaN where no two of them changed."""

    within_seen: float
    within_absent: float
    between: float


@dataclass(frozen=True)
class UpdateSimilarity:
    """Cosines between the updates of the rows of a head.

    Attributes:
        matrix: The cosines, of shape ``(C, C)``, NaN for a class that did not change.
        means: Means over pairs of different classes.
        split: The seen and the absent classes.
    """

    matrix: Tensor
    means: MeanSimilarity
    split: ClassSplit

    def plot(self, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Draw the matrix of cosines, seen classes first.

        Returns a new figure and its axis, or ``None`` and ``ax`` if it was given.
        """
        figure, axis = new_axis(ax)
        seen, absent = self.split.seen_classes, self.split.absent_classes
        order = [*seen, *absent]
        image = axis.imshow(self.matrix[order][:, order].numpy(), cmap="PRGn", vmin=-1, vmax=1)
        for line in (axis.axhline, axis.axvline):
            line(len(seen) - 0.5, color="black", linewidth=0.8)
        middles = [(len(seen) - 1) / 2, len(seen) + (len(absent) - 1) / 2]
        axis.set_xticks(middles, ["seen", "absent"])
        axis.set_yticks(middles, ["seen", "absent"])
        axis.figure.colorbar(
            image, ax=axis, location="bottom", ticks=[-1, -0.5, 0, 0.5, 1], label="Cosine between updates"
        )
        return figure, axis


def head_weight(model: nn.Module, head: str | nn.Module | None = None) -> Tensor:
    """Return a copy of the weight of a model's head, with one row for each class.

    Args:
        model: Any module with a linear head (``Linear`` or a 1x1 ``Conv2d``).
        head: As in :func:`~lightning_calibft.find_head`.

    Returns:
        The weight, of shape ``(C, D)``. Heads whose logits are averaged count as one head on all of their features.

    Raises:
        ValueError: If the head is not found or is not a plain linear layer, for example because it has an adapter.

    Example:
        >>> import torch
        >>> from lightning_calibft.analysis.weights import head_weight
        >>> head_weight(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 5))).shape
        torch.Size([5, 16])
    """
    heads = as_tuple(find_head(model, head))
    weights = []
    for module in heads:
        weight = module.weight if is_linear(module) else None
        if not isinstance(weight, Tensor):
            raise ValueError(
                f"Expected the head to be Linear or a 1x1 Conv2d, with one row for each class, but got"
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
    """Return the mean L2 norms of the head's rows of seen and of absent classes.

    Training on imbalanced data shrinks the rows of rare classes. Fine-tuning hardly changes those of absent classes.
    See Mai et al., "Fine-Tuning is Fine, if Calibrated", NeurIPS 2024, section 5.

    Args:
        weight: Weight of the head, of shape ``(C, D)``, or a model.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all classes that are not seen.
        head: Head of the model, as in :func:`~lightning_calibft.find_head`. Not used for tensors.

    Raises:
        ValueError: If the head is not found or not linear, or the classes do not fit it.
        TypeError: If ``weight`` is not a floating-point tensor.

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
    """Return the cosines between the changes that fine-tuning made to the rows of the head.

    If all rows of absent classes were pushed in the same direction, the order among their logits is preserved, and a
    single number can undo the push. See Mai et al., "Fine-Tuning is Fine, if Calibrated", NeurIPS 2024, section 5.

    Args:
        before: Weight of the head, of shape ``(C, D)``, before fine-tuning, or the model.
        after: The weight or the model after fine-tuning.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes that it lacks. ``None``: all classes that are not seen.
        head: Head of the model, as in :func:`~lightning_calibft.find_head`. Not used for tensors.

    Raises:
        ValueError: If the head is not found or not linear, or the shapes or classes do not fit.
        TypeError: If a weight is not a floating-point tensor.

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
            f"Expected arguments `before` and `after` to have the same shape, but got {tuple(before.shape)} and"
            f" {tuple(after.shape)}. Both must be weights of the same head."
        )
    update = _update(before, after)
    directions = update / update.norm(dim=1, keepdim=True)  # NaN where nothing changed
    return UpdateSimilarity((directions @ directions.T).cpu(), _means(update, split), split)


def mean_similarity(before: Tensor, after: Tensor, split: ClassSplit) -> MeanSimilarity:
    """Return the means of :func:`update_similarity` without the matrix, in O(C * D) time and memory."""
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
    # Sums over pairs are products of sums: the cosines within a group add up to the squared length of its sum.
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
