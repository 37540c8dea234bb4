"""Gaps between seen and absent logits that look at the large logits, as the prediction does."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lightning_calibft.functional._inputs import Groups, in_row_chunks, other_seen_logits, real_dtype


def matched_maxima_gaps(logits: Tensor, target: Tensor, groups: Groups) -> Tensor:
    """Expected maximum of ``k`` other seen logits less that of ``k`` absent ones, ``(N,)``."""
    size = min(len(groups.seen) - 1, len(groups.absent))

    def gaps(others: Tensor, absent: Tensor) -> Tensor:
        return _expected_maximum(others, size) - _expected_maximum(absent, size)

    return _sorted_gaps(gaps, logits, target, groups)


def quantile_gaps(logits: Tensor, target: Tensor, groups: Groups, quantile: float) -> Tensor:
    """Quantile of the other seen logits less that of the absent ones, ``(N,)``."""

    def gaps(others: Tensor, absent: Tensor) -> Tensor:
        return _quantile(others, quantile) - _quantile(absent, quantile)

    return _sorted_gaps(gaps, logits, target, groups)


def log_sum_exp_gaps(logits: Tensor, target: Tensor, groups: Groups, temperature: float) -> Tensor:
    """Soft maximum of the other seen logits less that of the absent ones, both per class, ``(N,)``."""
    dtype = real_dtype(logits.device)

    def soft_maximum(values: Tensor, count: int) -> Tensor:
        return temperature * (values.to(dtype).div_(temperature).logsumexp(1) - math.log(count))

    def gaps(logits: Tensor, target: Tensor) -> tuple[Tensor]:
        others = other_seen_logits(logits, target, groups, -torch.inf)
        absent = logits.index_select(1, groups.absent)
        return (soft_maximum(others, len(groups.seen) - 1) - soft_maximum(absent, len(groups.absent)),)

    return in_row_chunks(gaps, logits, target)[0]


def confusions(logits: Tensor, target: Tensor, groups: Groups) -> Tensor:
    """By how much the true class outranks the absent ones, and how many other seen classes outrank it, ``(N, 2)``."""
    dtype = real_dtype(logits.device)

    def compare(logits: Tensor, target: Tensor) -> tuple[Tensor]:
        own = logits.gather(1, target.long().clamp(0, logits.shape[1] - 1).unsqueeze(1))
        lead = own.squeeze(1).to(dtype) - logits.index_select(1, groups.absent).amax(1).to(dtype)
        seen = logits.index_select(1, groups.seen)
        above = (seen > own).sum(1).to(dtype) + 0 * seen.amax(1)  # NaN, which no comparison shows, stays NaN
        return (torch.stack([lead, above], 1),)

    return in_row_chunks(compare, logits, target)[0]


def _sorted_gaps(gaps: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor, groups: Groups) -> Tensor:
    def of_rows(logits: Tensor, target: Tensor) -> tuple[Tensor]:
        others = _sorted_rows(other_seen_logits(logits, target, groups, torch.inf))[:, :-1]
        return (gaps(others, _sorted_rows(logits.index_select(1, groups.absent))),)

    return in_row_chunks(of_rows, logits, target)[0]


def _sorted_rows(values: Tensor) -> Tensor:
    """Sort each row, NaN last; ``values`` may be overwritten."""
    if values.device.type != "cpu":
        return values.sort(1).values
    values = values.to(torch.promote_types(values.dtype, torch.float32))  # NumPy has no bfloat16
    values.numpy().sort(1)  # many times as fast as torch's sort, which gives the order as well
    return values


def _expected_maximum(values: Tensor, size: int) -> Tensor:
    """Mean, over all subsets of ``size`` columns, of their maximum. ``values (N, n)`` increase along the row."""
    largest = values[:, size - 1 :].to(real_dtype(values.device))
    return largest @ largest.new_tensor(_shares_of_subsets(values.shape[1], size))


@lru_cache
def _shares_of_subsets(count: int, size: int) -> list[float]:
    """Share of the subsets of ``size`` whose largest rank is ``size - 1``, ..., ``count - 1``: the others lie below."""
    total = math.comb(count, size)
    return [math.comb(rank, size - 1) / total for rank in range(size - 1, count)]


def _quantile(values: Tensor, quantile: float) -> Tensor:
    """Interpolate linearly between the columns of ``values (N, n)``, which increase along the row."""
    # `torch.quantile` would sort again, and takes 16 million numbers at most.
    place = quantile * (values.shape[1] - 1)
    below = math.floor(place)
    above = min(below + 1, values.shape[1] - 1)
    low, high = (values[:, column].to(real_dtype(values.device)) for column in (below, above))
    return low.lerp(high, place - below)
