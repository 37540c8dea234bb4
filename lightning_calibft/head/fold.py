"""Fold the calibration into the bias of the head: a plain model that is calibrated for good."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from lightning_calibft.head.attach import detach
from lightning_calibft.head.layers import base_layer
from lightning_calibft.head.offset import attached_heads, check_not_folded, mark_head_folded, offset_of

Linear = nn.Linear | nn.Conv2d


def fold(model: nn.Module, *, add_bias: bool = False) -> nn.Module:
    """Add gamma to the bias of the head at the absent classes and detach: a plain model that is calibrated for good.

    Its training mode sees the calibrated logits too, and a bias in half precision rounds gamma. A head with LoRA takes
    gamma up in the bias of its ``base_layer``, so that merging the adapter afterwards keeps it; merging before folding
    loses it. A folded head refuses to be calibrated again, which would count gamma twice.

    Args:
        model: A calibrated model, or its head.
        add_bias: Give a head without bias a new one. The state dict then gains the key ``bias``: the original class
            refuses to load it strictly, and what ignores unknown keys, such as ``from_pretrained`` of transformers,
            drops it, and with it gamma, in silence.

    Returns:
        ``model``.

    Raises:
        ValueError: If ``model`` is not calibrated or folded already, or its head has no bias and ``add_bias`` is false,
            or the head is neither ``Linear`` nor ``Conv2d`` nor one of them with LoRA.

    Example:
        >>> from lightning_calibft.head import set_gamma
        >>> head = set_gamma(nn.Linear(16, 5).eval(), 2.5, seen_classes=[0, 1])
        >>> x = torch.ones(1, 16)
        >>> calibrated = head(x)
        >>> torch.allclose(fold(head)(x), calibrated)
        True
    """
    heads = attached_heads(model)
    for module in heads.values() or [model]:
        check_not_folded(module)
    if not heads or any(offset_of(module).gamma() is None for module in heads.values()):
        raise ValueError("Expected argument `model` to be calibrated. Call `calibrate` or `set_gamma` first.")
    layers = [_foldable(name, module, add_bias) for name, module in heads.items()]
    for layer, module in zip(layers, heads.values(), strict=True):
        shift = offset_of(module).shift().flatten()
        if layer.bias is None:
            bias = torch.zeros_like(shift, dtype=layer.weight.dtype, device=layer.weight.device)
            layer.register_parameter("bias", nn.Parameter(bias, requires_grad=layer.weight.requires_grad))
        with torch.no_grad():
            bias = cast(Tensor, layer.bias)
            bias.copy_(bias + shift)
        mark_head_folded(module)
    return detach(model)


def _foldable(name: str, head: nn.Module, add_bias: bool) -> Linear:
    """Return the layer whose bias is added to the logits as it is."""
    name, kind, layer = name or "forward", type(head).__name__, base_layer(head)
    expected = f"Expected the head {name!r} to be a Linear or Conv2d with a bias to fold gamma into, but got a"
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise ValueError(f"{expected} {kind}. Keep the calibration attached.")
    # Of the adapters of PEFT, those with these two matrices add to the output of the layer; others may scale it.
    if layer is not head and "lora_A" not in dict(head.named_children()):
        raise ValueError(f"{expected} {kind} with an adapter. Merge the adapter and calibrate again.")
    if layer.bias is None and not add_bias:
        raise ValueError(f"{expected} {kind} without one. Pass `add_bias=True` to give it a new one.")
    if not _adds_bias(layer, len(offset_of(head).mask)):
        raise ValueError(f"{expected} {kind} whose own `forward` does not add it. Keep the calibration attached.")
    return layer


def _adds_bias(layer: Linear, width: int) -> bool:
    """Tell whether the bias moves the output by itself. A class with a ``forward`` of its own is tried with zeros."""
    if type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward):
        return True
    layer = copy.deepcopy(layer).eval()
    old = layer.weight if layer.bias is None else layer.bias
    shape = (1, layer.in_channels, 1, 1) if isinstance(layer, nn.Conv2d) else (1, layer.in_features)
    bias = torch.linspace(-1, 1, width, dtype=old.dtype, device=old.device)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    try:
        # Not a call, which would run the hooks.
        logits = layer.forward(torch.zeros(shape, dtype=old.dtype, device=old.device))
    except Exception:  # It takes other inputs: what it does with its bias is unknown.
        return False
    return isinstance(logits, Tensor) and logits.numel() == len(bias) and torch.allclose(logits.flatten(), bias)
