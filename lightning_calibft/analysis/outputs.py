"""What a model makes of samples: the features before its head, and its logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_calibft.calibration import BatchReader, UnpackBatch, calibration_loaders, check_head, head_width
from lightning_calibft.calibration.batch import call_forward
from lightning_calibft.calibration.one_pass import UNPACK_OR_HEAD_REMEDY, forward_of
from lightning_calibft.head import attach, attached_heads, detach, evaluation, record_logits
from lightning_calibft.head.record import one_forward
from lightning_calibft.labels.class_map import ClassMap, resolve_class_map
from lightning_calibft.labels.label_names import LabelNames


@dataclass(frozen=True)
class Outputs:
    """What a model made of samples, on the CPU.

    Attributes:
        features: Input of the head, of shape ``(N, D)``; of several heads side by side.
        logits: Logits without gamma, of shape ``(N, C)``.
        target: Rows of the head, of shape ``(N,)``.
    """

    features: Tensor
    logits: Tensor
    target: Tensor


def collect_outputs(
    model: nn.Module,
    loader: Any,
    *,
    head: str | nn.Module | None = None,
    unpack_batch: UnpackBatch | str | None = None,
    class_map: ClassMap | None = None,
    label_names: LabelNames | None = None,
) -> Outputs:
    """Run a model over labelled data once, in eval mode and in order, and keep features and raw logits.

    The model, the random state and the loader stay as they were. A plain ``DataLoader`` is read in the order of its
    dataset, also if it shuffles, so that the rows of two models belong to the same samples.

    Args:
        model: A classifier, or a LightningModule with one. A gamma in it plays no part.
        loader: Any iterable of batches. (Of a process group, each process reads its share.)
        head: As in :func:`~lightning_calibft.find_head`.
        unpack_batch: As in :func:`~lightning_calibft.calibrate`.
        class_map: As in :func:`~lightning_calibft.calibrate`.
        label_names: As in :func:`~lightning_calibft.calibrate`.

    Raises:
        ValueError: If the head is not found or does not give the logits, if its input is not one vector a sample, if
            the loader is empty, or if a batch cannot be split.
        TypeError: If a target does not hold class ids.

    Example:
        >>> import torch
        >>> from lightning_calibft.analysis import collect_outputs
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.ReLU(), torch.nn.Linear(3, 5))
        >>> outputs = collect_outputs(model, [(torch.randn(4, 8), torch.tensor([0, 1, 2, 4]))])
        >>> outputs.features.shape, outputs.logits.shape
        (torch.Size([4, 3]), torch.Size([4, 5]))
    """
    parts: list[Outputs] = []
    with _attached(model, head), evaluation(model):
        width = head_width(model)
        reader = BatchReader(unpack_batch, resolve_class_map(class_map, label_names, width))
        device = next(next(iter(attached_heads(model).values())).buffers()).device
        for batches in calibration_loaders(loader):
            for batch in batches:
                batch = move_data_to_device(batch, device)
                if not parts:
                    reader.rows(batch)  # says what is wrong with the batch
                    check_head(model, batch, reader)
                parts.append(_outputs_of(model, batch, reader, width))
    if not parts:
        raise ValueError("Expected argument `loader` to yield batches, but got none. Check the loader.")
    return Outputs(*(torch.cat([getattr(part, name) for part in parts]) for name in ("features", "logits", "target")))


def _outputs_of(model: nn.Module, batch: Any, reader: BatchReader, width: int) -> Outputs:
    target, forward = reader.rows(batch), forward_of(model)
    inputs = reader.inputs(batch, forward)
    with record_logits(model) as records, _recorded_features(model) as seen:
        call_forward(forward, inputs)
    logits = one_forward(records, len(target), width, UNPACK_OR_HEAD_REMEDY)
    if wrong := [part for part in seen if part is None or part.ndim != 2]:
        got = "no tensor" if wrong[0] is None else f"the shape {tuple(wrong[0].shape)}"
        raise ValueError(
            f"Expected the input of the head to be features of shape (N, D), but got {got}. Name as `head` the linear"
            " layer that gives the logits."
        )
    features = torch.cat([part for part in seen if part is not None], 1)
    return Outputs(features.cpu(), logits.cpu(), target.cpu())


@contextmanager
def _attached(model: nn.Module, head: str | nn.Module | None) -> Iterator[None]:
    """Lend the model a calibration, through which its logits are recorded, unless it has one."""
    fresh = not attached_heads(model)
    attach(model, head)
    try:
        yield
    finally:
        if fresh:
            detach(model)


@contextmanager
def _recorded_features(model: nn.Module) -> Iterator[list[Tensor | None]]:
    """Collect the input of each head as ``(N, D)``: of a 1x1 convolution without its two spatial axes."""
    features: list[Tensor | None] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        value = args[0].detach() if args and isinstance(args[0], Tensor) else None
        if value is not None and value.ndim == 4 and value.shape[-2:] == (1, 1):
            value = value.flatten(1)
        features.append(value if value is None else value.clone())

    with ExitStack() as stack:
        for module in attached_heads(model).values():
            stack.callback(module.register_forward_pre_hook(record).remove)
        yield features
