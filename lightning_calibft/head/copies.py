"""Find a head again in the copies of a network that a module holds, such as averages of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_calibft._format import CHILD_NAME
from lightning_calibft.head.layers import head_names, is_layer


def copies_of(
    model: nn.Module, heads: tuple[nn.Module, ...], *, of_equal_weights: bool = False
) -> list[tuple[nn.Module, ...]]:
    """Return the same heads in copies of the network that they are in.

    A copy has the same modules with weights of the same shapes, as an average of the weights has. A copy of a single
    layer also has the same weights: two heads of one width are not copies.

    Args:
        model: The model, which holds the network and its copies.
        heads: The heads, which give the logits together.
        of_equal_weights: Whether each copy must have the same weights.

    Example:
        >>> import copy
        >>> model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))})
        >>> model["average"] = copy.deepcopy(model["net"])
        >>> copies_of(model, (model["net"][-1],)) == [(model["average"][-1],)]
        True
    """
    names = [name.split(".") for name in head_names(model, heads)]
    shared = next(
        (depth for depth, parts in enumerate(zip(*names, strict=False)) if len(set(parts)) > 1), len(names[0])
    )
    for depth in range(1, min(shared, *map(len, names)) + 1):  # the largest network first
        network = model.get_submodule(".".join(names[0][:depth]))
        structure = _structure(network)
        copies = [
            other
            for name, other in model.named_modules()
            if type(other) is type(network)
            and other is not network
            and "original_module" not in name.split(".")  # of a layer that PEFT trains in full
            and _structure(other) == structure
            and (not (of_equal_weights or is_layer(network)) or _have_equal_weights(other, network))
        ]
        if found := [tuple(copy.get_submodule(".".join(parts[depth:])) for parts in names) for copy in copies]:
            return found
    return []


def split_copies(
    model: nn.Module, heads: tuple[nn.Module, ...]
) -> tuple[tuple[nn.Module, ...], list[tuple[nn.Module, ...]]]:
    """Return which of some heads give the logits together, and which are the same heads in copies of the network."""
    copies = [copy for copy in copies_of(model, heads[:1]) if copy[0] in heads]
    return (heads[:1], copies) if len(copies) == len(heads) - 1 else (heads, [])


@contextmanager
def in_place_of(model: nn.Module, head: nn.Module, others: Iterable[nn.Module]) -> Iterator[None]:
    """Put the network of one head where its copies are, so that ``model`` runs it wherever it would run one of them.

    Example:
        >>> import copy
        >>> model = nn.Sequential(nn.Linear(8, 5))
        >>> average = copy.deepcopy(model)
        >>> both = nn.ModuleDict({"model": model, "average": average})
        >>> with in_place_of(both, average[0], [model[0]]):
        ...     both["model"] is average
        True
        >>> both["model"] is average
        False
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for other in others:
        here, there = (name.split(".") for name in head_names(model, (head, other)))
        while len(here) > 1 and len(there) > 1 and here[-1] == there[-1]:
            here, there = here[:-1], there[:-1]
        network = model.get_submodule(".".join(here))
        if there[-1] == "_orig_mod":  # the compiled network would run the one that it was made from
            there = there[:-1]
        replaced.append((model.get_submodule(".".join(there[:-1])), there[-1], network))
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, network in replaced:
            setattr(owner, name, network)
        yield
    finally:
        for owner, name, network in before:
            setattr(owner, name, network)


def _structure(network: nn.Module) -> list[Any]:
    return [
        (name, type(module), [None if is_lazy(each) else each.shape for each in module.parameters(recurse=False)])
        for name, module in network.named_modules()
        if CHILD_NAME not in name
    ]


def _have_equal_weights(network: nn.Module, other: nn.Module) -> bool:
    pairs = list(zip(network.parameters(), other.parameters(), strict=True))
    return not any(is_lazy(each) or each.is_meta for pair in pairs for each in pair) and all(
        torch.equal(weight, same) for weight, same in pairs
    )
