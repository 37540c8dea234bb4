"""Find out how a model runs on a batch, as its author means it, so that the logits of the batch can be recorded."""

from __future__ import annotations

import copy
import inspect
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_calibft.calibration.batch_reader import UNPACK_REMEDY, Arguments, BatchReader
from lightning_calibft.head.evaluation import unchanged
from lightning_calibft.head.layers import is_layer, is_lightning_module, num_classes
from lightning_calibft.head.offset import attached_heads, offset_of
from lightning_calibft.head.output import tensors_in
from lightning_calibft.head.probe import HeadRefusedError, NotFiniteError, gives_output, is_proved, probe
from lightning_calibft.head.record import UnexpectedLogitsError, one_forward, record_logits

PROBE_ROWS = 4
REMEDY = "Pass the `unpack_batch` that fits this model, or another `head`."
STEPS = ("validation_step", "training_step")
OTHER_INPUTS = "other inputs"
Context = Callable[[], AbstractContextManager[Any]]


class BatchCall(nn.Module):
    """One way to run a model on a batch: its ``forward`` with a part of the batch, or a step of a LightningModule.

    Nothing is logged, and no optimizer steps.

    Args:
        model: The model. It does not change.
        name: What is called, for errors.
        arguments: Returns what to pass for a batch.
        part: The dotted name of the module in ``model`` that is called.
        step: The name of the step that is called instead.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        arguments: Callable[[Any], Arguments],
        part: str = "",
        step: str | None = None,
    ) -> None:
        super().__init__()
        self.model = model  # a child, so that `torch.func.functional_call` runs it with other weights
        self.name = name
        self._arguments = arguments
        self.is_of_part = bool(part)
        self._part = part
        self._step = step
        self._to_mute = [module for module in model.modules() if is_lightning_module(module)]

    @override
    def forward(self, batch: Any, rows: int | None = None) -> Any:
        """Return the output of the model, or what a step has returned, logged and differentiated.

        Args:
            batch: The batch.
            rows: Pass only this many samples, if the model takes a single tensor.
        """
        arguments, keywords = self._arguments(_copied(batch, lambda tensor: tensor))  # a step may take it apart
        with _muted(self._to_mute) as values:
            if self._step is not None:
                return getattr(self.model, self._step)(*arguments, **keywords), values
            if rows is not None and len(arguments) == 1 and isinstance(arguments[0], Tensor) and not keywords:
                arguments = (arguments[0][:rows],)
            return self.model.get_submodule(self._part)(*arguments, **keywords)


class OwnForwardCall:
    """Watches how a training step calls ``forward``, since several parts of a batch may be what it takes.

    Args:
        model: A LightningModule, whose head is attached.
        reader: Splits batches.
        batch: The batch of the step, before the step.
    """

    def __init__(self, model: nn.Module, reader: BatchReader, batch: Any) -> None:
        part = _part_with_forward(model)
        self._ways: dict[str, set[Any]] = {}
        self._handle: RemovableHandle | None = None
        if part is not None:
            forward = model.get_submodule(part)
            with suppress(ValueError):  # where training mixes labels, the batch may have another form
                self._ways = {name: _identities(way) for name, way in reader.arguments(batch, forward).items()}
            self._handle = forward.register_forward_pre_hook(self._note, with_kwargs=True)
        self._chosen = offset_of(next(iter(attached_heads(model).values()))).proved_call
        self._met: list[tuple[set[Any], tuple[Any, ...]]] = []

    def stop(self) -> str | None:
        """Return the name of the :class:`BatchCall` that the step made.

        This is ``OTHER_INPUTS`` if the step has passed other tensors than those of the batch, and ``None`` if it did
        not call ``forward``.
        """
        if self._handle is not None:
            self._handle.remove()
        made = [name for name, way in self._ways.items() if any(way == tensors for tensors, _ in self._met)]
        if self._chosen in made or not self._met:
            return self._chosen or None
        return made[0] if made else OTHER_INPUTS

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) > 1 and isinstance(args[1], int):
            return  # a strategy that runs `training_step(batch, batch_idx)` through the module's own call
        self._met.append((_identities((args, kwargs)), (args, kwargs)))  # alive, so that no tensor takes its address


def logits_of_first_batch(
    model: nn.Module, batch: Any, target: Tensor, reader: BatchReader, context: Context = nullcontext
) -> tuple[BatchCall, Tensor]:
    """Return the way to run an attached model on batches, and the raw logits of this one.

    ``forward`` is called with the batch's inputs, or else with more of the batch. If it does not run, the way is a step
    of a LightningModule. If ``reader`` knows how the steps call ``forward``, this is the only way, or, if they prepare
    the inputs, ``forward`` must give the logits that a step gives. The head is probed, unless it is proved and still
    gives the output.

    Args:
        model: A model that :func:`attach` has seen, inside an :func:`evaluation`, which restores the random state.
        batch: A batch on the device of the model.
        target: The head's row of each sample.
        reader: Splits batches.
        context: A context around each forward.

    Raises:
        ValueError: If the head does not give the logits, or if the model does not run on the batch in any way.
    """
    forwards = _forward_calls(model, reader, batch)
    forwards = [call for call in forwards if call.name == reader.own_call] or forwards
    if is_proved(model):
        name = offset_of(next(iter(attached_heads(model).values()))).proved_call
        for call in (each for each in forwards if each.name == name and reader.own_call != OTHER_INPUTS):
            logits, output = _run(call, batch, target, context)
            if gives_output(model, logits, output):
                return call, logits
    steps, failures, odd = _step_calls(model), dict[str, Exception](), list[BatchCall]()
    truth, of_step = None, ""
    if reader.own_call == OTHER_INPUTS:
        truth, of_step = _logits_of_steps(steps, batch, target, context, failures)
    for call in forwards + [step for step in steps if step.name not in failures]:
        try:
            logits, _ = _run(call, batch, target, context)
            if truth is None or _are_equal(logits, truth):
                return call, _proved(call, batch, target, context)
            failures[call.name] = ValueError(f"gives other logits than `{of_step}`")
        except (HeadRefusedError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's code can raise anything
            failures[call.name] = error
            odd += [call] if isinstance(error, UnexpectedLogitsError) else []
    if odd:  # the probe says what is wrong with the head, or which heads give the logits together
        return odd[0], _proved(odd[0], batch, target, context)
    raise _no_call_error(model, failures) from next(iter(failures.values()), None)


@contextmanager
def _muted(modules: list[nn.Module]) -> Iterator[list[Any]]:
    """Let LightningModules log nothing and train nothing in the block. Yield what they would have logged.

    This holds for ``log``, ``log_dict`` and ``print``, for optimizers and schedulers, and for ``manual_backward``.
    ``all_gather`` gathers from this process only, since others may have no batch left.
    """
    values: list[Any] = []
    before = [{name: vars(module)[name] for name in _SILENT if name in vars(module)} for module in modules]
    for module in modules:
        vars(module).update({name: make(module, values) for name, make in _SILENT.items()})
    try:
        yield values
    finally:
        for module, own in zip(modules, before, strict=True):
            for name in _SILENT:
                vars(module).pop(name, None)
            vars(module).update(own)


def _noop(module: Any, values: list[Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: None


def _collector(module: Any, values: list[Any]) -> Callable[..., Any]:
    def collect(*args: Any, **kwargs: Any) -> None:
        for value in (*args, *kwargs.values()):
            values.append(torch.tensor(value) if isinstance(value, float) else value)

    return collect


def _optimizers(module: Any, values: list[Any]) -> Callable[..., Any]:
    def optimizers(*_: Any, **__: Any) -> Any:
        number = len(getattr(getattr(module, "_trainer", None), "optimizers", ())) or 1
        made = [torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.0) for _ in range(number)]
        for optimizer in made:
            optimizer.optimizer, optimizer.toggle_model = optimizer, nullcontext  # type: ignore[attr-defined]
        return made[0] if number == 1 else made

    return optimizers


def _lr_schedulers(module: Any, values: list[Any]) -> Callable[..., Any]:
    def lr_schedulers() -> Any:
        number = len(getattr(getattr(module, "_trainer", None), "lr_scheduler_configs", ())) or 1
        made = [SimpleNamespace(step=_noop(module, values), get_last_lr=lambda: [0.0]) for _ in range(number)]
        return made[0] if number == 1 else made

    return lr_schedulers


def _gather_alone(module: Any, values: list[Any]) -> Callable[..., Any]:
    return lambda data, *_, **__: apply_to_collection(data, Tensor, lambda tensor: tensor[None])


_SILENT: dict[str, Callable[[Any, list[Any]], Callable[..., Any]]] = {
    "log": _collector,
    "log_dict": _collector,
    "print": _noop,
    "manual_backward": _collector,
    "optimizers": _optimizers,
    "lr_schedulers": _lr_schedulers,
    "toggle_optimizer": _noop,
    "untoggle_optimizer": _noop,
    "clip_gradients": _noop,
    "all_gather": _gather_alone,
}


def _identities(arguments: Any) -> set[Any]:
    """Return what tells the tensors in arguments from others."""
    return {(tensor.data_ptr(), tensor.shape, tensor.dtype) for _, tensor in tensors_in(arguments)}


def _width(model: nn.Module) -> int:
    return num_classes(next(iter(attached_heads(model).values())))


def _forward_calls(model: nn.Module, reader: BatchReader, batch: Any) -> list[BatchCall]:
    part = _part_with_forward(model)
    if part is None:
        return []
    forward = model.get_submodule(part)
    ways = reader.arguments(batch, forward)
    return [BatchCall(model, name, partial(_of_way, reader, forward, name), part) for name in ways]


def _of_way(reader: BatchReader, forward: nn.Module, name: str, batch: Any) -> Arguments:
    return reader.arguments(batch, forward)[name]


def _part_with_forward(model: nn.Module) -> str | None:
    """Return the name of the module whose ``forward`` maps inputs to logits.

    This is the model. For a LightningModule without its own ``forward``, it is the part of it that contains the head,
    or ``None`` if this is the head.
    """
    if not _is_of_lightning(model, "forward"):
        return ""
    name, head = next(iter(attached_heads(model).items()))
    name = name.split(".")[0]
    part = model.get_submodule(name)
    return None if part is model or (part is head and is_layer(part)) else name


def _step_calls(model: nn.Module) -> list[BatchCall]:
    if not is_lightning_module(model):
        return []
    return [
        BatchCall(model, name, partial(_step_arguments, getattr(model, name)), step=name)
        for name in STEPS
        if not _is_of_lightning(model, name)
    ]


def _is_of_lightning(model: nn.Module, method: str) -> bool:
    """Return whether a LightningModule does not have its own ``forward`` or step."""
    # Compare by name: each package of Lightning has its own LightningModule class.
    function = getattr(model, method, None)
    package, name = (getattr(function, key, "") for key in ("__module__", "__qualname__"))
    return package.startswith(("lightning.", "pytorch_lightning.")) and name.startswith("LightningModule.")


def _step_arguments(step: Callable[..., Any], batch: Any) -> Arguments:
    """Return the batch and, as far as the step takes them, a batch index and the index of a loader."""
    parameters = inspect.signature(step).parameters.values()
    positional = [each for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    number = sum(each.default is each.empty or each.name == "batch_idx" for each in positional)
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        number = max(2, number)
    return (batch, 0, 0)[:number], {}


def _run(call: BatchCall, batch: Any, target: Tensor, context: Context) -> tuple[Tensor, Any]:
    """Return the raw logits of a batch and the output of the call."""
    with unchanged(call.model), record_logits(call.model) as records, context():
        output = _on_copy(call, batch)
    return one_forward(records, len(target), _width(call.model), REMEDY), output


def _on_copy(call: BatchCall, batch: Any, rows: int | None = None) -> Any:
    return call(_copied(batch, Tensor.clone), rows)  # training goes on with this batch, and a step may change its copy


def _copied(batch: Any, of_tensor: Callable[[Tensor], Tensor]) -> Any:
    """Return a batch in new containers, with what ``of_tensor`` returns for each tensor."""
    if isinstance(batch, (Tensor, Mapping, tuple, list)):
        return apply_to_collection(batch, Tensor, of_tensor)
    return copy.deepcopy(batch)


def _first_that_runs(
    steps: list[BatchCall], batch: Any, target: Tensor, context: Context, failures: dict[str, Exception]
) -> tuple[BatchCall, Tensor] | None:
    """Return the first step that runs the head once on a batch, and the logits that it gives."""
    for call in steps:
        try:
            return call, _run(call, batch, target, context)[0]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the user's code can raise anything
            failures[call.name] = error
    return None


def _logits_of_steps(
    steps: list[BatchCall], batch: Any, target: Tensor, context: Context, failures: dict[str, Exception]
) -> tuple[Tensor | None, str]:
    """Return the logits that the first step which runs gives, or ``None`` if they are random, and its name."""
    found = _first_that_runs(steps, batch, target, context, failures)
    if found is None:
        return None, ""
    call, logits = found
    torch.manual_seed(1)  # a step may augment or mix its inputs
    np.random.seed(1)
    random.seed(1)
    again, _ = _run(call, batch, target, context)
    return (logits if _are_equal(logits, again) else None), call.name


def _are_equal(logits: Tensor, others: Tensor) -> bool:
    logits, others = logits.double(), others.double()
    scale = float(logits.abs().amax().nan_to_num(1.0, 1.0).clamp(min=1e-3))
    return torch.allclose(logits, others, rtol=1e-2, atol=1e-2 * scale, equal_nan=True)


def _proved(call: BatchCall, batch: Any, target: Tensor, context: Context) -> Tensor:
    """Probe the head, and return the logits of the batch, as recorders now weigh the parts of the head."""
    calls = [call]
    if call.is_of_part and (found := _first_that_runs(_step_calls(call.model), batch, target, context, {})):
        calls.insert(0, found[0])  # the loss shows whether a part gives logits, or features that a step goes on with
    # The probe cannot judge a model that has diverged. The pass reports the batch.
    with context(), suppress(NotFiniteError):
        for each in calls:
            probe(partial(_on_copy, each, batch, PROBE_ROWS), call.model)
    for head in attached_heads(call.model).values():
        offset_of(head).proved_call = call.name
    return _run(call, batch, target, context)[0]


def _no_call_error(model: nn.Module, failures: dict[str, Exception]) -> ValueError:
    """Return the error for a model that does not run on a batch in any way."""
    shown = [name for name in failures if name not in STEPS][:1] + [name for name in STEPS if name in failures]
    told = "; ".join(f"`{name}` {_told(failures[name])}" for name in shown)
    if not told:
        told = "it has neither its own `forward` nor a step that runs"
    return ValueError(
        f"Could not read the logits of {type(model).__name__} on a batch: {told}. {UNPACK_REMEDY} `inputs` are what"
        " `forward` takes. Or define `forward`, which maps inputs to logits."
    )


def _told(error: Exception) -> str:
    """Return an error in words, with the line of the user's code that raised it."""
    text = str(error).strip().rstrip(".")
    if isinstance(error, ValueError) and not (frame := _users_frame(error)):
        return text
    frame = _users_frame(error)
    place = f" at {frame.filename}:{frame.lineno} (`{frame.line}`)" if frame is not None else ""
    return f"raised {type(error).__name__}{place}: {text}"


def _users_frame(error: Exception) -> traceback.FrameSummary | None:
    """Return the last place in an error's traceback that is in none of the libraries."""
    names = ("torch", "lightning", "pytorch_lightning", __name__.partition(".")[0], "torchmetrics", "timm")
    files = [getattr(sys.modules.get(name), "__file__", None) for name in names]
    inside = ("<frozen", *(os.path.dirname(file) + os.sep for file in files if file is not None))
    frames = traceback.extract_tb(error.__traceback__)
    return next((each for each in reversed(frames) if not each.filename.startswith(inside)), None)
