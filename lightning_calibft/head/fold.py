"""Fold the calibration into the bias of the head, which makes a plain, permanently calibrated model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lightning_calibft._arguments import check_model
from lightning_calibft.head.attach import detach
from lightning_calibft.head.layers import base_layer
from lightning_calibft.head.offset import (
    AbsentClassOffset,
    attached_heads,
    check_not_folded,
    mark_head_folded,
    offset_of,
    record_of,
)

# Prefixes of the names in a Linear or Conv2d, which may be pruned, reparametrized or have an adapter.
_LINEAR_NAMES = ("weight", "bias", "parametrizations.weight.", "base_layer.", "lora_")


def fold(model: nn.Module, *, add_bias: bool = False) -> nn.Module:
    """Add gamma to the head's bias at the absent classes and detach, which makes a plain calibrated model.

    The folded model returns calibrated logits in training mode too. A bias in half precision rounds gamma. In a head
    with LoRA, gamma goes into the bias of the ``base_layer``, so merging the adapter afterwards keeps gamma. Merging
    before folding loses it. A folded head cannot be calibrated again, because that would count gamma twice.

    Args:
        model: A calibrated model, or its head.
        add_bias: Give a head without bias a new one. The state dict then gains the key ``bias``. The original class
            refuses to load it strictly. Loaders that ignore unknown keys, such as ``from_pretrained`` of
            transformers, silently drop it, and gamma with it.

    Returns:
        ``model``.

    Raises:
        ValueError: If ``model`` is not calibrated or is already folded, if its head has no bias and ``add_bias`` is
            false, if the head shares its bias with another layer, if gamma does not fit into the dtype of the bias, or
            if the head is not a ``Linear`` or ``Conv2d``, with or without LoRA.

    Example:
        >>> from lightning_calibft.head import set_gamma
        >>> head = set_gamma(nn.Linear(16, 5).eval(), 2.5, seen_classes=[0, 1])
        >>> x = torch.ones(1, 16)
        >>> calibrated = head(x)
        >>> torch.allclose(fold(head)(x), calibrated)
        True
    """
    check_model("model", model)
    attached = attached_heads(model)
    for module in attached.values() or [model]:
        check_not_folded(module)
    # A copy of the model that is not trained, such as a teacher, has no gamma.
    heads = {name: module for name, module in attached.items() if offset_of(module).gamma() is not None}
    if not heads:
        raise ValueError("Expected argument `model` to be calibrated. Call `calibrate` or `set_gamma` first.")
    for name, module in heads.items():
        _check_layer(name, module)
    shifts = {f"{name}.".removeprefix("."): offset_of(module).shift().flatten() for name, module in heads.items()}
    shift_biases(model, shifts, add_bias=add_bias)
    for module in heads.values():
        mark_head_folded(module, record_of(module))
    return detach(model)


def shift_biases(model: nn.Module, shifts: Mapping[str, Tensor], *, add_bias: bool = False) -> None:
    """Shift the logits of heads by their biases, in place. The arguments are those of :func:`folded_biases`."""
    # Collected by module, so that a parameter has several names only if several modules share it.
    tensors = {
        f"{name}.{key}".removeprefix("."): tensor
        for name, module in model.named_modules()
        if not isinstance(module, AbsentClassOffset)
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    }
    for name, bias in folded_biases(tensors, shifts, add_bias=add_bias).items():
        owner, _, key = name.rpartition(".")
        layer = model.get_submodule(owner)
        if name in tensors:
            with torch.no_grad():
                tensors[name].copy_(bias)
        else:
            weight = cast(Tensor, layer.weight)
            layer.register_parameter(key, nn.Parameter(bias, requires_grad=weight.requires_grad))


def folded_biases(
    tensors: Mapping[str, Tensor], shifts: Mapping[str, Tensor], *, add_bias: bool, where: str = ""
) -> dict[str, Tensor]:
    """Return the biases with gamma in them, by name. Folding makes these changes to a model or a state dict.

    A pruned bias (``torch.nn.utils.prune``) takes up gamma at its pruned entries too, where its mask changes. Heads
    that share one bias add gamma to it once. The sum is computed in the precision of the bias, but at least float32.

    Args:
        tensors: All parameters and buffers except the calibration's. The same tensor may have several names.
        shifts: The shift of the logits of each class, by the prefix of the head's names.
        add_bias: Give a head without bias a new one.
        where: Text after the name of a head in errors.

    Raises:
        ValueError: If a head is not linear, has no bias and may not get one, or shares its bias with another layer.
    """
    changes: dict[str, Tensor] = {}
    biases: dict[str, tuple[str, Tensor]] = {}
    for prefix, shift in shifts.items():
        names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        head = f"the head {prefix.rstrip('.') or 'forward'!r}{where}"
        layer = prefix + _layer_in(names, head)
        bias = tensors.get(f"{layer}bias_orig", tensors.get(f"{layer}bias"))
        if bias is None:
            if not add_bias:
                raise ValueError(
                    f"{_expected(head)} but it has none. Pass `add_bias=True` to give it one. The original class"
                    " then refuses to load it strictly, and otherwise silently drops it."
                )
            weight = next(tensors[prefix + name] for name in names if "weight" in name)
            dtype = weight.dtype if weight.is_floating_point() else torch.float32
            bias = torch.zeros(len(shift), dtype=dtype, device=weight.device)
        if bias.shape != shift.shape or not bias.is_floating_point():
            raise ValueError(
                f"{_expected(head)} but its bias has the shape {tuple(bias.shape)} and the dtype {bias.dtype} for"
                f" {len(shift)} classes. Keep the calibration attached."
            )
        shift = shift.to(bias.device, torch.promote_types(bias.dtype, torch.float32))
        if f"{layer}bias_orig" in tensors:
            mask = tensors[f"{layer}bias_mask"]
            changes[f"{layer}bias_orig"] = torch.where(shift != 0, _add(bias * mask, shift, head), bias)
            changes[f"{layer}bias_mask"] = torch.where(shift != 0, torch.ones_like(mask), mask)
            biases[f"{layer}bias_orig"] = biases[f"{layer}bias_mask"] = head, shift
        else:
            changes[f"{layer}bias"] = _add(bias, shift, head)
            biases[f"{layer}bias"] = head, shift
    for name, (head, shift) in biases.items():
        for other in _names_of_same(tensors, name):
            is_same = _addresses(tensors[other]) == _addresses(tensors[name])
            if other not in biases or not is_same:
                raise ValueError(
                    f"{_expected(head)} but {other!r} {'is the same tensor' if is_same else 'shares its memory'}, which"
                    " gamma would change too. Give the head a bias of its own, or keep the calibration attached."
                )
            if not torch.equal(biases[other][1], shift):
                raise ValueError(
                    f"{_expected(head)} but it shares the bias with {biases[other][0]}, which has another gamma."
                    " Keep the calibration attached."
                )
            changes[other] = changes[name]  # the heads still share it
    return changes


def _layer_in(names: list[str], head: str) -> str:
    """Return the prefix of the linear layer in a head, which is ``base_layer.`` if the head has an adapter."""
    has_adapter = any(name.startswith("base_layer.") for name in names)
    # LoRA adds to the output of the layer. Other PEFT adapters may scale it.
    if has_adapter and not any(name.startswith("lora_") for name in names):
        raise ValueError(f"{_expected(head)} but it has an adapter. Merge the adapter and calibrate again.")
    if not names or not all(name.startswith(_LINEAR_NAMES) for name in names):
        raise ValueError(
            f"{_expected(head)} but it holds {', '.join(names[:5]) or 'no weights'}. Keep the calibration attached."
        )
    return "base_layer." if has_adapter else ""


def _expected(head: str) -> str:
    return f"Expected {head} to be a Linear or Conv2d with a bias of its own to fold gamma into,"


def _add(bias: Tensor, shift: Tensor, head: str) -> Tensor:
    total = (bias.detach() + shift).to(bias.dtype)  # the shift has at least float32 precision, so the sum does too
    if not bias.is_meta and bool((total.isinf() & ~bias.isinf()).any()):
        raise ValueError(
            f"{_expected(head)} but its {bias.dtype} cannot hold a gamma of {shift[shift.abs().argmax()].item():.6g}."
            " Convert the head to float32 first."
        )
    return total


def _names_of_same(tensors: Mapping[str, Tensor], name: str) -> list[str]:
    """Return the other names of memory that the named tensor lies in, in whole or in part."""
    if (tensor := tensors.get(name)) is None:
        return []
    start, stop = _addresses(tensor)
    spans = {other: (value, *_addresses(value)) for other, value in tensors.items() if other != name}
    return [other for other, (value, first, end) in spans.items() if value is tensor or (first < stop and start < end)]


def _addresses(tensor: Tensor) -> tuple[int, int]:
    """Return where the memory that a tensor spans starts and stops."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_meta or not tensor.numel():
        return id(tensor), id(tensor)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _check_layer(name: str, head: nn.Module) -> None:
    """Raise if a head is not a layer that adds its bias to the logits unchanged. The weights are not checked."""
    name, kind, layer = name or "forward", type(head).__name__, base_layer(head)
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        raise ValueError(f"{_expected(f'the head {name!r}')} but got a {kind}. Keep the calibration attached.")
    if not _adds_bias(layer, len(offset_of(head).mask)):
        raise ValueError(
            f"{_expected(f'the head {name!r}')} but got a {kind} whose own `forward` does not add it. Keep the"
            " calibration attached."
        )


def _adds_bias(layer: nn.Linear | nn.Conv2d, width: int) -> bool:
    """Return whether the layer adds its bias to the output. A custom ``forward`` is tried with zeros as input."""
    if type(layer).forward in (nn.Linear.forward, nn.Conv2d.forward):
        return True
    layer = copy.deepcopy(layer).eval()
    old = layer.weight if layer.bias is None else layer.bias
    shape = (1, layer.in_channels, 1, 1) if isinstance(layer, nn.Conv2d) else (1, layer.in_features)
    bias = torch.linspace(-1, 1, width, dtype=old.dtype, device=old.device)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    try:
        # Calling the layer would run its hooks.
        logits = layer.forward(torch.zeros(shape, dtype=old.dtype, device=old.device))
    except Exception:  # It takes other inputs, so what it does with its bias is unknown.
        return False
    return isinstance(logits, Tensor) and logits.numel() == len(bias) and torch.allclose(logits.flatten(), bias)
