"""Comparing logits with what a softmax may have made of them."""

from __future__ import annotations

import torch
from torch import Tensor


def are_probabilities(logits: Tensor) -> bool:
    """Tell whether each row is non-negative and sums to one."""
    values = logits.double()
    return bool((values >= 0).all() and (values.sum(dim=-1) - 1).abs().max() < 1e-2)


def log_space(logits: Tensor) -> Tensor:
    """Return logits as they are and the logarithm of probabilities, minus infinity where they underflow."""
    if not are_probabilities(logits):
        return logits.double()
    return torch.where(logits < torch.finfo(logits.dtype).tiny, 0, logits.double()).log()


def centred(values: Tensor, valid: Tensor) -> Tensor:
    """Subtract the mean of each row over its valid entries; the others become zero."""
    values = torch.where(valid, values, 0)
    mean = values.sum(dim=-1, keepdim=True) / valid.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(valid, values - mean, 0)


def largest(values: Tensor, valid: Tensor) -> Tensor:
    """Return the largest magnitude of the valid entries."""
    return torch.where(valid, values, 0).abs().max()


def epsilon(*tensors: Tensor) -> float:
    """Return the coarsest resolution of the tensors' dtypes."""
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)
