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
from lightning_calibft.labels.class_map import (
    IGNORE_INDEX,
    is_unmapped,
    rows_tensor,
    to_rows,
    unmapped_error,
)

TARGET_KEYS = ("label", "labels", "target", "targets", "y")
# Under these, data loaders keep what a model takes besides other tensors, in the order of preference.
_INPUT_KEYS = ("image", "images", "pixel_values", "input", "inputs", "data", "x", "video", "audio", "input_ids")
# Parts of the names of other targets, as in "coarse_label".
_NAMES_OF_TARGETS = {*TARGET_KEYS, "class", "cls", "category", "gt"}
UNPACK_REMEDY = (
    "Pass `unpack_batch`, a function (or its import path) that takes a batch and returns `(inputs, target)`."
)
CLEAN_LABELS_REMEDY = (
    "If the training loader mixes labels (mixup, cutmix), pass `calibrate` one that does not, or give the"
    " LightningModule or its datamodule a method `calibration_dataloader()` that returns the fine-tuning data with one"
    " class id per sample."
)

SOFT_LABEL = -(2**31)  # stands for a target that is not one class, outside every head

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
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

    Attributes:
        unpack: The user's function. ``None``: there is none.
        own_call: How the model's own steps call ``forward``, as :class:`OwnForwardCall` says. ``None``: not known.
    """

    def __init__(self, unpack_batch: UnpackBatch | str | None = None, rows: Mapping[int, int] | None = None) -> None:
        self.unpack = resolve_unpack_batch(unpack_batch)
        self._rows = None if rows is None else rows_tensor(rows)
        self.own_call: str | None = None
        self._target_key: Any = None  # where the target is, if several parts of a batch could be it
        self._one_hot = False  # whether targets are one-hot vectors

    @property
    def maps(self) -> bool:
        """Whether targets are mapped to rows."""
        return self._rows is not None

    def rows(self, batch: Any) -> Tensor:
        """Return the head's row of each sample in a batch, of shape ``(N,)``.

        The values are not read here, so that no device has to wait. A label without a row becomes a number outside the
        head, and so does a soft label. ``IGNORE_INDEX`` is kept.

        Raises:
            TypeError: If the target does not hold class ids, or ``unpack_batch`` does not return a pair.
            ValueError: If the batch cannot be split, or the target is not one-dimensional.
        """
        target = self._raw_target(batch)
        if self._one_hot and isinstance(target, Tensor) and target.ndim == 2:
            target = torch.where(_is_one_hot(target), target.to(torch.float32).argmax(1), SOFT_LABEL)
        target = check_target(target)
        if self._rows is None:
            return target.long()  # torch does not index with smaller integers, or takes them for masks
        self._rows = self._rows.to(target.device)
        return torch.where(target == SOFT_LABEL, SOFT_LABEL, to_rows(target, self._rows))

    def find_target(self, batch: Any, num_classes: int) -> None:
        """Look at the values of a batch if they tell what its target is: one of several vectors, or one-hot vectors.

        Further batches are read alike. Where there is something to look at, this makes the device wait.

        Raises:
            ValueError: If several parts of the batch hold different class ids.
        """
        if self.unpack is None and not _is_pair(batch):
            found, named = _possible_targets(batch), _fields(batch) is not None
            if len(found) > 1 and self._target_key not in found:
                self._target_key = _only_target(found, None if named else num_classes)
        if not self._one_hot:
            target = self._raw_target(batch)
            self._one_hot = isinstance(target, Tensor) and target.ndim == 2 and bool(_is_one_hot(target).all())

    def arguments(self, batch: Any, forward: Callable[..., Any]) -> dict[str, Arguments]:
        """Return the ways to call ``forward`` on a batch that its author may have meant, the most usual one first.

        The keys say what is passed, for errors.
        """
        if self.unpack is not None:
            return {"forward(*inputs of `unpack_batch`)": _arguments(self._unpacked(batch)[0])}
        # The signature of a module is that of `__call__`, which accepts anything.
        signature = inspect.signature(getattr(forward, "forward", forward))
        fields = _fields(batch)
        if fields is not None:
            ways = _ways_of_fields(fields, self._key(batch), signature)
        else:
            ways = _ways_of_items(batch, self._key(batch))
        if "forward(batch)" not in ways:
            ways["forward(batch)"] = ((batch,), {})
        return ways

    def _raw_target(self, batch: Any) -> Any:
        if self.unpack is not None:
            return self._unpacked(batch)[1]
        fields, key = _fields(batch), self._key(batch)
        target = batch[key] if fields is None else fields[key]
        return self._raw_target(target) if isinstance(target, Mapping) else target

    def _key(self, batch: Any) -> Any:
        """Return the key, index or name under which the target of a batch is."""
        found, fields = list(_possible_targets(batch)), _fields(batch)
        if self._target_key in found:
            return self._target_key
        if fields is not None:
            usual = [key for key in TARGET_KEYS if key in fields]
            if usual or len(found) == 1:
                return (usual or found)[0]
            raise ValueError(
                f"Expected a batch with its target under one of the keys {', '.join(TARGET_KEYS)}, but got the keys"
                f" {', '.join(map(str, fields))}. {UNPACK_REMEDY}"
            )
        if _is_pair(batch) and (1 in found or len(found) != 1):
            return 1
        if isinstance(batch, (tuple, list)) and len(batch) > 1 and found:
            found = [index for index in found if index > 0] or found  # inputs come first
            if len(found) > 1:
                raise _several_targets(found)
            return found[0]
        raise ValueError(
            f"Expected a batch to be a pair (inputs, target), a longer tuple with one vector of class ids, a mapping or"
            f" an object with a target, but got {_kind(batch)}. {UNPACK_REMEDY}"
        )

    def _unpacked(self, batch: Any) -> Sequence[Any]:
        assert self.unpack is not None
        pair: Any = self.unpack(batch)
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
            raise TypeError(f"Expected argument `unpack_batch` to return `(inputs, target)`, but got {_kind(pair)}.")
        return pair


def _fields(batch: Any) -> dict[Any, Any] | None:
    """Return the parts of a mapping, a named tuple or an object with attributes, or ``None`` for other batches."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, tuple) and not _NAMES_OF_TARGETS.isdisjoint(getattr(batch, "_fields", ())):
        return dict(zip(batch._fields, batch, strict=True))  # type: ignore[attr-defined]
    if isinstance(batch, (Tensor, tuple, list, str, bytes)) or batch is None:
        return None
    keys = getattr(batch, "keys", None)
    names = list(keys() if callable(keys) else keys if isinstance(keys, list) else getattr(batch, "__dict__", ()))
    return {name: getattr(batch, name) for name in names if isinstance(name, str) and hasattr(batch, name)} or None


