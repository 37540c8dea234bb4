"""Split a batch into the model's inputs and its target."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_calibft._arguments import check_class_ids
from lightning_calibft.labels.class_map import rows_tensor, to_rows

TARGET_KEYS = ("label", "labels", "target", "targets", "y")
UNPACK_REMEDY = (
    "Pass `unpack_batch`, a function (or its import path) that takes a batch and returns `(inputs, target)`."
)
CLEAN_LABELS_REMEDY = (
    "If the training loader mixes labels (mixup, cutmix), pass `calibrate` one that does not, or give the"
    " LightningModule or its datamodule a method `calibration_dataloader()` that returns the fine-tuning data with one"
    " class id per sample."
)

UnpackBatch = Callable[[Any], tuple[Any, Tensor]]


def resolve_unpack_batch(unpack_batch: UnpackBatch | str | None) -> UnpackBatch | None:
    """Return the user's function, importing it if it is given by its import path.

    Raises:
        TypeError: If ``unpack_batch`` is neither a function, nor a string, nor ``None``.
        ValueError: If nothing can be imported from the path.
    """
    if isinstance(unpack_batch, str):
        module, _, name = unpack_batch.rpartition(".")
        try:
            unpack_batch = getattr(importlib.import_module(module), name)
        except (AttributeError, ImportError, ValueError) as error:
            raise ValueError(
                f"Expected argument `unpack_batch` to be the import path of a function, such as"
                f" 'my_package.data.unpack', but got {unpack_batch!r}: {error}."
            ) from error
    if unpack_batch is not None and not callable(unpack_batch):
        raise TypeError(f"Expected argument `unpack_batch` to be a function, but got {unpack_batch!r}.")
    return unpack_batch


class BatchReader:
    """Splits batches into the model's inputs and the head's row of each sample.

    Args:
        unpack_batch: The user's function, or its import path, for batches in any other format.
        rows: The head's row for each label, if they differ; see :func:`~lightning_calibft.resolve_class_map`.
    """

    def __init__(self, unpack_batch: UnpackBatch | str | None = None, rows: Mapping[int, int] | None = None) -> None:
        self._unpack = resolve_unpack_batch(unpack_batch)
        self._rows = None if rows is None else rows_tensor(rows)

    @property
    def maps(self) -> bool:
        """Whether targets are mapped to rows."""
        return self._rows is not None

    def rows(self, batch: Any) -> Tensor:
        """Return the head's row of each sample in a batch, of shape ``(N,)``.

        The values are not read here, so that no device has to wait. A label without a row becomes a number outside the
        head. ``IGNORE_INDEX`` is kept.

        Raises:
            TypeError: If the target is not a tensor of integers, or ``unpack_batch`` does not return a pair.
            ValueError: If the batch cannot be split, or the target is not one-dimensional.
        """
        target = check_target(_split_target(batch) if self._unpack is None else self._unpacked(batch)[1])
        if self._rows is None:
            return target.long()  # torch does not index with smaller integers, or takes them for masks
        self._rows = self._rows.to(target.device)
        return to_rows(target, self._rows)

    def inputs(self, batch: Any, forward: Callable[..., Any]) -> Any:
        """Return the inputs of a batch, as :func:`call_forward` takes them."""
        return _split_inputs(batch, forward) if self._unpack is None else self._unpacked(batch)[0]

    def _unpacked(self, batch: Any) -> Sequence[Any]:
        assert self._unpack is not None
        pair: Any = self._unpack(batch)
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(f"Expected argument `unpack_batch` to return `(inputs, target)`, but got {_kind(pair)}.")
        return pair


def _split_target(batch: Any) -> Any:
    """Return the target of a batch: the second item of a pair, or a mapping's value for one of ``TARGET_KEYS``."""
    if isinstance(batch, Mapping):
        for key in TARGET_KEYS:
            if key in batch:
                return batch[key]
        raise ValueError(
            f"Expected a batch with its target under one of the keys {', '.join(TARGET_KEYS)}, but got the keys"
            f" {', '.join(map(str, batch))}. {UNPACK_REMEDY}"
        )
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[1]
    raise ValueError(
        f"Expected a batch to be a pair (inputs, target) or a mapping, but got {_kind(batch)}. {UNPACK_REMEDY}"
    )


def _split_inputs(batch: Any, forward: Callable[..., Any]) -> Any:
    """Return the first item of a pair, the only other tensor of a mapping, or its items that ``forward`` names."""
    if not isinstance(batch, Mapping):
        return batch[0]
    rest = {key: value for key, value in batch.items() if key not in TARGET_KEYS}
    tensors = [value for value in rest.values() if isinstance(value, Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    # The signature of a module is that of `__call__`, which accepts anything.
    names = inspect.signature(getattr(forward, "forward", forward)).parameters
    named = {key: rest[key] for key in names if key in rest}
    if not named:
        raise ValueError(
            f"Expected a batch with one input, or with inputs under the names of the arguments of `forward`, but got"
            f" the keys {', '.join(map(str, batch))}. {UNPACK_REMEDY}"
        )
    return named


@runtime_checkable
class _Movable(Protocol):
    """Anything that has a method ``to``."""

    def to(self, *args: Any, **kwargs: Any) -> Any: ...


def batch_to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with its tensors, and anything else that has a method ``to``, on a device."""

    def move(value: _Movable) -> Any:
        no_wait = {"non_blocking": True} if isinstance(value, Tensor) and device.type not in ("cpu", "mps") else {}
        moved = value.to(device, **no_wait)
        return value if moved is None else moved  # some objects move in place and return None

    return apply_to_collection(batch, _Movable, move)


def call_forward(forward: Callable[..., Any], inputs: Any) -> Any:
    """Call ``forward`` with a mapping as keywords, a tuple or list as positional arguments, or else one argument."""
    if isinstance(inputs, Mapping):
        return forward(**inputs)
    if isinstance(inputs, (tuple, list)):
        return forward(*inputs)
    return forward(inputs)


def check_target(target: Any) -> Tensor:
    """Return ``target`` if it is a vector of class ids. Its values are not read, so that no device has to wait.

    Raises:
        TypeError: If ``target`` is not a tensor of integers.
        ValueError: If ``target`` is not one-dimensional.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"Expected the target of a batch to be a tensor, but got {_kind(target)}. {UNPACK_REMEDY}")
    if target.dtype != torch.long:
        check_class_ids("the target of a batch", target, CLEAN_LABELS_REMEDY)
    if target.ndim != 1:
        raise ValueError(
            f"Expected the target of a batch to have shape (N,), one class id per sample, but got"
            f" {tuple(target.shape)}. {UNPACK_REMEDY}"
        )
    return target


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"a {name} of {len(value)} items" if isinstance(value, (tuple, list)) else f"a {name}"
