"""Run a model as in evaluation and leave it as it was."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_calibft.head.offset import AbsentClassOffset

# Of what every module has, these two change with its buffers. The rest is not a forward's to write.
_MODULE_ATTRIBUTES = vars(nn.Module()).keys() - {"_buffers", "_non_persistent_buffers_set"}
_GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, without gradients and without its compiled code, and leave it as it was.

    Modes are set through the ``train`` and ``eval`` methods of the modules, which may do more than that: keep BatchNorm
    as it is, or merge adapters. Afterwards the modes, the parameters, the random state and what a forward writes in any
    mode, such as counters, queues and observed ranges, are what they were before. The calibration may be changed inside
    and stays so.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> with evaluation(model):
        ...     model.training, model(torch.ones(1, 4)).requires_grad
        (False, False)
        >>> model.training
        True
    """
    with unchanged(model), _eval_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the random state and what forwards of ``model`` write: its buffers and other attributes.

    Attributes are restored by name, tensors by value, lists, dicts and sets by what they hold, and random number
    generators by their state.
    """
    attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
    contents: list[tuple[Any, Any]] = []
    values: list[tuple[Tensor, Tensor]] = []
    generators: list[tuple[Callable[[Any], Any], Any]] = []
    for module in model.modules():
        if isinstance(module, AbsentClassOffset):
            continue
        own = {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}
        attributes.append((vars(module), own))
        contents += [(value, copy.copy(value)) for value in own.values() if type(value) in _CONTAINERS]
        generators += [_state_of(value) for value in own.values() if isinstance(value, _GENERATORS)]
        values += [
            (tensor, tensor.detach().clone())
            for tensor in chain(own.values(), module.buffers(recurse=False))
            if isinstance(tensor, Tensor) and _can_be_copied(tensor)
        ]
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with _torch_random_state_kept(model):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for attributes_now, before in attributes:
            for name in attributes_now.keys() - before.keys() - _MODULE_ATTRIBUTES:
                del attributes_now[name]
            attributes_now.update(before)
        for container, content in contents:
            container.clear()
            container.update(content) if hasattr(container, "update") else container.extend(content)
        for restore, state in generators:
            restore(state)
        _restore(values)


def _state_of(generator: Any) -> tuple[Callable[[Any], Any], Any]:
    """Return how to restore a random number generator, and its state."""
    if isinstance(generator, torch.Generator):
        return generator.set_state, generator.get_state()
    if isinstance(generator, random.Random):
        return generator.setstate, generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return generator.set_state, generator.get_state()
    return partial(setattr, generator.bit_generator, "state"), generator.bit_generator.state


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    # What `eval` may change besides the mode, as where it merges adapters. Undoing that is not exact.
    parameters = chain.from_iterable(
        part.parameters(recurse=False)
        for module, _ in modes
        if _has_own_train(module)
        for part in (module, *module.children())
    )
    values = [(each, each.detach().clone()) for each in dict.fromkeys(parameters) if _can_be_copied(each)]
    if any(training for _, training in modes):
        model.eval()
    values = [(parameter, value) for parameter, value in values if not _is_equal(parameter, value)]
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training and _has_own_train(module):
                module.train(training)
        for module, training in modes:
            module.training = training
        _restore(values)


def _has_own_train(module: nn.Module) -> bool:
    own = (getattr(module.train, "__func__", None), getattr(module.eval, "__func__", None))
    return own != (nn.Module.train, nn.Module.eval)


def _torch_random_state_kept(model: nn.Module) -> Any:
    tensors = chain(model.parameters(), model.buffers())
    devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in devices), "cuda")
    return torch.random.fork_rng([device.index for device in devices if device.type == kind], device_type=kind)


def _can_be_copied(tensor: Tensor) -> bool:
    return not is_lazy(tensor) and not tensor.is_meta and tensor.layout == torch.strided


def _local_part(tensor: Tensor) -> Tensor:
    """Return the part of a distributed tensor that this process holds, or a plain one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_equal(tensor: Tensor, value: Tensor) -> bool:
    return torch.equal(_local_part(tensor), _local_part(value))


def _restore(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Put values back in place where they have changed: a write would disturb a backward pass that needs them."""
    with torch.no_grad():
        for tensor, value in values:
            if tensor.shape != value.shape:
                tensor.resize_(value.shape)
            if not _is_equal(tensor, value):
                tensor.copy_(value)
