"""Find the classification head of a model by static rules, without data."""

from __future__ import annotations

from itertools import chain

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_calibft.head.offset import attached_heads

Head = nn.Module | tuple[nn.Module, ...]

# Attributes under which torchvision, timm, Hugging Face and most others keep the head.
_NAMES = ("fc", "classifier", "head", "heads", "score", "classification_head", "last_linear")
# Attributes of heads whose logits are averaged.
_PAIRS = (("head", "head_dist"), ("cls_classifier", "distillation_classifier"), ("classifier", "classifier_distill"))


class HeadNotFoundError(ValueError):
    """The model has no classification head, or not yet."""


def find_head(model: nn.Module, head: str | nn.Module | None = None) -> Head:
    """Find the module whose output is the logits.

    The rules, in order: heads that carry a calibration already; ``model``, if it is a head; timm's
    ``get_classifier()``; well known attribute names; the last ``Linear``, if no other has its width. Names only guess:
    :func:`probe` checks with data.

    Args:
        model: Any module, also one that wraps the classifier: a LightningModule, a compiled or an averaged model.
        head: The head, if the rules fail: its dotted name in ``model`` (``"model.fc"``) or the module itself. A
            container stands for the last linear layer in it. Any other module whose output is the logits can be it,
            if it has the attribute ``out_features``.

    Returns:
        The head, or a tuple of heads that together give the logits, as the pairs of distilled models.

    Raises:
        HeadNotFoundError: If there is none, or it is not built yet.
        ValueError: If there are several, or ``head`` is not a head of ``model``.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
        >>> find_head(model)
        Linear(in_features=16, out_features=5, bias=True)
    """
    if head is not None:
        heads = _explicit(model, head)
    else:
        rules = (_attached, _itself, _timm, _well_known, _last_linear)
        heads = next((found for rule in rules if (found := rule(model))), ())
    if not heads:
        raise HeadNotFoundError(f"Found no classification head in {type(model).__name__}. {remedy(model)}")
    if lazy := [module for module in heads if any(map(is_lazy, module.parameters()))]:
        name = head_names(model, lazy[0])[0]
        raise HeadNotFoundError(
            f"The classification head {name!r} has no weights yet. Run one batch through the model to build it."
        )
    return heads[0] if len(heads) == 1 else heads


def as_tuple(head: Head) -> tuple[nn.Module, ...]:
    """Return the modules of a head as a tuple, one or several."""
    return head if isinstance(head, tuple) else (head,)


def num_classes(head: Head) -> int:
    """Return the width of a head, the number of classes.

    Raises:
        ValueError: If it cannot be told, or the modules of a set differ in it.

    Example:
        >>> num_classes(nn.Linear(16, 5))
        5
    """
    widths = {_width(module) for module in as_tuple(head)}
    if len(widths) > 1 or None in widths:
        got = " and ".join(f"{type(module).__name__} of width {_width(module)}" for module in as_tuple(head))
        raise ValueError(
            f"Expected argument `head` to be a Linear, a 1x1 Conv2d or a module with an integer attribute"
            f" `out_features`, all of one width, but got {got}."
        )
    return widths.pop()  # type: ignore[return-value]


