"""Find the classification head of a model by static rules, without data."""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import chain, takewhile

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_calibft._arguments import check_model
from lightning_calibft.head.copies import copies_of
from lightning_calibft.head.layers import (
    Head,
    forward_name,
    frozen_networks,
    head_candidates,
    head_names,
    is_channels_first,
    is_lightning_module,
    layer_width,
    remedy,
    unwrap,
    width_of,
)
from lightning_calibft.head.offset import attached_copies, offset_of
from lightning_calibft.head.zero_shot import ZeroShotHead

# Attributes under which torchvision, timm, Hugging Face and most others keep the head.
_NAMES = ("fc", "classifier", "head", "heads", "score", "classification_head", "last_linear")
# Names of heads beside others. A projection head gives features.
_NAME_OF_ONE_HEAD = re.compile(r"(?<![a-z])(?<!proj_)(?<!projection_)(heads?|classifiers?)(?![a-z])")
# Attributes of heads whose logits are averaged.
_PAIRS = (("head", "head_dist"), ("cls_classifier", "distillation_classifier"), ("classifier", "classifier_distill"))


class HeadNotFoundError(ValueError):
    """The model has no classification head, or not yet."""


class SeveralHeadsError(ValueError):
    """Several modules could be the classification head.

    Attributes:
        heads: The heads, as ``find_head`` would return each.
    """

    def __init__(self, message: str, heads: list[tuple[nn.Module, ...]]) -> None:
        super().__init__(message)
        self.heads = heads


def find_head(model: nn.Module, head: str | nn.Module | None = None) -> Head:
    """Find the module whose output is the logits.

    The rules are tried in this order: heads that already carry a calibration; ``model`` itself; a ``ZeroShotHead``;
    timm's ``get_classifier()``; well-known attribute names; the last layer that is ``Linear`` or has an integer
    ``out_features``, if no other has its width or is the head of another task; a model without any such layer that
    states its number of classes.
    The rules only guess. :func:`probe` checks with data. A network that is not trained, such as a teacher, is left out
    if another one is. Of equal copies of a network, the head of the first is returned.

    Args:
        model: Any module, also one that wraps the classifier: a LightningModule, a compiled or an averaged model.
        head: The head, if the rules fail: its dotted name in ``model`` (``"model.fc"``) or the module itself. A
            container stands for the last layer in it. ``"forward"`` stands for the output of the whole model and
            ``"model.forward"`` for that of a part: a tensor, or a tuple, mapping or object with the logits. Such a
            model states its number of classes as ``out_features``, ``num_classes``, ``num_labels`` or
            ``config.num_labels``.

    Returns:
        The head, or a tuple of heads that give the logits together, such as the pair in a distilled model.

    Raises:
        HeadNotFoundError: If there is none, or if it is not built yet.
        ValueError: If there are several, or ``head`` is not a head of ``model``.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
        >>> find_head(model)
        Linear(in_features=16, out_features=5, bias=True)
    """
    check_model("model", model)
    return find_head_outside(model, head, frozen_networks(model))


def find_head_outside(model: nn.Module, head: str | nn.Module | None, frozen: Collection[nn.Module]) -> Head:
    """Find the head as :func:`find_head` does, but not in the networks that are ``frozen``."""
    if head is not None:
        heads = _explicit(model, head, frozen)
    else:
        rules = (_attached, _itself, _zero_shot, _timm, _well_known, _last_layer, _whole_model)
        heads = next((found for rule in rules if (found := rule(model, frozen))), ())
    if not heads:
        raise HeadNotFoundError(f"Found no classification head in {type(model).__name__}. {remedy(model, frozen)}")
    if lazy := [module for module in heads if any(map(is_lazy, module.parameters()))]:
        name = head_names(model, lazy[0])[0] or "forward"
        raise HeadNotFoundError(
            f"The classification head {name!r} has no weights yet. Run one batch through the model to build it."
        )
    return heads[0] if len(heads) == 1 else heads


def _explicit(model: nn.Module, head: str | nn.Module, frozen: Collection[nn.Module]) -> tuple[nn.Module, ...]:
    if isinstance(head, str):
        *parents, last = head.split(".")
        whole = last == "forward"  # No module can have a child of that name.
        module = _named(model, head, ".".join(parents) if whole else head, frozen)
        if whole:
            return _output_of(unwrap(module), head)
    elif isinstance(head, nn.Module):
        module = head
        if all(module is not other for other in model.modules()):
            raise ValueError(
                f"Expected argument `head` to be a module of {type(model).__name__}, but got a"
                f" {type(head).__name__} that is not in it."
                f" {remedy(model, frozen)}"
            )
    else:
        raise TypeError(f"Expected argument `head` to be a dotted name or a module, but got {head!r}.")
    if not (heads := _resolve(module)):
        name = forward_name(head_names(model, module)[0])
        raise ValueError(
            f"Expected argument `head` to be a Linear, a 1x1 Conv2d, a container of one or a module with an integer"
            f" attribute `out_features`, but got {type(module).__name__}. If its output is the logits, pass"
            f' `head="{name}"`. {remedy(model, frozen)}'
        )
    return heads


def _named(model: nn.Module, head: str, name: str, frozen: Collection[nn.Module]) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise HeadNotFoundError(
            f"Expected argument `head` to name a module of {type(model).__name__}, but got {head!r}."
            f" {remedy(model, frozen)}"
        ) from None


def _output_of(module: nn.Module, head: str) -> tuple[nn.Module, ...]:
    if width_of(module) is None:
        raise ValueError(
            f"Expected the {type(module).__name__} of argument `head`, {head!r}, to state its number of classes, but it"
            " has no integer attribute `out_features`, `num_classes` or `num_labels`. Set `num_classes` on it."
        )
    return (module,)


