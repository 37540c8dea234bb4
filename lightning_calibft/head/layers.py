"""Which modules of a model could be its classification head, and how wide they are."""

from __future__ import annotations

from collections.abc import Collection, Set

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from lightning_calibft._format import CHILD_NAME

Head = nn.Module | tuple[nn.Module, ...]

# Where models without `out_features` store their number of classes.
_MODEL_WIDTHS = ("num_classes", "num_labels")


def is_linear(module: nn.Module) -> bool:
    """Return whether ``module`` is a ``Linear`` or a 1x1 ``Conv2d``."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def is_layer(module: nn.Module) -> bool:
    """Return whether ``module`` is linear, an adapter of PEFT, or has an ``out_features`` and tensors of its own."""
    if is_linear(module):
        return True
    return layer_width(module) is not None and (_has_tensors(module) or base_layer(module) is not module)


def base_layer(module: nn.Module) -> nn.Module:
    """Return the linear layer that an adapter of PEFT holds, or ``module`` itself."""
    layer = dict(module.named_children()).get("base_layer")
    return layer if layer is not None and is_linear(layer) and layer_width(module) is not None else module


def is_channels_first(module: nn.Module) -> bool:
    """Return whether the class axis of the output is the third from the end, not the last."""
    return isinstance(base_layer(module), nn.Conv2d)


def layer_width(module: nn.Module) -> int | None:
    """Return the width of a layer: of one with an integer ``out_features``, or of a 1x1 ``Conv2d``."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels if is_linear(module) else None
    return _own_width(module, "out_features")


def width_of(module: nn.Module) -> int | None:
    """Return the width of a layer, or of the output of a whole model that states it or is calibrated."""
    widths = (layer_width(module), *(_own_width(module, name) for name in _MODEL_WIDTHS))
    labels = getattr(vars(module).get("config"), "num_labels", None)  # of Hugging Face
    mask = getattr(dict(module.named_children()).get(CHILD_NAME), "mask", None)
    calibrated = None if mask is None else len(mask)
    return next((width for width in (*widths, labels, calibrated) if isinstance(width, int)), None)


def as_tuple(head: Head) -> tuple[nn.Module, ...]:
    """Return the modules of a head as a tuple, one or several."""
    return head if isinstance(head, tuple) else (head,)


def num_classes(head: Head) -> int:
    """Return the width of a head, the number of classes.

    Raises:
        ValueError: If it is unknown, or if the modules of a head differ in it.

    Example:
        >>> num_classes(nn.Linear(16, 5))
        5
    """
    widths = {width_of(module) for module in as_tuple(head)}
    if len(widths) > 1 or None in widths:
        got = " and ".join(f"{type(module).__name__} of width {width_of(module)}" for module in as_tuple(head))
        raise ValueError(
            f"Expected argument `head` to be a Linear, a 1x1 Conv2d or a module with an integer attribute"
            f" `out_features` or `num_classes`, all of one width, but got {got}."
        )
    return widths.pop()  # type: ignore[return-value]


def head_names(model: nn.Module, head: Head) -> tuple[str, ...]:
    """Return the dotted names in ``model`` of the modules of a head.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
        >>> head_names(model, model[1])
        ('1',)
    """
    names = {module: name for name, module in model.named_modules()}
    return tuple(names[module] for module in as_tuple(head))


def head_candidates(model: nn.Module, skipped: Collection[nn.Module] = ()) -> dict[str, nn.Module]:
    """Return every module that could be a head, by dotted name, in the order of registration.

    Parts of a layer do not count, nor does the original of a layer that PEFT trains in full, nor what is in one of the
    ``skipped`` modules.
    """
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules(set(skipped)):
        prefix = f"{name}." if name else ""
        if name.startswith(inside):
            continue
        if is_layer(module):
            found[name] = module
            inside += (prefix,) if prefix else ()
        elif {"original_module", "modules_to_save"} <= dict(module.named_children()).keys():
            inside += (f"{prefix}original_module",)
    return found


def frozen_networks(model: nn.Module, trained: Collection[nn.Parameter] = ()) -> set[nn.Module]:
    """Return the networks in a model that are not trained, such as a teacher, if a layer outside could be a head.

    A frozen layer is no network: it may well be the head. Without anything to train, no network counts as frozen.

    Args:
        model: The model.
        trained: The parameters that are trained. If empty, those that require a gradient.

    Example:
        >>> teacher = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5)).requires_grad_(False)
        >>> frozen_networks(nn.ModuleList([nn.Linear(8, 5), teacher])) == {teacher}
        True
    """
    trained = set(trained) or {parameter for parameter in model.parameters() if parameter.requires_grad}
    found = _untrained(model, trained) if trained else set()
    return found if head_candidates(model, found) else set()


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module in a compiled, parallel or averaged one, which gives the same output."""
    while True:
        if isinstance(module, (DataParallel, DistributedDataParallel, AveragedModel)):
            module = module.module
        elif (original := dict(module.named_children()).get("_orig_mod")) is not None:
            module = original
        else:
            return module


def is_lightning_module(module: nn.Module) -> bool:
    """Return whether ``module`` is a LightningModule, of whichever package."""
    return any(base.__name__ == "LightningModule" for base in type(module).__mro__)


def forward_name(name: str) -> str:
    """Return the argument `head` that stands for the output of the module called ``name``."""
    return f"{name}.forward" if name else "forward"


def remedy(model: nn.Module, frozen: Collection[nn.Module], limit: int = 10) -> str:
    """Return a sentence that lists the last ``limit`` candidates and shows the argument that chooses one."""
    found = head_candidates(model, frozen)
    whole = 'pass `head="forward"`, or `"model.forward"` of a part, if its whole output is the logits'
    if not found:
        return f"It has no Linear, no 1x1 Conv2d and no `out_features`. Build the head first, or {whole}."
    shown = list(found.items())[-limit:]
    listed = ", ".join(f"{name!r} ({type(module).__name__}, width {width_of(module)})" for name, module in shown)
    more = f" (the last {limit} of {len(found)})" if len(found) > limit else ""
    return f'Candidates{more}: {listed}. Name one, for example `head="{shown[-1][0]}"`, or {whole}.'


def _own_width(module: nn.Module, name: str) -> int | None:
    # Not `getattr`, which wrappers forward to the module that they wrap.
    width = vars(module).get(name)
    return width if isinstance(width, int) and width > 0 else None


def _untrained(model: nn.Module, trained: Set[nn.Parameter]) -> set[nn.Module]:
    found: set[nn.Module] = set()
    for module in model.children():
        parameters = list(module.parameters())
        if not trained.isdisjoint(parameters):
            found |= _untrained(module, trained)
        elif sum(is_lazy(parameter) or parameter.ndim > 1 for parameter in parameters) > 1:
            found.add(module)
    return found


def _has_tensors(module: nn.Module) -> bool:
    tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return bool(tensors) or nn.utils.parametrize.is_parametrized(module)
