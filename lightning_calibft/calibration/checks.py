"""What a pass asks of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_calibft.estimators import Estimator, needs_pretrained_logits
from lightning_calibft.head import CHILD_NAME, attached_heads, num_classes


def head_width(model: nn.Module) -> int:
    """Return the number of rows of the attached head of ``model``."""
    return num_classes(next(iter(attached_heads(model).values())))


def check_pretrained(estimator: str | Estimator, pretrained: Mapping[str, Tensor] | None, model: nn.Module) -> None:
    """Refuse an estimator that needs the weights from before fine-tuning without them, or with others.

    Raises:
        ValueError: If they are missing, not needed, or do not fit the model.
    """
    name = estimator if isinstance(estimator, str) else type(estimator).__name__
    if needs_pretrained_logits(estimator) != (pretrained is not None):
        needed = "the model before fine-tuning" if pretrained is None else "None"
        raise ValueError(
            f"Expected argument `pretrained` to be {needed} beside the estimator {name!r}, but got"
            f" {'None' if pretrained is None else 'weights'}."
        )
    if pretrained is None:
        return
    # Besides tensors, a state dict may hold what modules tell as their extra state.
    tensors = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    shapes = {key: value.shape for key, value in tensors.items() if CHILD_NAME not in key}
    if wrong := [key for key, shape in shapes.items() if key not in pretrained or pretrained[key].shape != shape]:
        raise ValueError(
            f"Expected argument `pretrained` to hold the weights of the same model before fine-tuning, but {wrong[0]!r}"
            " is missing or has another shape."
        )