def head_names(model: nn.Module, head: Head) -> tuple[str, ...]:
    """Return the dotted names in ``model`` of the modules of a head.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
        >>> head_names(model, find_head(model))
        ('1',)
    """
    names = {module: name for name, module in model.named_modules()}
    return tuple(names[module] for module in as_tuple(head))


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return every module that could be a head, by dotted name, in the order of registration."""
    return {name: module for name, module in model.named_modules() if _is_linear(module)}


def remedy(model: nn.Module, limit: int = 10) -> str:
    """Name the candidates, the last ``limit`` of them, and the argument that chooses one."""
    found = candidates(model)
    if not found:
        return "It has no Linear and no 1x1 Conv2d. Build the head first, or pass the module: `head=model.my_head`."
    shown = list(found.items())[-limit:]
    listed = ", ".join(f"{name!r} ({type(module).__name__}, width {_width(module)})" for name, module in shown)
    more = f" (the last {limit} of {len(found)})" if len(found) > limit else ""
    return f'Candidates{more}: {listed}. Name one, for example `head="{shown[-1][0]}"`.'


def _explicit(model: nn.Module, head: str | nn.Module) -> tuple[nn.Module, ...]:
    if isinstance(head, str):
        try:
            module = model.get_submodule(head)
        except AttributeError:
            raise HeadNotFoundError(
                f"Expected argument `head` to name a module of {type(model).__name__}, but got {head!r}."
                f" {remedy(model)}"
            ) from None
    elif isinstance(head, nn.Module):
        module = head
        if all(module is not other for other in model.modules()):
            raise ValueError(
                f"Expected argument `head` to be a module of {type(model).__name__}, but got a"
                f" {type(head).__name__} that is not in it."
                f" {remedy(model)}"
            )
    else:
        raise TypeError(f"Expected argument `head` to be a dotted name or a module, but got {head!r}.")
    if not (heads := _resolve(module)):
        raise ValueError(
            f"Expected argument `head` to be a Linear, a 1x1 Conv2d, a container of one or a module with an integer"
            f" attribute `out_features`, but got {type(module).__name__}. {remedy(model)}"
        )
    return heads


def _attached(model: nn.Module) -> tuple[nn.Module, ...]:
    return tuple(attached_heads(model).values())


def _itself(model: nn.Module) -> tuple[nn.Module, ...]:
    return (model,) if _width(model) is not None else ()


def _timm(model: nn.Module) -> tuple[nn.Module, ...]:
    """Ask the shallowest modules that have timm's ``get_classifier``."""
    owners = [(name, module) for name, module in model.named_modules() if hasattr(module, "get_classifier")]
    shallowest = min((_depth(name) for name, _ in owners), default=0)
    found = []
    for name, owner in owners:
        if _depth(name) > shallowest:
            continue
        try:
            classifier = owner.get_classifier()
        except Exception:  # Some models without a head raise, each its own error.
            continue
        parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
        found.append(tuple(chain.from_iterable(_resolve(part) for part in parts if isinstance(part, nn.Module))))
    return _only(model, found)


def _well_known(model: nn.Module) -> tuple[nn.Module, ...]:
    """Look for the well known names, no deeper than the shallowest linear layer."""
    modules = list(model.named_modules())
    shallowest = min((_depth(name) for name, module in modules if _is_linear(module)), default=0)
    for depth in range(1, shallowest + 1):
        parents = [module for name, module in modules if _depth(name) == depth - 1]
        if heads := _only(model, [found for parent in parents for found in _named_children(parent)]):
            return heads
    return ()


def _last_linear(model: nn.Module) -> tuple[nn.Module, ...]:
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if linears and sum(_width(module) == _width(linears[-1]) for module in linears) > 1:
        raise ValueError(f"Found several modules that could be the classification head. {remedy(model)}")
    return tuple(linears[-1:])


def _only(model: nn.Module, found: list[tuple[nn.Module, ...]]) -> tuple[nn.Module, ...]:
    distinct = list(dict.fromkeys(heads for heads in found if heads))
    if len(distinct) > 1:
        names = ", ".join(repr(name) for heads in distinct for name in head_names(model, heads))
        raise ValueError(f"Found several modules that could be the classification head: {names}. {remedy(model)}")
    return distinct[0] if distinct else ()


def _named_children(parent: nn.Module) -> list[tuple[nn.Module, ...]]:
    """Return the heads among the children of ``parent``, a pair as one."""
    if pair := _pair(parent):
        return [pair]
    return [_resolve(child) for name, child in parent.named_children() if name in _NAMES]


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
    if _width(module) is not None:
        return (module,)
    if isinstance(module, nn.ModuleList):
        return tuple(chain.from_iterable(map(_resolve, module)))
    return _pair(module) or tuple(candidates(module).values())[-1:]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def _width(module: nn.Module) -> int | None:
    if isinstance(module, nn.Conv2d):
        return module.out_channels if _is_linear(module) else None
    # Not `getattr`, which wrappers forward to the module that they wrap.
    width = vars(module).get("out_features")
    return width if isinstance(width, int) else None


def _depth(name: str) -> int:
    return len(name.split(".")) if name else 0
