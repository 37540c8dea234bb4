"""Keep the raw logits of a model while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_calibft.head.offset import AbsentClassOffset, attached_heads, offset_of


@contextmanager
def record_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the raw logits of each forward of an attached model: without gamma, in training and in eval mode.

    Where several heads give the logits together, their weighted mean is recorded. The weights are equal, or what
    :func:`probe` last measured.

    Recording interrupts the graph of a compiled model. One compiled with ``fullgraph=True`` refuses that: run it under
    ``torch.compiler.set_stance("force_eager")``.

    Args:
        model: A model that :func:`attach` has seen, or its head.

    Yields:
        A list that grows by one tensor ``(N, C)`` a forward, detached and copied; ``(N, ..., C)`` if the head gives
        the logits of several positions. Clear it between batches to keep it small.

    Example:
        >>> import torch
        >>> from lightning_calibft.head import attach
        >>> model = attach(nn.Linear(16, 5))
        >>> with record_logits(model) as logits:
        ...     _ = model(torch.ones(3, 16))
        >>> [x.shape for x in logits]
        [torch.Size([3, 5])]
    """
    children = [offset_of(head) for head in attached_heads(model).values()]
    before = [(child, child.recorder) for child in children]
    recorded: list[Tensor] = []
    met: set[AbsentClassOffset] = set()

    def record(child: AbsentClassOffset, logits: Tensor) -> None:
        raw = class_axis_last(logits.detach(), child.channels_first)
        raw = raw.clone() if child.coefficient == 1 else raw * child.coefficient
        # A head that has been met already begins a new forward.
        if child in met or not recorded:
            met.clear()
            recorded.append(raw)
        else:
            recorded[-1] = recorded[-1] + raw
        met.add(child)

    try:
        for child, _ in before:
            child.recorder, child.recording = record, True
        yield recorded
    finally:
        for child, recorder in before:
            child.recorder, child.recording = recorder, recorder is not None


def class_axis_last(logits: Tensor, channels_first: bool) -> Tensor:
    """Bring the output of a head to the shape ``(N, C)``, or ``(N, ..., C)`` where it has several positions."""
    if not channels_first:
        return logits
    return logits.flatten(-3) if logits.shape[-2:] == (1, 1) else logits.movedim(-3, -1)
