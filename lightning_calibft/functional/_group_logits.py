"""Reductions of a batch of logits to values for each group of classes, in one pass and in chunks of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_calibft.functional._inputs import Groups


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
    """Reduce a batch of logits ``(N, C)`` in one pass.

    A maximum costs a fraction of an argmax. So the true class is left out of the maxima and compared with them. Only
    where it equals one of them, or something is NaN, a second look at the row decides.
    """
    preds, target = preds.detach(), target.long()
    group = groups.of_samples(target, ignore_index)
    label = target.clamp(0, preds.shape[1] - 1).unsqueeze(1)
    own, rivals, in_group = preds.gather(1, label).squeeze(1), _rivals(preds, label, groups), group == groups.numbers
    lead = own - rivals
    wins = lead > 0
    clear = wins | (lead < 0)
    top = torch.maximum(torch.where(in_group, own, -torch.inf), rivals)
    right_in_group = (wins & in_group).any(0)
    right = right_in_group & wins.all(0)
    size = _rows_at_a_time(preds, 2**17)
    if preds.device.type != "cpu":  # asking for the rows would make the host wait
        unclear = [slice(start, start + size) for start in range(0, len(preds), size)]
    else:
        unclear = [] if clear.all() else list((~clear.all(0)).nonzero().squeeze(1).split(size))
    for rows in unclear:
        top[:, rows], right_in_group[rows], right[rows] = _decide(preds[rows], label[rows], group[rows], groups)
    return BatchReduction(top[0], top[1], group, right_in_group, right)


def _rivals(preds: Tensor, label: Tensor, groups: Groups) -> Tensor:
    """Return the largest logits of the classes of each group other than the true one, ``(2, N)``.

    A group of a row with NaN or infinity may be NaN instead.
    """
    if groups.rows is not None:  # much faster than to gather the columns
        rows = groups.rows.to(preds.dtype)

        def largest(chunk: Tensor, label: Tensor) -> Tensor:
            return (chunk + rows).scatter_(2, label.expand(2, -1, -1), -torch.inf).amax(2)
    else:
        order, sizes = groups.order, (len(groups.seen), len(groups.absent))
        label = label if order is None else groups.place[label]

        def largest(chunk: Tensor, label: Tensor) -> Tensor:
            columns = chunk.clone() if order is None else chunk.index_select(1, order)
            columns = columns.scatter_(1, label, -torch.inf)
            return torch.stack([part.amax(1) for part in columns.split(sizes, 1)])

    size = _rows_at_a_time(preds, 2**16 if groups.rows is not None else 2**17)
    if len(preds) <= size:
        return largest(preds, label)
    return torch.cat([largest(*chunk) for chunk in zip(preds.split(size), label.split(size), strict=True)], 1)


def _decide(preds: Tensor, label: Tensor, group: Tensor, groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest logit of each group, and who wins, with ties and NaN."""
    own, column = preds.gather(1, label), torch.arange(preds.shape[1], device=preds.device)
    beaten = (preds < own) | ((preds == own) & (column >= label))
    in_group = (groups.of_class[:-1] == groups.numbers).unsqueeze(1)
    wins = (beaten | ~in_group).all(2)
    counted = (group >= 0) & (own.squeeze(1) > -torch.inf)  # -inf never wins
    right_in_group = wins.gather(0, group.clamp(min=0).unsqueeze(0)).squeeze(0) & counted
    return torch.where(in_group, preds, -torch.inf).amax(2), right_in_group, wins.all(0) & counted


def top_classes(preds: Tensor, classes: Tensor, top_k: int = 1) -> tuple[Tensor, Tensor]:
    """Return the largest logits among ``classes`` (sorted ids) and their class ids, both of shape ``(N, top_k)``."""
    values, indices = [], []
    for chunk in torch.split(preds.detach(), _rows_at_a_time(preds, 2**18)):
        if len(classes) < preds.shape[1]:
            chunk = chunk.index_select(1, classes)
        best = chunk.max(1, keepdim=True) if top_k == 1 else chunk.topk(top_k, 1)
        values.append(best.values)
        indices.append(best.indices)
    return torch.cat(values), classes[torch.cat(indices)]


def in_row_chunks(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Apply a function from ``(N, C)`` to ``(N, ...)`` tensors to chunks of rows, which bounds the size of copies."""
    rows = _rows_at_a_time(tensors[0], 2**16)
    if len(tensors[0]) <= rows:
        return function(*(tensor.detach() for tensor in tensors))
    parts = [
        function(*chunks) for chunks in zip(*(torch.split(tensor.detach(), rows) for tensor in tensors), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _rows_at_a_time(preds: Tensor, elements: int) -> int:
    # On a CPU, what each thread copies should fit in its cache: copying all rows at once takes several times as long.
    return max(1, (elements * torch.get_num_threads() if preds.device.type == "cpu" else 2**22) // preds.shape[1])


def other_seen_logits(preds: Tensor, target: Tensor, groups: Groups, fill: float) -> Tensor:
    """Copy the seen logits ``(N, |S|)`` with ``fill`` at the true class, or at any class if that is not seen."""
    place = torch.searchsorted(groups.seen, target.long()).clamp(max=len(groups.seen) - 1)
    return preds.index_select(1, groups.seen).scatter_(1, place.unsqueeze(1), fill)
