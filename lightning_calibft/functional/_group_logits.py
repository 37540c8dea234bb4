"""Reductions of a batch of logits to values for each group of classes, in one pass and in chunks of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_calibft.functional._inputs import FOLD, Groups


class BatchReduction(NamedTuple):
    """The values that the accuracies and the curve need from a batch, each of shape ``(N,)``.

    They are the place of the sample's class in the tables of :class:`Groups`; its margin; and whether its class wins
    against all others of its group, and against all others of both. Ties go to the lower class id, as in
    :func:`torch.max`. All but the place are meaningless if the sample does not count.
    """

    place: Tensor
    margin: Tensor
    right: Tensor
    best: Tensor


def reduce_batch(
    preds: Tensor, target: Tensor, groups: Groups, ignore_index: int | None, dtype: torch.dtype, checked: bool = False
) -> BatchReduction:
    """Reduce a batch of logits ``(N, C)`` in one pass.

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
    contests = groups.contests
    if contests is None:
        return _reduce_wide(preds, label, place, groups, dtype)

    def reduce(preds: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        tops = torch.where(contests.index_select(1, place), preds, groups.lowest).amax(2)
        seen, absent, own, lower, higher, lower_of_both, higher_of_both = tops.to(dtype).unbind()
        right, best = (own > lower) & (own >= higher), (own > lower_of_both) & (own >= higher_of_both)
        return seen - absent, right, best

    return BatchReduction(place, *in_row_chunks(reduce, preds, place))


def _reduce_wide(preds: Tensor, label: Tensor, place: Tensor, groups: Groups, dtype: torch.dtype) -> BatchReduction:
    """Reduce logits of many classes.

    A maximum costs a fraction of an argmax. So the true class is left out of the maxima and compared with them. Only
    where it equals one of them, or something is NaN, a second look at the row decides.
    """
    column, members = label.unsqueeze(1), groups.members.index_select(0, place)
    own, size = preds.gather(1, column).to(dtype), rows_at_a_time(preds, 2**17)
    if preds.device.type == "cpu":
        rivals = (_rivals_in_ranges if groups.lowered is None else _rivals_in_copies)(preds, label, groups).to(dtype)
        lead = own - rivals
        wins = lead > groups.zero
        unclear: list[Any] = []
        if preds.shape[0] and not lead.abs().amin().item() > 0:  # 0 or NaN
            unclear.extend(torch.split((~(lead.abs() > 0).all(1)).nonzero().squeeze(1), size))
    else:  # asking for the rows would make the host wait
        rivals = own.new_empty(preds.shape[0], 2)
        wins = torch.empty_like(rivals, dtype=torch.bool)
        unclear = [slice(start, start + size) for start in range(0, preds.shape[0], size)]
    for rows in unclear:
        wins[rows], rivals[rows] = _decide(preds[rows], column[rows], own[rows], groups)
    top_seen, top_absent = torch.maximum(torch.where(members, own, groups.lowest), rivals).unbind(1)
    beats_seen, beats_absent = wins.unbind(1)
    right = torch.where(members[:, 0], beats_seen, beats_absent)
    return BatchReduction(place, top_seen - top_absent, right, beats_seen & beats_absent)


def _rivals_in_ranges(preds: Tensor, label: Tensor, groups: Groups) -> Tensor:
    """Return the largest logits of the classes of each group other than the true one, ``(N, 2)``.

    Each group is a range of columns. It is folded first: columns that are a multiple of ``FOLD`` apart share a place.
    So only the few columns at the place of the true class need a second look to leave it out.
    """
    order, position, slots, mates = groups.order, groups.position, groups.slots, groups.mates
    assert slots is not None
    assert mates is not None

    def reduce(columns: Tensor, label: Tensor) -> tuple[Tensor]:
        if order is not None and position is not None:
            columns, label = columns.index_select(1, order), position.index_select(0, label)
        size = columns.shape[0]
        folded = columns.new_empty(size, 2, FOLD)
        for (start, stop), places in zip(groups.ranges, folded.unbind(1), strict=True):
            layers = (stop - start) // FOLD
            whole = start + layers * FOLD
            if layers:
                torch.amax(columns[:, start:whole].view(size, layers, FOLD), 1, out=places)
            else:
                places.fill_(-torch.inf)
            if whole < stop:
                rest = places[:, : stop - whole]
                torch.maximum(rest, columns[:, whole:stop], out=rest)
        slot = slots.index_select(0, label)
        mate = mates.index_select(0, slot)
        others = columns.gather(1, mate).masked_fill_(mate == label.unsqueeze(1), -torch.inf).amax(1, keepdim=True)
        folded.flatten(1).scatter_(1, slot.unsqueeze(1), others)
        return (folded.amax(2),)

    return in_row_chunks(reduce, preds, label, elements=2**20 if order is None else 2**17)[0]


def _rivals_in_copies(preds: Tensor, label: Tensor, groups: Groups) -> Tensor:
    """Return the largest logits of the classes of each group other than the true one, ``(N, 2)``.

    They may be NaN if a logit of the row is NaN or infinite. The columns of a group are anywhere, and to gather them
    takes longer than to lower all others in a copy for each group.
    """
    assert groups.lowered is not None
    lowered, (num_samples, width) = groups.lowered.to(preds.dtype), preds.shape
    # One buffer for all chunks: the memory of a new one would have to be mapped again.
    size = rows_at_a_time(preds, 2**16)
    buffer, tops = preds.new_empty(2, min(size, num_samples), width), []
    for chunk, column in zip(torch.split(preds, size), torch.split(label.unsqueeze(1), size), strict=True):
        copies = torch.add(chunk, lowered, out=buffer[:, : chunk.shape[0]])
        tops.append(copies.scatter_(2, column.expand(2, -1, -1), -torch.inf).amax(2))
    return torch.cat(tops, 1).t()


def _decide(preds: Tensor, column: Tensor, own: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Return against which group the true class wins, and the best other logit there, with ties, NaN and infinity."""
    mine, each = preds.gather(1, column), torch.arange(preds.shape[1], device=preds.device)
    rival = groups.members[:-1].t().unsqueeze(1) & (each != column)
    beaten = (preds < mine) | ((preds == mine) & (each > column))
    wins = (beaten | ~rival).all(2).t() & (own > -torch.inf)  # -inf never wins
    return wins, torch.where(rival, preds, -torch.inf).amax(2).t().to(own.dtype)


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


def in_row_chunks(
    function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, elements: int = 2**16
) -> tuple[Tensor, ...]:
    """Apply a function from ``(N, C)`` to ``(N, ...)`` tensors to chunks of rows, which bounds the size of copies."""
    rows = rows_at_a_time(tensors[0], elements)
    if tensors[0].shape[0] <= rows:
        return function(*tensors)
    parts = [function(*chunks) for chunks in zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def rows_at_a_time(preds: Tensor, elements: int) -> int:
    """Return how many rows to copy at once, of at most ``elements`` on each thread of a CPU."""
    # On a CPU, what each thread copies should fit in its cache: copying all rows at once takes several times as long.
    return max(1, (elements * torch.get_num_threads() if preds.device.type == "cpu" else 2**22) // preds.shape[1])


def other_seen_logits(preds: Tensor, target: Tensor, groups: Groups, fill: float) -> Tensor:
    """Copy the seen logits ``(N, |S|)`` with ``fill`` at the true class, or at any class if that is not seen."""
    place = torch.searchsorted(groups.seen, target.long()).clamp(max=len(groups.seen) - 1)
    return preds.index_select(1, groups.seen).scatter_(1, place.unsqueeze(1), fill)
