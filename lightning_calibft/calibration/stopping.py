"""Reading no more samples than gamma needs."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from lightning_calibft.calibration.loaders import all_reduce, rank_and_world_size

LEAST_SAMPLES = 100  # of fewer, the standard error itself is a guess


def check_tolerance(tolerance: float | None) -> None:
    """Refuse a standard error that no number of samples reaches.

    Raises:
        ValueError: If ``tolerance`` is not a positive number.
    """
    if tolerance is not None and not (
        isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool) and 0 < tolerance < math.inf
    ):
        raise ValueError(
            f"Expected argument `tolerance` to be a positive number, a standard error in logits, but got {tolerance!r}."
        )


def when_to_look(length: int | None, device: torch.device) -> set[int]:
    """Return the numbers of batches after which to look at gamma, each a quarter above the last.

    To look at all samples anew is not free, and the processes must look together.

    Args:
        length: Number of this process' batches; ``None``: unknown.
        device: That of the processes' communication.
    """
    if length is None:
        length = 0 if rank_and_world_size()[1] > 1 else torch.iinfo(torch.long).max
    shortest = -int(all_reduce(torch.tensor(-length, device=device), maximum=True))
    looks = [1]
    while (later := looks[-1] + math.ceil(looks[-1] / 4)) <= shortest:
        looks.append(later)
    return {look for look in looks if look <= shortest}


def is_settled(estimator: Any, tolerance: float) -> bool:
    """Tell whether the standard error of an estimator's gamma is within ``tolerance``, on all processes alike."""
    # What a metric keeps of a look, it returns at the end where no batch came after it: without waiting for a process
    # that had one more batch, and that waits for all.
    kept, estimator.compute_with_cache = estimator.compute_with_cache, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the samples so far lack
            return float(estimator.standard_error) <= tolerance and int(estimator.num_samples) >= LEAST_SAMPLES
    except ValueError:  # there is no gamma yet
        return False
    finally:
        estimator.compute_with_cache = kept
