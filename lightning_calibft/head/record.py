"""Record the raw logits of a model while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_calibft._arguments import check_model
from lightning_calibft.head.find import find_head
from lightning_calibft.head.layers import as_tuple, is_channels_first, width_of
from lightning_calibft.head.offset import AbsentClassOffset, Recorder, attached_heads, is_attached, offset_of
from lightning_calibft.head.output import get_logits


class UnexpectedLogitsError(ValueError):
    """What was recorded is not the logits of one batch."""


class LogitRecorder(AbstractContextManager[list[Tensor]]):
    """Records the logits of each forward of a model: without gamma, in training mode and in eval mode.

    Where several heads give the logits together, their weighted mean is recorded. The weights are equal, or what
    :func:`probe` last measured. Of copies of a model, such as an average of its weights, each is recorded apart until
    :func:`probe` has shown which of them gives the logits.

    An attached head is recorded through its calibration. Any other gets a forward hook, which adds nothing to the state
    dict. Compiled code does not notice hooks that come later, so make the recorder before the first compiled call. The
    hook does nothing until :meth:`start` and stays until :meth:`remove`.

    Recorders that are started side by side each record every forward. A ``with`` block records apart: recorders of an
    attached head that were started before it pause until it ends.

    Recording interrupts the graph of a compiled model. One compiled with ``fullgraph=True`` refuses that: run it under
    ``torch.compiler.set_stance("force_eager")``.

    Args:
        model: The model, or its head.
        head: As in :func:`find_head`.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
        >>> recorder = LogitRecorder(model)
        >>> _ = recorder.start()
        >>> _ = model(torch.ones(3, 16))
        >>> [logits.shape for logits in recorder.stop()]
        [torch.Size([3, 5])]
        >>> recorder.remove()
    """

    def __init__(self, model: nn.Module, head: str | nn.Module | None = None) -> None:
        heads = tuple(attached_heads(model).values()) if head is None else ()
        heads = heads or as_tuple(find_head(model, head))
        self._share = 1 / len(heads)
        self._recording = False
        self._records: list[Tensor] = []
        self._met: set[nn.Module | int] = set()
        self._paused: list[tuple[bool, list[Tensor], set[nn.Module | int], list[tuple[Recorder, ...]]]] = []
        attached = [module for module in heads if is_attached(module)]
        self._children = [offset_of(module) for module in attached]
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(self._hook) for module in heads if module not in attached
        ]
        if self._handles:
            torch.compiler.reset()

    def start(self) -> list[Tensor]:
        """Forget what was recorded and begin to record.

        Returns:
            A new list that grows by one tensor ``(N, C)`` a forward, detached and copied; ``(N, ..., C)`` if the head
            gives the logits of several positions. Clear it between batches to keep it small.
        """
        self.stop()
        self._recording = True
        for child in self._children:
            child.set_recorders((*child.recorders, self._record))
        return self._records

    def stop(self) -> list[Tensor]:
        """Record no more and return the logits of each forward since :meth:`start`."""
        records, self._records, self._met, self._recording = self._records, [], set(), False
        for child in self._children:
            child.set_recorders(tuple(recorder for recorder in child.recorders if recorder != self._record))
        return records

    def remove(self) -> None:
        """Record no more and remove the hooks."""
        self.stop()
        for handle in self._handles:
            handle.remove()

    @override
    def __enter__(self) -> list[Tensor]:
        before = [child.recorders for child in self._children]
        self._paused.append((self._recording, self._records, self._met, before))
        self._recording, self._records, self._met = True, [], set()
        for child in self._children:
            child.set_recorders((self._record,))
        return self._records

    @override
    def __exit__(self, *_: Any) -> None:
        self.stop()
        self._recording, self._records, self._met, before = self._paused.pop()
        for child, recorders in zip(self._children, before, strict=True):
            child.set_recorders(tuple(dict.fromkeys((*recorders, *child.recorders))))

    def __getstate__(self) -> dict[str, Any]:
        # A copy, which comes with a copy of the model, does not record.
        return {**self.__dict__, "_recording": False, "_records": [], "_met": set(), "_paused": []}

    def _hook(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._recording:
            self._record_output(module, output)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _record_output(self, module: nn.Module, output: Any) -> None:
        self._add(module, get_logits(output, width_of(module)), is_channels_first(module), self._share)

    def _record(self, child: AbsentClassOffset, logits: Tensor) -> None:
        if self._recording and child.coefficient != 0:
            self._add(child.place, logits, child.channels_first, child.coefficient)

    def _add(self, head: nn.Module | int, logits: Tensor, channels_first: bool, coefficient: float) -> None:
        raw = class_axis_last(gather_dtensor(logits.detach()), channels_first)
        raw = raw.clone() if coefficient == 1 else raw * coefficient
        # A head that has been met already, or a copy of it, begins a new forward.
        if head in self._met or not self._records:
            self._met.clear()
            self._records.append(raw)
        else:
            self._records[-1] = self._records[-1] + raw
        self._met.add(head)


def record_logits(model: nn.Module) -> LogitRecorder:
    """Record the raw logits of each forward of an attached model in a ``with`` block.

    Args:
        model: A model that :func:`attach` has seen, or its head.

    Returns:
        A recorder for a ``with`` block, or for many one after the other. The block gets the list that
        :meth:`LogitRecorder.start` returns, each block a new one.

    Raises:
        ValueError: If ``model`` carries no calibration.

    Example:
        >>> from lightning_calibft.head import attach
        >>> model = attach(nn.Linear(16, 5))
        >>> with record_logits(model) as logits:
        ...     _ = model(torch.ones(3, 16))
        >>> [x.shape for x in logits]
        [torch.Size([3, 5])]
    """
    check_model("model", model)
    if not attached_heads(model):
        raise ValueError("Expected argument `model` to carry a calibration. Call `attach(model)` first.")
    return LogitRecorder(model)


def one_forward(records: Sequence[Tensor], num_samples: int, num_classes: int, remedy: str = "") -> Tensor:
    """Return the recorded logits of a batch, ``(N, C)``, if they come from one forward with one position a sample.

    Args:
        records: What a :class:`LogitRecorder` gave for the batch.
        num_samples: Number of labels in the batch, ``N``.
        num_classes: Width of the head, ``C``.
        remedy: A sentence for the end of the error message.

    Raises:
        UnexpectedLogitsError: If there are several forwards or none, or the logits have another shape.

    Example:
        >>> one_forward([torch.ones(2, 5)], 2, 5).shape
        torch.Size([2, 5])
    """
    shapes = [tuple(logits.shape) for logits in records]
    if len(shapes) != 1 or _without_ones(shapes[0]) != (*_without_ones((num_samples, 0))[:-1], num_classes):
        raise UnexpectedLogitsError(
            f"Expected one forward of the head with logits of shape {(num_samples, num_classes)} for a batch of"
            f" {num_samples} labels, but got {shapes}.{remedy and ' '}{remedy}"
        )
    return records[0].flatten(0, -2)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop the axes of length 1 before the last one, as in the logits ``(N, 1, C)`` of a single position."""
    return (*(length for length in shape[:-1] if length != 1), shape[-1])


def class_axis_last(logits: Tensor, channels_first: bool) -> Tensor:
    """Bring the output of a head to the shape ``(N, C)``, or ``(N, ..., C)`` where it has several positions."""
    if not channels_first:
        return logits
    return logits.flatten(-3) if logits.shape[-2:] == (1, 1) else logits.movedim(-3, -1)


def gather_dtensor(tensor: Tensor) -> Tensor:
    """Return a tensor that may be distributed as a plain one. All processes of a distributed one must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