def _possible_targets(batch: Any) -> dict[Any, Tensor]:
    """Return the vectors of integers in a batch that could be its target, by key, name or index."""
    fields = _fields(batch)
    if fields is not None:
        named = {
            key: value for key, value in fields.items() if _NAMES_OF_TARGETS.intersection(str(key).lower().split("_"))
        }
        return {key: value.flatten() for key, value in named.items() if _is_vector_of_ids(value)}
    if not isinstance(batch, (tuple, list)):
        return {}
    return {index: item.flatten() for index, item in enumerate(batch) if _is_vector_of_ids(item)}


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and len(batch) == 2 and _fields(batch) is None


def _only_target(found: dict[Any, Tensor], num_classes: int | None) -> Any:
    """Return the key of the target among vectors of integers. Those beyond ``num_classes`` are not class ids."""
    if num_classes is not None:
        found = {key: ids for key, ids in found.items() if bool(((ids >= -1) & (ids < num_classes)).all())} or found
        found = {key: ids for key, ids in found.items() if key > 0} or found  # inputs come first
    first, *others = found
    if different := [key for key in others if not torch.equal(found[key], found[first])]:
        raise _several_targets([first, *different])
    return first


def _is_one_hot(target: Tensor) -> Tensor:
    """Return for each row of ``target`` whether it is one-hot."""
    one_hot: Tensor = ((target == 0) | (target == 1)).all(1) & (target.sum(1) == 1)
    return one_hot if target.shape[1] > 1 else torch.zeros_like(one_hot)


