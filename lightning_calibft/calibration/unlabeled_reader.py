"""Read batches without labels, or without looking at them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_calibft.calibration.batch_reader import (
    Arguments,
    BatchReader,
    _arguments,
    _fields,
    _possible_targets,
    _ways_of_fields,
)
from lightning_calibft.head.output import tensors_in


class UnlabeledReader:
    """Splits unlabeled batches into the model's inputs. It stands in for a :class:`BatchReader`.

    A batch is a tensor, a tuple of inputs, or a mapping or object with inputs. Labels in one, as the batches of the
    labeled data have them, are ignored.

    Args:
        labeled: The reader of the labeled data. Its ``unpack_batch`` is used for these batches as well, and may return
            anything as their target.
    """

    maps = False
    own_call: str | None = None  # what the steps of a module pass is known of labeled batches only

    def __init__(self, labeled: BatchReader) -> None:
        self._labeled = labeled

    def find_target(self, batch: Any, num_classes: int) -> None:
        """Do nothing."""

    def rows(self, batch: Any) -> Tensor:
        """Return a placeholder for the label of each sample, ``(N,)``.

        Raises:
            ValueError: If the batch has no tensor.
        """
        inputs = batch if self._labeled.unpack is None else self._labeled.unpack(batch)[0]
        fields = _fields(inputs)
        parts = (tensor for _, tensor in tensors_in(inputs if fields is None else list(fields.values())) if tensor.ndim)
        first = next(parts, None)
        if first is None:
            raise ValueError(
                f"Expected an unlabeled batch to hold a tensor of inputs, but got a {type(batch).__name__} without one."
                " Pass `unpack_batch`, a function that takes a batch and returns `(inputs, None)`."
            )
        return torch.zeros(len(first), dtype=torch.long, device=first.device)

    def arguments(self, batch: Any, forward: Callable[..., Any]) -> dict[str, Arguments]:
        """Return the ways to call ``forward`` on a batch, the most usual one first. The keys say what is passed."""
        if self._labeled.unpack is not None:
            ways = self._labeled.arguments(batch, forward)
        elif (fields := _fields(batch)) is not None:
            try:
                ways = self._labeled.arguments(batch, forward)
            except ValueError:  # there is no target
                ways = _ways_of_fields(fields, None, inspect.signature(getattr(forward, "forward", forward)))
        else:
            ways = _ways_of_inputs(batch)
        # The labeled data has ways of the same names that pass something else.
        ways = {f"{name}, unlabeled": way for name, way in ways.items()}
        return {**ways, "forward(batch), unlabeled": ((batch,), {})}


def _ways_of_inputs(batch: Any) -> dict[str, Arguments]:
    if not isinstance(batch, (tuple, list)):
        return {}
    labels = {index for index in _possible_targets(batch) if index > 0}
    inputs = [item for index, item in enumerate(batch) if index not in labels and not isinstance(item, (str, bytes))]
    inputs = [item for item in inputs if any(True for _ in tensors_in(item))]  # no lists of paths
    ways: dict[str, Arguments] = {}
    if len(inputs) > 1:
        ways["forward(*batch)"] = (tuple(inputs), {})
    if inputs:
        ways["forward(batch[0])"] = _arguments(inputs[0])
    return ways
