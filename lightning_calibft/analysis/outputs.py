"""What a model makes of samples: the features before its head, and its logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_calibft._arguments import check_model
from lightning_calibft.calibration.batch_reader import BatchReader, UnpackBatch
from lightning_calibft.calibration.evaluation_pass import EvaluationPass, head_width, preserve_random_state
from lightning_calibft.calibration.loaders import calibration_loaders
from lightning_calibft.head.attach import attach, detach
from lightning_calibft.head.offset import attached_heads
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
    """Run a model over labeled data once, in eval mode and in order, and keep features and raw logits.

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
    with _attached(model, head), preserve_random_state():
        reader = BatchReader(unpack_batch, resolve_class_map(class_map, label_names, head_width(model)))
        seen: list[Tensor | None] = []
        reading = EvaluationPass(
            model,
            calibration_loaders(loader),
            reader=reader,
            bar=None,
            context=lambda: _recorded_features(model, seen),
        )
        with closing(reading.evaluate()) as batches:
            parts = [Outputs(_features(seen), batch.logits.cpu(), batch.target.cpu()) for batch in batches]
    if not parts:
        raise ValueError("Expected argument `loader` to yield batches, but got none. Check the loader.")
    return Outputs(*(torch.cat([getattr(part, name) for part in parts]) for name in ("features", "logits", "target")))


def _features(seen: list[Tensor | None]) -> Tensor:
    if wrong := [part for part in seen if part is None or part.ndim != 2]:
        got = "no tensor" if wrong[0] is None else f"the shape {tuple(wrong[0].shape)}"
        raise ValueError(
            f"Expected the input of the head to be features of shape (N, D), but got {got}. Name as `head` the linear"
            " layer that gives the logits."
        )
    return torch.cat([part for part in seen if part is not None], 1).cpu()


@contextmanager
def _attached(model: nn.Module, head: str | nn.Module | None) -> Iterator[None]:
    """Lend the model a calibration, through which its logits are recorded, unless it has one."""
    check_model("model", model)
    fresh = not attached_heads(model)
    attach(model, head)
    try:
        yield
    finally:
        if fresh:
            detach(model)


@contextmanager
def _recorded_features(model: nn.Module, features: list[Tensor | None]) -> Iterator[None]:
    """Leave in ``features`` the input of each head as ``(N, D)``: of a 1x1 convolution without its two spatial axes."""
    features.clear()

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        value = args[0].detach() if args and isinstance(args[0], Tensor) else None
        if value is not None and value.ndim == 4 and value.shape[-2:] == (1, 1):
            value = value.flatten(1)
        features.append(value if value is None else value.clone())

    with ExitStack() as stack:
        for module in attached_heads(model).values():
            stack.callback(module.register_forward_pre_hook(record).remove)
        yield
