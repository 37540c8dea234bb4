"""Keep the raw logits of a model while it runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_calibft.head.offset import AbsentClassOffset, Recorder, attached_heads, offset_of
from lightning_calibft.head.sharded import whole


def record_logits(model: nn.Module) -> LogitRecording:
    """Collect the raw logits of each forward of an attached model: without gamma, in training and in eval mode.

    Where several heads give the logits together, their weighted mean is recorded. The weights are equal, or what
    :func:`probe` last measured.

    Recording interrupts the graph of a compiled model. One compiled with ``fullgraph=True`` refuses that: run it under
    ``torch.compiler.set_stance("force_eager")``.

    Args:
        model: A model that :func:`attach` has seen, or its head.

    Returns:
        A context manager for a ``with`` block, or for many one after the other. It gives a list, in each block a new
        one, that grows by one tensor ``(N, C)`` a forward, detached and copied; ``(N, ..., C)`` if the head gives the
        logits of several positions. Clear it between batches to keep it small.

    Example:
        >>> import torch
        >>> from lightning_calibft.head import attach
        >>> model = attach(nn.Linear(16, 5))
        >>> with record_logits(model) as logits:
        ...     _ = model(torch.ones(3, 16))
        >>> [x.shape for x in logits]
        [torch.Size([3, 5])]
    """
    return LogitRecording(model)


class LogitRecording(AbstractContextManager[list[Tensor]]):
    """What :func:`record_logits` returns. The heads are looked up once, which takes longer than a small forward."""

    def __init__(self, model: nn.Module) -> None:
        self._children = [offset_of(head) for head in attached_heads(model).values()]
        self._recorded: list[Tensor] = []
        self._met: set[AbsentClassOffset] = set()
        self._outer: list[tuple[list[Recorder | None], list[Tensor], set[AbsentClassOffset]]] = []

    @override
    def __enter__(self) -> list[Tensor]:
        self._outer.append(([child.recorder for child in self._children], self._recorded, self._met))
        self._recorded, self._met = [], set()
        for child in self._children:
            child.recorder, child.recording = self._record, True
        return self._recorded

    @override
    def __exit__(self, *_: Any) -> None:
        recorders, self._recorded, self._met = self._outer.pop()
        for child, recorder in zip(self._children, recorders, strict=True):
            child.recorder, child.recording = recorder, recorder is not None

    def _record(self, child: AbsentClassOffset, logits: Tensor) -> None:
        raw = class_axis_last(whole(logits.detach()), child.channels_first)
        raw = raw.clone() if child.coefficient == 1 else raw * child.coefficient
        # A head that has been met already begins a new forward.
        if child in self._met or not self._recorded:
            self._met.clear()
            self._recorded.append(raw)
        else:
            self._recorded[-1] = self._recorded[-1] + raw
        self._met.add(child)


def class_axis_last(logits: Tensor, channels_first: bool) -> Tensor:
    """Bring the output of a head to the shape ``(N, C)``, or ``(N, ..., C)`` where it has several positions."""
    if not channels_first:
        return logits
    return logits.flatten(-3) if logits.shape[-2:] == (1, 1) else logits.movedim(-3, -1)