def _attached(model: nn.Module, frozen: Collection[nn.Module]) -> tuple[nn.Module, ...]:
    copies = attached_copies(model)
    return next((heads for heads in copies if any(offset_of(head).coefficient for head in heads)), ())


def _itself(model: nn.Module, frozen: Collection[nn.Module]) -> tuple[nn.Module, ...]:
    return (model,) if layer_width(model) is not None else ()


def _zero_shot(model: nn.Module, frozen: Collection[nn.Module]) -> tuple[nn.Module, ...]:
    # The encoder before it may have its own `classifier`, which projects the features.
    return _only(model, frozen, [(module,) for module in model.modules() if isinstance(module, ZeroShotHead)])


def _timm(model: nn.Module, frozen: Collection[nn.Module]) -> tuple[nn.Module, ...]:
    """Ask the shallowest modules that have timm's ``get_classifier``."""
    searched = model.named_modules(set(frozen))
    owners = [(name, module) for name, module in searched if hasattr(module, "get_classifier")]
    shallowest = min((_depth(name) for name, _ in owners), default=0)
    found = []
    for name, owner in owners:
        if _depth(name) > shallowest:
            continue
        try:
            classifier = owner.get_classifier()
        except Exception:  # Models without a head raise different errors.
            continue
        parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
        found.append(tuple(chain.from_iterable(_resolve(part) for part in parts if isinstance(part, nn.Module))))
    return _only(model, frozen, found)


def _well_known(model: nn.Module, frozen: Collection[nn.Module]) -> tuple[nn.Module, ...]:
    """Look for well-known names, no deeper than the shallowest candidate."""
    for depth in range(1, min(map(_depth, head_candidates(model, frozen)), default=0) + 1):
        parents = [module for name, module in model.named_modules(set(frozen)) if _depth(name) == depth - 1]
        if heads := _only(model, frozen, [found for parent in parents for found in _named_children(parent)]):
            return heads
    return ()


def _last_layer(model: nn.Module, frozen: Collection[nn.Module]) -> tuple[nn.Module, ...]:
    """Take the last candidate that is no 1x1 convolution, of which networks have many."""
    found = head_candidates(model, frozen).items()
    layers = {name: module for name, module in found if not is_channels_first(module)}
    if not layers:
        return ()
    last, width = [*layers][-1], width_of([*layers.values()][-1])
    equal = [name for name, module in layers.items() if width_of(module) == width]
    return _only(model, frozen, [(layers[name],) for name in (*_heads_beside(model, layers, last), *equal)])


def _heads_beside(model: nn.Module, names: Collection[str], last: str) -> list[str]:
    """Return the last layer of each head that has its name or its dictionary in common with the head of ``last``."""
    beside, others = dict[str, str](), last.split(".")
    for name in names:
        parts = name.split(".")
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(parts, others, strict=False))))
        if common in (len(parts), len(others)):
            continue
        in_dict = common > 0 and isinstance(model.get_submodule(".".join(parts[:common])), nn.ModuleDict)
        named = [parts[common - 1]] if in_dict else [parts[common], others[common]]
        if all(_NAME_OF_ONE_HEAD.search(each.lower()) for each in named):
            beside[".".join(parts[: common + 1])] = name
    return list(beside.values())


def _whole_model(model: nn.Module, frozen: Collection[nn.Module]) -> tuple[nn.Module, ...]:
    """Take a model in which nothing could be a head. A LightningModule may not have built its head yet."""
    whole = unwrap(model)
    if is_lightning_module(whole) or head_candidates(model) or next(whole.parameters(), None) is None:
        return ()
    return (whole,) if width_of(whole) is not None else ()


def _only(model: nn.Module, frozen: Collection[nn.Module], found: list[tuple[nn.Module, ...]]) -> tuple[nn.Module, ...]:
    distinct = list(dict.fromkeys(heads for heads in found if heads))
    if len(distinct) > 1 and not set(distinct[1:]) <= set(copies_of(model, distinct[0], of_equal_weights=True)):
        names = ", ".join(repr(name) for heads in distinct for name in head_names(model, heads))
        raise SeveralHeadsError(
            f"Found several modules that could be the classification head: {names}. {remedy(model, frozen)}", distinct
        )
    return distinct[0] if distinct else ()


def _named_children(parent: nn.Module) -> list[tuple[nn.Module, ...]]:
    """Return the heads among the children of ``parent``. A pair is one entry."""
    if pair := _pair(parent):
        return [pair]
    children = [child for name, child in parent.named_children() if name in _NAMES]
    each = chain.from_iterable(child.values() if isinstance(child, nn.ModuleDict) else [child] for child in children)
    return [_resolve(child) for child in each]


def _pair(parent: nn.Module) -> tuple[nn.Module, ...]:
    children = dict(parent.named_children())
    for first, second in _PAIRS:
        if first in children and second in children:
            heads = (*_resolve(children[first]), *_resolve(children[second]))
            if len(heads) == 2:
                return heads
    return ()


def _resolve(module: nn.Module) -> tuple[nn.Module, ...]:
    """Return the heads that ``module`` stands for: itself, or what a container holds."""
    if layer_width(module) is not None:
        return (module,)
    if isinstance(module, nn.ModuleList):
        return tuple(chain.from_iterable(map(_resolve, module)))
    return _pair(module) or tuple(head_candidates(module).values())[-1:]


def _depth(name: str) -> int:
    return len(name.split(".")) if name else 0
