"""Reductions of a batch of logits to values for each group of classes, computed in chunks of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_calibft.functional._inputs import _SEEN, Groups


class BatchReduction(NamedTuple):
    """The values that the accuracies and the curve need from a batch, each of shape ``(N,)``.

    They are the largest logits of the seen and of the absent classes, the group of the label (-1 if the sample does not
    count), and whether the true class wins within its group and within both groups. Ties go to the lower class id, as
    in :func:`torch.max`. The maxima of samples that do not count are meaningless.
    """

    top_seen: Tensor
    top_absent: Tensor
    group: Tensor
    right_in_group: Tensor
    right: Tensor


def reduce_batch(preds: Tensor, target: Tensor, groups: Groups, ignore_index: int | None) -> BatchReduction:
    """Reduce a batch of logits ``(N, C)`` in one pass."""
    preds, target = preds.detach(), target.long()
    group = groups.of_samples(target, ignore_index)
    label = target.clamp(0, preds.shape[1] - 1)
    own = preds.gather(1, label.unsqueeze(1)).squeeze(1)
    place = groups.place[label].unsqueeze(1)
    num_seen = len(groups.seen)

    def others(preds: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        # A maximum costs a fraction of an argmax. So the true class's logit is masked here and compared separately.
        copy = (preds.clone() if groups.order is None else preds.index_select(1, groups.order)).scatter_(
            1, place, -torch.inf
        )
        return copy[:, :num_seen].amax(1), copy[:, num_seen:].amax(1)

    seen, absent = in_row_chunks(others, preds, place)
    is_seen = group == _SEEN
    rival, outside = torch.where(is_seen, seen, absent), torch.where(is_seen, absent, seen)
    right_in_group = own > rival
    right = right_in_group & (own > outside)
    tied = (own == rival) | (own == outside)
    on_cpu = preds.device.type == "cpu"
    if not on_cpu or tied.any():  # elsewhere, asking would make the host wait
        rows = tied.nonzero().squeeze(1) if on_cpu else slice(None)
        mine = own[rows].unsqueeze(1)
        column = torch.arange(preds.shape[1], device=preds.device)
        lower = (preds[rows] == mine) & (column < label[rows].unsqueeze(1))
        of_class, finite = groups.of_class[:-1], own[rows] > -torch.inf  # -inf never wins
        lower_in_group = (lower & (of_class == group[rows].unsqueeze(1))).any(1)
        in_group = (own >= rival)[rows] & finite & ~lower_in_group
        right_in_group[rows] = in_group
        right[rows] = in_group & (own >= outside)[rows] & ~(lower & (of_class >= 0)).any(1)
    top = torch.maximum(own, rival)
    return BatchReduction(
        torch.where(is_seen, top, seen), torch.where(is_seen, absent, top), group, right_in_group, right
    )


def top_classes(preds: Tensor, classes: Tensor, top_k: int = 1) -> tuple[Tensor, Tensor]:
    """Return the largest logits among ``classes`` (sorted ids) and their class ids, both of shape ``(N, top_k)``."""
    values, indices = [], []
    for chunk in torch.split(preds.detach(), _rows_at_a_time(preds, 2**26)):
        if len(classes) < preds.shape[1]:
            chunk = chunk.index_select(1, classes)
        best = chunk.max(1, keepdim=True) if top_k == 1 else chunk.topk(top_k, 1)
        values.append(best.values)
        indices.append(best.indices)
    return torch.cat(values), classes[torch.cat(indices)]


def in_row_chunks(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Apply a function from ``(N, C)`` to ``(N, ...)`` tensors to chunks of rows, which bounds the size of copies."""
    rows = _rows_at_a_time(tensors[0], 2**22)
    if len(tensors[0]) <= rows:
        return function(*(tensor.detach() for tensor in tensors))
    parts = [
        function(*chunks) for chunks in zip(*(torch.split(tensor.detach(), rows) for tensor in tensors), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _rows_at_a_time(preds: Tensor, elements: int) -> int:
    # On a CPU, the chunk fits in the cache: copying all rows at once takes two to three times as long.
    return max(1, (2**18 if preds.device.type == "cpu" else elements) // preds.shape[1])


def other_seen_logits(preds: Tensor, target: Tensor, groups: Groups, fill: float) -> Tensor:
    """Copy the seen logits ``(N, |S|)`` with ``fill`` at the true class, or at any class if that is not seen."""
    place = torch.searchsorted(groups.seen, target.long()).clamp(max=len(groups.seen) - 1)
    return preds.index_select(1, groups.seen).scatter_(1, place.unsqueeze(1), fill)
