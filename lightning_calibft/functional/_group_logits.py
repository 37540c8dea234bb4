"""What the logits of a batch say about each group of classes, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_calibft.functional._inputs import Groups


def top_classes(preds: Tensor, classes: Tensor, top_k: int = 1) -> tuple[Tensor, Tensor]:
    """Largest logits among ``classes`` (sorted ids) and whose they are, both of shape ``(N, top_k)``."""
    values, indices = [], []
    for chunk in torch.split(preds.detach(), _rows_at_a_time(preds, 2**26)):
        if len(classes) < preds.shape[1]:
            chunk = chunk.index_select(1, classes)
        best = chunk.max(1, keepdim=True) if top_k == 1 else chunk.topk(top_k, 1)
        values.append(best.values)
        indices.append(best.indices)
    return torch.cat(values), classes[torch.cat(indices)]


def in_row_chunks(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Apply a function of ``(N, C)`` tensors that gives ``(N, ...)`` tensors, some rows at a time: bounded copies."""
    rows = _rows_at_a_time(tensors[0], 2**22)
    parts = [
        function(*chunks) for chunks in zip(*(torch.split(tensor.detach(), rows) for tensor in tensors), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _rows_at_a_time(preds: Tensor, elements: int) -> int:
    # On a CPU as many as stay in its cache: copies of all rows at once take two to three times as long.
    return max(1, (2**18 if preds.device.type == "cpu" else elements) // preds.shape[1])


def other_seen_logits(preds: Tensor, target: Tensor, groups: Groups, fill: float) -> Tensor:
    """A copy of the seen logits ``(N, |S|)`` with ``fill`` at the true class; at any of them if that is not seen."""
    place = torch.searchsorted(groups.seen, target.long()).clamp(max=len(groups.seen) - 1)
    return preds.index_select(1, groups.seen).scatter_(1, place.unsqueeze(1), fill)


def sorted_gaps(gaps: Callable[[Tensor, Tensor], Tensor], preds: Tensor, target: Tensor, groups: Groups) -> Tensor:
    """Apply a function of the other seen and the absent logits, each sorted along the row, to each sample, ``(N,)``."""

    def of_rows(preds: Tensor, target: Tensor) -> tuple[Tensor]:
        others = _sorted_rows(other_seen_logits(preds, target, groups, torch.inf))[:, :-1]
        return (gaps(others, _sorted_rows(preds.index_select(1, groups.absent))),)

    return in_row_chunks(of_rows, preds, target)[0]


def _sorted_rows(values: Tensor) -> Tensor:
    """Sort each row, NaN last; ``values`` may be overwritten."""
    if values.device.type != "cpu":
        return values.sort(1).values
    values = values.to(torch.promote_types(values.dtype, torch.float32))  # NumPy has no bfloat16
    values.numpy().sort(1)  # many times as fast as torch's sort, which gives the order as well
    return values