def _is_vector_of_ids(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        return False
    return value.ndim == 1 or (value.ndim == 2 and value.shape[1] == 1)


def _several_targets(keys: Sequence[Any]) -> ValueError:
    names = " and ".join(f"batch[{key!r}]" for key in keys)
    return ValueError(
        f"Expected a batch with one target, but {names} hold different class ids, and either could be it."
        f" {UNPACK_REMEDY}"
    )


def _ways_of_fields(fields: dict[Any, Any], target_key: Any, signature: inspect.Signature) -> dict[str, Arguments]:
    names = list(signature.parameters)
    targets = {target_key, *(key for key in fields if key in TARGET_KEYS)}
    rest = {key: value for key, value in fields.items() if key not in targets}
    required = [
        name
        for name, parameter in signature.parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    tensors = [key for key, value in rest.items() if isinstance(value, Tensor)]
    ways: dict[str, Arguments] = {}

    def add(arguments: Arguments, *keys: Any) -> None:
        passed = [f"batch[{key!r}]" for key in keys]
        ways.setdefault(f"forward({', '.join(passed)})", arguments)

    if len(tensors) == 1:
        add(((rest[tensors[0]],), {}), *tensors)
    if named := {name: rest[name] for name in names if name in rest}:
        add(((), named), *named)
    if preferred := [key for key in _INPUT_KEYS if key in rest]:
        add(((rest[preferred[0]],), {}), preferred[0])
    with_target = {name: fields[name] for name in names if name in fields}
    if target_key in fields:
        with_target.update(
            {name: fields[target_key] for name in required if name in TARGET_KEYS and name not in fields}
        )
    if with_target:
        add(((), with_target), *with_target)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        ways["forward(**batch)"] = ((), {str(key): value for key, value in fields.items()})
        ways["forward(**batch without its target)"] = ((), {str(key): value for key, value in rest.items()})
    return ways


def _ways_of_items(batch: Any, target_index: int) -> dict[str, Arguments]:
    rest = [index for index in range(len(batch)) if index != target_index]
    first = batch[rest[0]]
    ways = {f"forward(batch[{rest[0]}])": _arguments(first)}
    if isinstance(first, Mapping):
        inputs = next((first[key] for key in _INPUT_KEYS if key in first), first)
        ways["forward(one tensor of batch[0])"] = ((inputs,), {})
    if isinstance(first, (Mapping, tuple, list)):
        ways["forward(batch[0] as one argument)"] = ((first,), {})
    if len(rest) > 1:
        ways["forward(*batch without its target)"] = (tuple(batch[index] for index in rest), {})
    ways["forward(*batch)"] = (tuple(batch), {})
    return ways


def _arguments(inputs: Any) -> Arguments:
    """Return a mapping as keywords, a tuple or list as positional arguments, or else one argument."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


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


def check_target(target: object) -> Tensor:
    """Return the class id of each sample, ``(N,)`` or ``(N, 1)``, as ``(N,)``. No device has to wait for the values.

    Raises:
        TypeError: If ``target`` is not a tensor of integers.
        ValueError: If it has another shape.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"Expected the target of a batch to be a tensor, but got {_kind(target)}. {UNPACK_REMEDY}")
    if target.dtype != torch.long:
        check_class_ids("the target of a batch", target, CLEAN_LABELS_REMEDY)
    if target.ndim == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if target.ndim != 1:
        raise ValueError(
            f"Expected the target of a batch to have shape (N,), one class id per sample, but got"
            f" {tuple(target.shape)}. {UNPACK_REMEDY}"
        )
    return target


def check_rows(rows: Tensor, num_classes: int) -> None:
    """Check the values of rows, which makes their device wait.

    Raises:
        ValueError: If one is not a row of a head with ``num_classes`` rows.
    """
    outside = rows[((rows < 0) | (rows >= num_classes)) & (rows != IGNORE_INDEX)]
    if len(outside):
        raise target_error(num_classes, int(outside[0]))


def target_error(num_classes: int, label: int, found: str = "got") -> ValueError:
    """Return the error for labels that are not rows of the head, such as ``label``."""
    if is_unmapped(label):
        return unmapped_error(label)
    if label == SOFT_LABEL:
        return ValueError(
            f"Expected one class id per sample, but {found} soft or multi-label targets, which do not name a single"
            f" class. {CLEAN_LABELS_REMEDY}"
        )
    hint = CLEAN_LABELS_REMEDY
    if label == -1:
        hint = (
            "Samples without a label are often marked -1. Leave them out, or return -100, the usual `ignore_index`, for"
            " them in `unpack_batch`."
        )
    return ValueError(
        f"Expected targets to be class ids in [0, {num_classes}), rows of the classification head, but {found} {label}."
        f" {hint}"
    )


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"a {name} of {len(value)} items" if isinstance(value, (tuple, list)) else f"a {name}"
