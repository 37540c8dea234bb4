"""Reductions of a batch of logits to values for each group of classes, in one pass and in chunks of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_calibft.functional._inputs import Groups


class BatchReduction(NamedTuple):
    """The values that the accuracies and the curve need from a batch, each of shape ``(N,)``.

    They are the place of the sample's class in the tables of :class:`Groups`; its code, negative if it does not count;
    whether it counts as one of the seen and as one of the absent classes, ``(2, N)``; its margin, which is meaningless
    if it does not count; and whether its class wins against all other seen and against all other absent classes. Ties
    go to the lower class id, as in :func:`torch.max`.
    """

    place: Tensor
    code: Tensor
    members: Tensor
    margin: Tensor
    beats_seen: Tensor
    beats_absent: Tensor


def reduce_batch(
    preds: Tensor, target: Tensor, groups: Groups, ignore_index: int | None, dtype: torch.dtype, checked: bool = False
) -> BatchReduction:
    """Reduce a batch of logits ``(N, C)`` in one pass.

    A maximum costs a fraction of an argmax. So the true class is left out of the maxima and compared with them. Only
    where it equals one of them, or something is NaN, a second look at the row decides.

    Args:
        preds: Logits of shape ``(N, C)``.
        target: Class ids of shape ``(N,)``.
        groups: The classes.
        ignore_index: Samples with this label do not count.
        dtype: The dtype of the margins, at least as precise as that of the logits.
        checked: Whether all labels are known to be class ids.
    """
    preds = preds.detach()
    label, place = groups.places(target, ignore_index, checked)
    column, members = label.unsqueeze(1), groups.members.index_select(1, place)
    own, size = preds.gather(1, column).squeeze(1).to(dtype), rows_at_a_time(preds, 2**17)
    if preds.device.type == "cpu":
        rivals = _rivals(preds, column, groups).to(dtype)
        lead = own - rivals
        wins = lead > groups.zero
        unclear: list[Any] = []
        if preds.shape[0] and not lead.abs().amin().item() > 0:  # 0 or NaN
            unclear.extend(torch.split((~(lead.abs() > 0).all(0)).nonzero().squeeze(1), size))
    else:  # asking for the rows would make the host wait
        rivals = own.new_empty(2, len(preds))
        wins = torch.empty_like(rivals, dtype=torch.bool)
        unclear = [slice(start, start + size) for start in range(0, len(preds), size)]
    for rows in unclear:
        wins[:, rows], rivals[:, rows] = _decide(preds[rows], column[rows], own[rows], groups)
    top_seen, top_absent = torch.maximum(torch.where(members, own, -torch.inf), rivals).unbind()
    return BatchReduction(place, groups.codes.index_select(0, place), members, top_seen - top_absent, *wins.unbind())


def right_in_group(reduction: BatchReduction) -> Tensor:
    """Return whether the true class wins within its group, ``(N,)``. It is arbitrary for samples that do not count."""
    return torch.where(reduction.members[0], reduction.beats_seen, reduction.beats_absent)


def _rivals(preds: Tensor, column: Tensor, groups: Groups) -> Tensor:
    """Return the largest logits of the classes of each group other than the true one, ``(2, N)``.

    If a logit of the row is NaN or infinite, they may be NaN.
    """
    sizes = [len(groups.seen), len(groups.absent)]
    column = column if groups.position is None else groups.position[column]
    rows = groups.rows
    if rows is not None and rows.dtype != preds.dtype:
        rows = rows.to(preds.dtype)

    def largest(chunk: Tensor, column: Tensor, out: Tensor | None = None) -> Tensor:
        if rows is not None:  # much faster than to gather the columns
            return torch.add(chunk, rows, out=out).scatter_(2, column.expand(2, -1, -1), -torch.inf).amax(2)
        if groups.order is not None:
            columns = torch.index_select(chunk, 1, groups.order, out=out)
        else:
            columns = chunk.clone() if out is None else out.copy_(chunk)
        seen, absent = torch.split(columns.scatter_(1, column, -torch.inf), sizes, 1)
        return torch.stack([seen.amax(1), absent.amax(1)])

    size = rows_at_a_time(preds, 2**17 if rows is None else 2**16)
    if preds.shape[0] <= size:
        return largest(preds, column)
    # One buffer for all chunks: the memory of a new one would have to be mapped again.
    width = preds.shape[1] if groups.order is None else len(groups.order)
    buffer = preds.new_empty((size, width) if rows is None else (2, size, width))
    chunks = zip(torch.split(preds, size), torch.split(column, size), strict=True)
    return torch.cat([largest(*chunk, buffer[..., : len(chunk[0]), :]) for chunk in chunks], 1)


def _decide(preds: Tensor, label: Tensor, own: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Return against which group the true class wins, and the best other logit there, with ties, NaN and infinity."""
    mine, column = preds.gather(1, label), torch.arange(preds.shape[1], device=preds.device)
    rival = (groups.of_class[:-1] == groups.numbers).unsqueeze(1) & (column != label)
    beaten = (preds < mine) | ((preds == mine) & (column > label))
    wins = (beaten | ~rival).all(2) & (own > -torch.inf)  # -inf never wins
    return wins, torch.where(rival, preds, -torch.inf).amax(2).to(own.dtype)


def top_classes(preds: Tensor, classes: Tensor, top_k: int = 1) -> tuple[Tensor, Tensor]:
    """Return the largest logits among ``classes`` (sorted ids) and their class ids, both of shape ``(N, top_k)``."""
    values, indices = [], []
    for chunk in torch.split(preds.detach(), rows_at_a_time(preds, 2**18)):
        if len(classes) < preds.shape[1]:
            chunk = chunk.index_select(1, classes)
        best = chunk.max(1, keepdim=True) if top_k == 1 else chunk.topk(top_k, 1)
        values.append(best.values)
        indices.append(best.indices)
    return torch.cat(values), classes[torch.cat(indices)]


def in_row_chunks(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Apply a function from ``(N, C)`` to ``(N, ...)`` tensors to chunks of rows, which bounds the size of copies."""
    rows = rows_at_a_time(tensors[0], 2**16)
    if len(tensors[0]) <= rows:
        return function(*(tensor.detach() for tensor in tensors))
    parts = [
        function(*chunks) for chunks in zip(*(torch.split(tensor.detach(), rows) for tensor in tensors), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def rows_at_a_time(preds: Tensor, elements: int) -> int:
    """Return how many rows to copy at once, of at most ``elements`` on each thread of a CPU."""
    # On a CPU, what each thread copies should fit in its cache: copying all rows at once takes several times as long.
    return max(1, (elements * torch.get_num_threads() if preds.device.type == "cpu" else 2**22) // preds.shape[1])


def other_seen_logits(preds: Tensor, target: Tensor, groups: Groups, fill: float) -> Tensor:
    """Copy the seen logits ``(N, |S|)`` with ``fill`` at the true class, or at any class if that is not seen."""
    place = torch.searchsorted(groups.seen, target.long()).clamp(max=len(groups.seen) - 1)
    return preds.index_select(1, groups.seen).scatter_(1, place.unsqueeze(1), fill)
