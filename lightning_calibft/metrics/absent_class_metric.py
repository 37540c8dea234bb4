"""The base class of the metrics: a validated split, checked batches, safe compute groups, and stable dtypes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lightning_calibft.functional._inputs import (
    Groups,
    check_ignore_index,
    check_inputs,
    real_dtype,
    warn_if_probabilities,
)
from lightning_calibft.labels.class_map import (
    IGNORE_INDEX,
    ClassMap,
    check_mapped,
    resolve_class_map,
    rows_tensor,
    to_rows,
)
from lightning_calibft.labels.label_names import LabelNames
from lightning_calibft.split import ClassIds, ClassSplit

_JOINED = 32


class MetricOptions(TypedDict, total=False):
    """Keyword arguments of all metrics: four from :class:`AbsentClassMetric`, the others from torchmetrics."""

    ignore_index: int | None
    validate_args: bool
    class_map: ClassMap | None
    label_names: LabelNames | None
    compute_on_cpu: bool
    dist_sync_on_step: bool
    process_group: Any
    dist_sync_fn: Callable[..., Any] | None
    distributed_available_fn: Callable[..., Any] | None
    sync_on_compute: bool
    compute_with_cache: bool


class AbsentClassMetric(Metric):
    """Base class of the metrics on logits of seen and absent classes.

    Args:
        num_classes: Number of classes ``C``, the width of the logits.
        seen_classes: Ids of the classes in the fine-tuning data.
        absent_classes: Ids of the classes missing from the fine-tuning data. ``None``: all classes that are not seen.
        ignore_index: Samples with this label are left out.
        validate_args: Whether to check the values of the tensors. ``False`` avoids a host synchronization.
        class_map: The head's row for each target, if targets are not row numbers. See
            :func:`~lightning_calibft.resolve_class_map`. In either case ``seen_classes`` holds row numbers.
        label_names: Names of the head's rows, needed if ``class_map`` contains names.
        kwargs: Arguments of :class:`torchmetrics.Metric`.
    """

    full_state_update: bool = False
    is_differentiable: bool = False
    configuration: Tensor

    def __init__(
        self,
        num_classes: int,
        seen_classes: ClassIds,
        absent_classes: ClassIds | None = None,
        *,
        ignore_index: int | None = None,
        validate_args: bool = True,
        class_map: ClassMap | None = None,
        label_names: LabelNames | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.split = ClassSplit(num_classes, seen_classes, absent_classes)
        check_ignore_index(ignore_index)
        self.ignore_index = ignore_index
        self.validate_args = validate_args
        self.class_map = resolve_class_map(class_map, label_names, num_classes)
        self._looked_for_probabilities = False
        self._groups = Groups.from_split(self.split, self.device)
        # Not buffers: DistributedDataParallel broadcasts buffers, and weight averaging averages them.
        self._constants: dict[str, Tensor] = {}
        if self.class_map is not None:
            self._constants["class_map"] = rows_tensor(self.class_map).to(self.device)
        self._set_configuration()

    def _set_configuration(self, *options: object) -> None:
        """Record which options affect the update, besides the split and the class map.

        After the first batch, :class:`torchmetrics.MetricCollection` merges metrics whose states have the same names
        and values. So a hash of the configuration is a state too, and only metrics with the same update are merged.
        """
        text = repr((*vars(self.split).values(), self.ignore_index, self.class_map, *options))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        self.add_state("configuration", torch.tensor(list(digest), dtype=torch.uint8), dist_reduce_fx="max")

    def reset(self) -> None:
        """Forget all samples."""
        for name, default in self._defaults.items():
            if isinstance(default, list):
                setattr(self, name, [])  # `Metric.reset` clears the list in place, but `Running` still uses it
        super().reset()

    def _rows(self, preds: Tensor, target: Tensor, *, probabilities: bool) -> Tensor:
        """Check a batch and return the head's row of each label."""
        rows = target
        if self.class_map is not None:
            rows = to_rows(target, self._constants["class_map"], self.ignore_index)
        if not self.validate_args:
            return rows
        if self.class_map is not None:
            check_mapped(rows)
        check_inputs(preds, rows, self.split.num_classes, self._ignored_row)
        if probabilities and not self._looked_for_probabilities and len(preds):
            self._looked_for_probabilities = True
            warn_if_probabilities(preds)
        return rows

    def _check_pretrained_preds(self, pretrained_preds: Tensor, rows: Tensor) -> None:
        if self.validate_args:
            check_inputs(pretrained_preds, rows, self.split.num_classes, self._ignored_row, "pretrained_preds")

    @property
    def _ignored_row(self) -> int | None:
        # The number of an ignored target may also be a valid row number.
        return self.ignore_index if self.class_map is None or self.ignore_index is None else IGNORE_INDEX

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Plot one value, or several values such as those of successive training steps.

        Args:
            val: Output of ``compute`` or ``forward``, or a list of them. ``None``: call ``compute``.
            ax: A matplotlib axis to draw on. ``None``: a new figure.

        Returns:
            Figure and axis.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # torchmetrics protects its states from `model.half()`, but not from `model.to(torch.bfloat16)`, which Lightning
        # calls for precision="bf16-true". Sums and class codes must keep their dtypes, so only the device changes.
        device = fn(torch.empty(0, device=self._groups.seen.device)).device
        largest = real_dtype(device)

        def move(value: Tensor) -> Tensor:
            return value.to(device, largest if value.dtype == torch.float64 else value.dtype)

        self._groups = self._groups.to(device)
        self._constants = {name: move(value) for name, value in self._constants.items()}
        return super()._apply(move, exclude_state)


def append_part(parts: list[Tensor], part: Tensor) -> None:
    """Append to a list of tensors and sometimes join the last ones, so that many small batches do not make it long."""
    parts.append(part)
    if len(parts) % _JOINED:
        return
    first, size = len(parts) - 1, part.shape[0]
    while first > 0 and parts[first - 1].shape[0] <= 2 * size:  # so that each sample is copied O(log N) times
        first -= 1
        size += parts[first].shape[0]
    parts[first:] = [torch.cat(parts[first:])]
