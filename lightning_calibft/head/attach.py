"""Attach, read, change and detach the calibration of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_calibft._arguments import check_gamma, check_model
from lightning_calibft.head.copies import copies_of
from lightning_calibft.head.find import find_head
from lightning_calibft.head.layers import as_tuple, head_names, num_classes
from lightning_calibft.head.offset import (
    add_offset,
    attached_heads,
    check_not_folded,
    is_attached,
    offset_of,
    remove_offset,
)
from lightning_calibft.split import ClassIds, ClassSplit


def attach(model: nn.Module, head: str | nn.Module | None = None) -> nn.Module:
    """Add the calibration, still without a gamma, to the head of ``model``.

    The state dict gains the keys ``<head>.absent_class_calibration.offset`` and ``.mask`` and keeps all others. State
    dicts without them still load strictly. An existing calibration stays as it is.

    Without ``head``, copies of the network in ``model``, such as an average of its weights that was made by hand, get
    the calibration too, so that their state dicts and buffers still match.

    Attach before you create an average of the weights. timm's ``ModelEmaV3`` pairs the entries of two state dicts by
    position, so a copy without these keys would be updated with the wrong entries.

    Args:
        model: The model, or its head.
        head: As in :func:`find_head`.

    Returns:
        ``model``.

    Raises:
        ValueError: If gamma was already folded into the head, if another head of ``model`` carries a calibration, if
            the head has only one output, or as in :func:`find_head`.

    Example:
        >>> model = attach(nn.Sequential(nn.Flatten(), nn.Linear(16, 5)))
        >>> list(model.state_dict())
        ['1.weight', '1.bias', '1.absent_class_calibration.offset', '1.absent_class_calibration.mask']
    """
    heads = as_tuple(find_head(model, head))
    return attach_at(model, heads, copies_of(model, heads) if head is None else [], num_classes(heads))


def attach_at(
    model: nn.Module, heads: tuple[nn.Module, ...], copies: Sequence[tuple[nn.Module, ...]], num_classes: int
) -> nn.Module:
    """Attach to ``heads``, which give the logits of ``num_classes`` together, and to the same heads in copies.

    Raises:
        ValueError: As in :func:`attach`.
    """
    check_several_classes(model, heads, num_classes)
    every = [*heads, *chain.from_iterable(copies)]
    if others := [name or "forward" for name, module in attached_heads(model).items() if module not in every]:
        names = ", ".join(map(repr, others))
        raise ValueError(
            f"Expected a {type(model).__name__} without a calibration at another head, but {names} has one, and"
            " both would add gamma. Call `detach(model)` first."
        )
    for module, name in zip(every, head_names(model, tuple(every)), strict=True):
        parts = name.split(".")
        check_not_folded(module, [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))])
    changed = False
    for copy in (heads, *copies):
        for place, module in enumerate(copy):
            if not is_attached(module):
                child = add_offset(module, num_classes, _device(module))
                child.place, child.coefficient, changed = place, 1 / len(heads), True
            elif len((child := offset_of(module)).mask) != num_classes:  # the head has been given another width
                child.resize(num_classes, _device(module))
    if changed:
        torch.compiler.reset()  # Compiled code does not notice new hooks.
    return model


def check_several_classes(model: nn.Module, heads: tuple[nn.Module, ...], num_classes: int) -> None:
    """Refuse a head with one output.

    Raises:
        ValueError: If ``num_classes`` is one.
    """
    if num_classes == 1:
        raise ValueError(
            f"Expected the head {head_names(model, heads)[0] or 'forward'!r} of {type(model).__name__} to have one"
            " output for each class, but it has one output. It is a binary classifier or a regression, which has no"
            " absent classes. Leave the calibration out, or name another `head`."
        )


def detach(model: nn.Module) -> nn.Module:
    """Remove the calibration and its gamma. The state dict has the keys again that it had before :func:`attach`.

    Returns:
        ``model``.

    Example:
        >>> model = detach(attach(nn.Sequential(nn.Flatten(), nn.Linear(16, 5))))
        >>> list(model.state_dict())
        ['1.weight', '1.bias']
    """
    check_model("model", model)
    if heads := attached_heads(model):
        for module in heads.values():
            remove_offset(module)
        torch.compiler.reset()  # Compiled code does not notice that hooks are gone.
    return model


def get_gamma(model: nn.Module) -> float | None:
    """Return the gamma of a model or a head, or ``None`` if it is not calibrated.

    Raises:
        ValueError: If the heads of ``model`` have different ones.

    Example:
        >>> print(get_gamma(nn.Linear(16, 5)))
        None
    """
    check_model("model", model)
    found = {name: offset_of(module).gamma() for name, module in attached_heads(model).items()}
    gammas = {name: gamma for name, gamma in found.items() if gamma is not None}  # a frozen copy has none
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
    """Set gamma. From now on, ``model`` adds it to the logits of the absent classes in eval mode.

    Args:
        model: The model, or its head. A calibration is attached if there is none.
        gamma: A finite number. It replaces an earlier one.
        seen_classes: As in :class:`~lightning_calibft.ClassSplit`.
        absent_classes: As in :class:`~lightning_calibft.ClassSplit`.
        head: As in :func:`find_head`.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``gamma`` is not a number.
        ValueError: If ``gamma`` is not finite, or as in :func:`attach` and :class:`~lightning_calibft.ClassSplit`.

    Example:
        >>> model = set_gamma(nn.Linear(16, 5).eval(), 2.5, seen_classes=[0, 1])
        >>> get_gamma(model)
        2.5
    """
    gamma = check_gamma(gamma)
    split = ClassSplit(num_classes(find_head(model, head)), seen_classes, absent_classes)
    return set_attached_gamma(attach(model, head), gamma, split)


def set_attached_gamma(
    model: nn.Module, gamma: float, split: ClassSplit, record: Mapping[str, Any] | None = None
) -> nn.Module:
    """Set gamma of an attached model, for a split that fits its head. Frozen copies of the head stay without it."""
    for child in map(offset_of, attached_heads(model).values()):
        if not child.left_out:
            child.set(gamma, split, record)
    return model


def attached_split(model: nn.Module, known: ClassSplit | None, seen_classes: Sequence[int] = ()) -> ClassSplit | None:
    """Return the split that the mask of an attached model belongs to, or ``known`` if the model is not calibrated.

    The mask says which classes are absent. Of the others, ``known`` says which are seen if its absent classes are the
    same; else ``seen_classes``, if none of them is absent; else all of them are.
    """
    mask = next(offset_of(module).mask for module in attached_heads(model).values())
    absent = mask.nonzero().flatten().tolist()
    if not absent or (known is not None and list(known.absent_classes) == absent):
        return known
    present = (mask == 0).nonzero().flatten().tolist()
    seen = seen_classes if seen_classes and set(seen_classes) <= set(present) else present
    return ClassSplit(len(mask), seen, absent) if seen else None


def reset_gamma(model: nn.Module) -> nn.Module:
    """Make an attached model uncalibrated again, in place. Its calibration keeps the keys, with zeros."""
    check_model("model", model)
    for module in attached_heads(model).values():
        offset_of(module).reset_parameters()
    return model


def _device(head: nn.Module) -> torch.device:
    tensors: list[Tensor] = [*head.parameters(), *head.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
