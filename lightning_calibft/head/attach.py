"""Attach, read, change, fold and detach the calibration of a model."""

from __future__ import annotations

from numbers import Real
from typing import cast

import torch
from torch import Tensor, nn

from lightning_calibft.head.find import as_tuple, find_head, num_classes
from lightning_calibft.head.offset import add_offset, attached_heads, is_attached, offset_of, remove_offset
from lightning_calibft.split import ClassIds, ClassSplit


def attach(model: nn.Module, head: str | nn.Module | None = None) -> nn.Module:
    """Add the calibration, still without a gamma, to the head of ``model``.

    The state dict gains the keys ``<head>.absent_class_calibration.offset`` and ``.mask`` and keeps all others. State
    dicts without them still load strictly. A head that has the calibration already keeps it as it is.

    Args:
        model: The model, or its head.
        head: As in :func:`find_head`.

    Returns:
        ``model``.

    Raises:
        ValueError: As in :func:`find_head`.

    Example:
        >>> model = attach(nn.Sequential(nn.Flatten(), nn.Linear(16, 5)))
        >>> list(model.state_dict())
        ['1.weight', '1.bias', '1.absent_class_calibration.offset', '1.absent_class_calibration.mask']
    """
    heads = as_tuple(find_head(model, head))
    width = num_classes(heads)
    new = [module for module in heads if not is_attached(module)]
    for module in new:
        add_offset(module, width, _device(module)).coefficient = 1 / len(heads)
    if new:
        torch.compiler.reset()  # Code compiled before does not notice that hooks came.
    return model


def detach(model: nn.Module) -> nn.Module:
    """Remove the calibration, with its gamma: the state dict has the keys it had before :func:`attach`.

    Returns:
        ``model``.

    Example:
        >>> model = detach(attach(nn.Sequential(nn.Flatten(), nn.Linear(16, 5))))
        >>> list(model.state_dict())
        ['1.weight', '1.bias']
    """
    if heads := attached_heads(model):
        for module in heads.values():
            remove_offset(module)
        torch.compiler.reset()  # Code compiled before does not notice that hooks went.
    return model


def get_gamma(model: nn.Module) -> float | None:
    """Return the gamma of a model or a head, or ``None`` if it is not calibrated.

    Raises:
        ValueError: If the heads of ``model`` have different ones.

    Example:
        >>> print(get_gamma(nn.Linear(16, 5)))
        None
    """
    gammas = {name: offset_of(module).gamma() for name, module in attached_heads(model).items()}
    if len(set(gammas.values())) > 1:
        raise ValueError(f"Expected argument `model` to have one gamma, but got {gammas}. Pass one of its heads.")
    return next(iter(gammas.values()), None)


def set_gamma(
    model: nn.Module,
    gamma: float,
    seen_classes: ClassIds,
    absent_classes: ClassIds | None = None,
    *,
    head: str | nn.Module | None = None,
) -> nn.Module:
    """Calibrate ``model``: from now on its logits of the absent classes are ``gamma`` higher, in eval mode.

    Args:
        model: The model, or its head. The calibration is attached if it is not yet.
        gamma: A finite number. It replaces an earlier one.
        seen_classes: As in :class:`~lightning_calibft.ClassSplit`.
        absent_classes: As in :class:`~lightning_calibft.ClassSplit`.
        head: As in :func:`find_head`.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``gamma`` is no number.
        ValueError: If ``gamma`` is not finite, or as in :func:`find_head` and :class:`~lightning_calibft.ClassSplit`.

    Example:
        >>> model = set_gamma(nn.Linear(16, 5).eval(), 2.5, seen_classes=[0, 1])
        >>> get_gamma(model)
        2.5
    """
    _check_gamma(gamma)
    heads = as_tuple(find_head(model, head))
    split = ClassSplit(num_classes(heads), seen_classes, absent_classes)
    attach(model, head)
    for module in heads:
        offset_of(module).set(float(gamma), split)
    return model


def reset_gamma(model: nn.Module) -> nn.Module:
    """Make an attached model uncalibrated again, in place: it keeps the calibration's keys, with zeros."""
    for module in attached_heads(model).values():
        for buffer in offset_of(module).buffers():
            buffer.zero_()
    return model


def fold(model: nn.Module, *, add_bias: bool = False) -> nn.Module:
    """Add gamma to the bias of the head at the absent classes and detach: a plain model that is calibrated for good.

    Its training mode sees the calibrated logits too, and a bias in half precision rounds gamma.

    Args:
        model: A calibrated model, or its head.
        add_bias: Give a head without bias a new one.

    Returns:
        ``model``.

    Raises:
        ValueError: If ``model`` is not calibrated, or its head has no bias and ``add_bias`` is false, or the head is
            neither ``Linear`` nor ``Conv2d``.

    Example:
        >>> head = set_gamma(nn.Linear(16, 5).eval(), 2.5, seen_classes=[0, 1])
        >>> x = torch.ones(1, 16)
        >>> calibrated = head(x)
        >>> torch.allclose(fold(head)(x), calibrated)
        True
    """
    heads = attached_heads(model)
    if not heads or any(offset_of(module).gamma() is None for module in heads.values()):
        raise ValueError("Expected argument `model` to be calibrated. Call `calibrate` or `set_gamma` first.")
    for name, module in heads.items():
        _check_foldable(name, module, add_bias)
    for module in heads.values():
        shift = offset_of(module).shift().flatten()
        if getattr(module, "bias", None) is None:
            weight = cast(nn.Parameter, module.weight)
            bias = torch.zeros_like(shift, dtype=weight.dtype, device=weight.device)
            module.register_parameter("bias", nn.Parameter(bias, requires_grad=weight.requires_grad))
        with torch.no_grad():
            bias = cast(Tensor, module.bias)
            bias.copy_(bias + shift)
    return detach(model)


def _check_gamma(gamma: object) -> None:
    if isinstance(gamma, bool) or not isinstance(gamma, Real):
        raise TypeError(f"Expected argument `gamma` to be a number, but got {gamma!r}.")
    if not abs(float(gamma)) <= torch.finfo(torch.float32).max:
        raise ValueError(f"Expected argument `gamma` to be finite in float32, but got {gamma}.")


def _check_foldable(name: str, head: nn.Module, add_bias: bool) -> None:
    expected = f"Expected the head {name!r} to be a Linear or Conv2d with a bias to fold gamma into, but got a"
    if not isinstance(head, (nn.Linear, nn.Conv2d)):
        raise ValueError(f"{expected} {type(head).__name__}. Keep the calibration attached.")
    if head.bias is None and not add_bias:
        raise ValueError(f"{expected} {type(head).__name__} without one. Pass `add_bias=True` to give it a new one.")


def _device(head: nn.Module) -> torch.device:
    tensors: list[Tensor] = [*head.parameters(), *head.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
