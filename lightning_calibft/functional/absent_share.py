"""The share of samples of absent classes among unlabeled ones, from the counts of their margins."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_calibft.functional.share_table import ShareTable

# Chosen on recorded runs of small networks and of an ImageNet network, see `examples/benchmarks/traffic.md`.
_STEP = 3  # a bin of margins reaches over this many rows of the table
_AS_EXPECTED = (1.0,)
_LESS_SURE = (1.0, 2.0)  # margins of seen samples are as expected, or as the smaller one of two
_ANYWHERE = 0.03  # of the samples of each group, for which the table is wrong
_MOST = 70.0  # however many unlabeled samples there are, they tell as much as this many if the table is true
_PRIOR = 0.5  # Jeffreys' prior of a share: this many samples of each group
_TAIL = 0.05  # outside the interval, on either side


class MarginCounts(NamedTuple):
    """Counts of the margins of unlabeled samples.

    Attributes:
        counts: The number of samples, or the sum of their weights, in each bin between the edges, ``(K + 1,)``.
        size: How many samples of equal weight they are worth.
        table: The table of a calibration, with the columns ``seen_below`` and ``absent_below``.
    """

    counts: Tensor
    size: Tensor
    table: ShareTable


class ShareEstimate(NamedTuple):
    """The share, the ends of its 90 % interval ``(2,)``, its standard error, and the misfit, which is about 1 or less.

    The misfit is the mean deviance of the counts, per bin, from what the table allows for.
    """

    share: Tensor
    interval: Tensor
    standard_error: Tensor
    misfit: Tensor


def margin_edges(table: ShareTable) -> tuple[float, ...]:
    """Return the edges of the bins to count margins in."""
    return table.gamma[::_STEP]


def estimate_share(counted: MarginCounts, before: MarginCounts | None = None) -> ShareEstimate:
    """Estimate the share of samples of absent classes. All results are NaN without samples.

    Args:
        counted: The margins of the samples.
        before: Their margins in the model before fine-tuning. It was trained on neither group more than on the other,
            so its margins of new seen samples are as expected.
    """
    share = counted.counts.new_tensor(counted.table.absent_share)
    ways = [(counted, _LESS_SURE)] if before is None else [(counted, _LESS_SURE), (before, _AS_EXPECTED)]
    found = [_log_likelihood(each, share, less_sure, _MOST / len(ways)) for each, less_sure in ways]
    likelihood = torch.stack([log_likelihood for log_likelihood, _ in found]).sum(0)
    # The rows are equally far apart in log-odds. In these, Jeffreys' prior is the square root of p (1 - p).
    weight = (likelihood - likelihood.max()).exp() * (share * (1 - share)) ** _PRIOR
    weight = weight / weight.sum()
    mean = weight @ share
    ends = torch.searchsorted(weight.cumsum(0), share.new_tensor([_TAIL, 1 - _TAIL])).clamp(max=len(share) - 1)
    interval = torch.where(mean.isnan(), mean, share[ends])
    misfit = torch.stack([misfit for _, misfit in found]).max()
    return ShareEstimate(mean, interval, (weight @ (share - mean).square()).sqrt(), misfit)


def _log_likelihood(
    counted: MarginCounts, share: Tensor, less_sure: tuple[float, ...], most: float
) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood of each share, and the misfit."""
    counts, size, table = counted
    assert table.seen_below is not None
    assert table.absent_below is not None
    below = share.new_tensor(table.seen_below[::_STEP])
    seen = torch.stack([_fractions(1 - (1 - below) ** number) for number in less_sure])
    absent = _fractions(share.new_tensor(table.absent_below[::_STEP]))
    # One row for each share, and in it one for each way in which seen samples can be.
    mixture = share[:, None, None] * absent + (1 - share)[:, None, None] * seen
    frequency = counts / counts.sum()
    told = size / (1 + size / most)
    surprise = torch.xlogy(frequency, frequency).sum() - (frequency * mixture.log()).sum(-1)
    misfit = 2 * told * surprise.min() / (len(counts) - 1)
    return (-told * surprise / misfit.clamp(min=1)).logsumexp(1), misfit


def _fractions(below: Tensor) -> Tensor:
    """Return the fraction of samples in each bin from the fractions below the edges."""
    inside = torch.cat([below.new_zeros(1), below, below.new_ones(1)]).diff().clamp(min=0)
    return (1 - _ANYWHERE) * inside + _ANYWHERE / len(inside)
