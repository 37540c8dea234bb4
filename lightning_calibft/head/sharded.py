"""Logits of models whose weights are shared out among processes."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """Return a plain tensor with all values of one that may be distributed: then all its processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def beside(tensor: Tensor, other: Tensor) -> Tensor:
    """Return ``tensor``, which all processes have, so that it can be added to ``other``, which may be distributed."""
    if isinstance(other, DTensor) and not isinstance(tensor, DTensor):
        return DTensor.from_local(tensor, other.device_mesh, run_check=False)
    return tensor
