"""Check with data that a head gives the logits of its model."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from lightning_calibft.head.evaluation import evaluation, unchanged
from lightning_calibft.head.layers import (
    forward_name,
    frozen_networks,
    head_candidates,
    is_channels_first,
    is_lightning_module,
    is_linear,
    num_classes,
    unwrap,
    width_of,
)
from lightning_calibft.head.offset import attached_copies, attached_heads, is_attached, like_dtensor, offset_of
from lightning_calibft.head.output import get_logits, replace_logits
from lightning_calibft.head.record import class_axis_last, gather_dtensor

Forward = Callable[[], Any]


class NotFiniteError(ValueError):
    """The output of the head is NaN or infinite, so the probe cannot judge it."""


def probe(forward: Forward, model: nn.Module) -> None:
    r"""Check that adding an offset to the output of the attached head moves the model's logits by that offset.

    A random offset :math:`r` added to the output :math:`z_k` of head :math:`k` changes the logits by :math:`\Delta_k`.
    The heads pass if :math:`\Delta_k = a_k r` and :math:`\sum_k a_k = 1`, and if :math:`\sum_k a_k z_k` are the logits.
    The mean over the classes is subtracted first, so a softmax or log-softmax after the head is allowed. A whole model
    that gives probabilities does not pass, because gamma would be added to these.

    The model runs as in :func:`~lightning_calibft.head.evaluation.evaluation`. A head that passes is proved:
    :func:`is_proved` is then true of the model until its structure changes.

    Args:
        forward: Runs ``model`` on some inputs and returns its output: the logits ``(N, C)`` or their (log-)softmax,
            a tuple or list with them, or an object or mapping that has them as ``logits`` or ``logits_per_image``.
        model: A model that :func:`attach` has seen.

    Raises:
        ValueError: If the head does not give the logits. The message names the head that does, if there is one.

    Example:
        >>> from lightning_calibft.head import attach
        >>> model = attach(nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.LogSoftmax(dim=-1)))
        >>> probe(lambda: model(torch.randn(3, 16)), model)
    """
    heads = attached_heads(model)
    if not heads:
        raise ValueError("Expected argument `model` to carry a calibration. Call `attach(model)` first.")
    with evaluation(model):
        base = _logits(forward, model)
        effects = {head: _effect(forward, model, base, head) for head in heads.values()}
        if not all(output.isfinite().all() for effect in effects.values() for output in effect.outputs):
            raise NotFiniteError(f"Expected the head of {type(model).__name__} to give finite logits, but it does not.")
        if base.isnan().any():
            raise ValueError(f"Expected the logits of {type(model).__name__} to be numbers, but got NaN.")
        # The heads of one copy of the model give the logits, or all heads do so together.
        choices = dict.fromkeys((*attached_copies(model), tuple(effects)))
        problems = {choice: _problem([effects[head] for head in choice], base) for choice in choices}
        if found := next((choice for choice, problem in problems.items() if problem is None), ()):
            _store_proof(model, effects, found)
            return
        called = [choice for choice in choices if all(effects[head].outputs for head in choice)]
        meant = (called or list(choices))[0]
        others = {
            name: _effect(forward, model, base, module)
            for name, module in head_candidates(model).items()
            if not is_attached(module) and num_classes(module) == base.shape[-1]
        }
        whole = _whole_remedy(forward, model, base)
    names = " and ".join(repr(name or "forward") for name, head in heads.items() if head in meant)
    raise ValueError(
        f"Expected the head {names} of {type(model).__name__} to give the logits, but {problems[meant]}"
        f" {_remedy(model, others, base, whole)}"
    )


def is_proved(model: nn.Module) -> bool:
    """Return whether :func:`probe` has passed the attached head of ``model``, which has the same modules since then.

    What the modules compute may have changed, as when a scale after the head is trained. See :func:`gives_output`.
    Copies of a model and loaded ones are not proved.

    Example:
        >>> from lightning_calibft.head import attach
        >>> model = attach(nn.Sequential(nn.Flatten(), nn.Linear(16, 5)))
        >>> is_proved(model)
        False
        >>> probe(lambda: model(torch.randn(3, 16)), model)
        >>> is_proved(model)
        True
    """
    heads, structure = attached_heads(model), _structure(model)
    return bool(heads) and all(offset_of(head).proved_structure == structure for head in heads.values())


def gives_output(model: nn.Module, logits: Tensor, output: Any) -> bool:
    """Return whether the recorded logits of the attached head, with gamma, are the logits in an output of ``model``.

    This shows without another forward whether what :func:`probe` found still holds. As there, the mean over the classes
    is left out.

    Args:
        model: A model that is proved, in the mode in which it gave the output.
        logits: The raw logits of the same forward, as a :class:`LogitRecorder` gives them.
        output: What the forward returned, as in :func:`probe`.

    Example:
        >>> from lightning_calibft.head import set_gamma
        >>> from lightning_calibft.head.record import record_logits
        >>> model = set_gamma(nn.Sequential(nn.Linear(16, 5), nn.LogSoftmax(dim=-1)).eval(), 2.5, seen_classes=[0, 1])
        >>> with record_logits(model) as records:
        ...     output = model(torch.randn(3, 16))
        >>> gives_output(model, records[0], output), gives_output(model, records[0], 1.5 * output)
        (True, False)
    """
    try:
        actual = gather_dtensor(get_logits(output).detach()).cpu()
    except ValueError:
        return False
    if not actual.is_floating_point():
        return False
    child = next(child for child in map(offset_of, attached_heads(model).values()) if child.coefficient != 0)
    expected = logits.cpu().double()
    if not child.training:
        expected = expected + (child.offset * child.mask).cpu()
    return _difference(expected, actual, _epsilon(logits, actual)) is None


class _Effect(NamedTuple):
    """How an offset at the output of one head changes the logits."""

    outputs: list[Tensor]  # of each call in the forward, before the offset
    coefficient: float = 0.0
    residual: float = math.inf  # relative to the offset, as the two tolerances
    coefficient_tolerance: float = 0.0
    residual_tolerance: float = 0.0
    adds_to_probabilities: bool = False


def _logits(forward: Forward, model: nn.Module) -> Tensor:
    """Return the logits of one forward. Each call sees the same random numbers and the same buffers."""
    with unchanged(model):
        output = forward()
    logits = get_logits(output)
    if not logits.is_floating_point() or logits.ndim < 2:
        raise ValueError(f"Expected the output of {type(model).__name__} to hold logits, but got {type(output)}.")
    return gather_dtensor(logits.detach()).cpu()  # Some devices have no float64.


def _effect(forward: Forward, model: nn.Module, base: Tensor, head: nn.Module) -> _Effect:
    outputs: list[Tensor] = []
    channels_first = is_channels_first(head)
    offset = _random_offset(num_classes(head))
    # Larger than the logits, so that an activation after the head is noticed, unless a softmax would underflow.
    grow = not _are_probabilities(base)

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        logits = get_logits(output)
        on_cpu = gather_dtensor(logits).cpu()
        if grow and not outputs:
            offset.mul_(on_cpu.abs().max().clamp(min=1))
        outputs.append(class_axis_last(on_cpu, channels_first))
        shift = offset.to(logits.device)
        shifted = logits + like_dtensor(shift[:, None, None] if channels_first else shift, logits)
        return replace_logits(output, shifted.to(logits.dtype))

    handle = head.register_forward_hook(add)
    try:
        shifted = _logits(forward, model)
    finally:
        handle.remove()
    if not outputs or shifted.shape != base.shape or base.shape[-1] != len(offset):
        return _Effect(outputs)
    before, after = _log_space(base), _log_space(shifted)
    valid = before.isfinite() & after.isfinite()
    delta = _centered(after - before, valid)
    expected = _centered(offset.to(delta).expand_as(delta), valid)
    coefficient = (delta * expected).sum() / (expected**2).sum()
    scale = expected.abs().max()
    rounding = _epsilon(outputs[0], base) * (_largest(before, valid) + _largest(after, valid)) / scale
    return _Effect(
        outputs,
        coefficient.item(),
        ((delta - coefficient * expected).abs().max() / scale).item(),
        max(1e-3, 4 * _epsilon(outputs[0], base)),
        max(1e-3, 8 * rounding.item()),
        not is_linear(head) and _are_probabilities(outputs[0]),
    )


def _problem(effects: list[_Effect], base: Tensor) -> str | None:
    """Return in words why the heads do not give the logits, or ``None`` if they do."""
    calls = [len(effect.outputs) for effect in effects]
    if min(calls) == 0:
        return "the forward never calls it. Its weights may be used without it, as by `F.linear`."
    if max(calls) > 1:
        return f"one forward calls it {max(calls)} times, so its output is not the logits of one batch."
    if any(effect.residual == math.inf for effect in effects):
        return f"the output of the model has another number of classes: its shape is {tuple(base.shape)}."
    if any(effect.adds_to_probabilities for effect in effects):
        return "its output is probabilities, while gamma is added to logits, before the softmax."
    total = sum(effect.coefficient for effect in effects)
    # Not `>`, which is false for NaN.
    if abs(total - 1) <= max(effect.coefficient_tolerance for effect in effects) and all(
        effect.residual <= effect.residual_tolerance for effect in effects
    ):
        expected = sum((effect.coefficient * effect.outputs[0].double() for effect in effects), torch.zeros(()))
        return _difference(expected, base, _epsilon(base, *(effect.outputs[0] for effect in effects)))
    if all(effect.coefficient == effect.residual == 0 for effect in effects):
        return "its output does not reach them (0 times). It may be an auxiliary head, or unused."
    residual = max(effect.residual for effect in effects)
    coefficients = " + ".join(f"{effect.coefficient:.4g}" for effect in effects)
    return (
        f"an offset added to its output moves them by {coefficients} times that offset instead of once, with a residual"
        f" of {residual:.2g}. Something after it scales, clips or replaces its output."
    )


def _difference(expected: Tensor, output: Tensor, resolution: float) -> str | None:
    """Return in words how the logits of the model differ from those of its heads, or ``None`` if they do not."""
    if expected.shape != output.shape:
        return f"its output has the shape {tuple(expected.shape)} and the output of the model {tuple(output.shape)}."
    actual = _log_space(output)
    valid = expected.isfinite() & actual.isfinite()
    difference = _centered(actual - expected, valid).abs().max()
    tolerance = max(1e-3, 8 * resolution)
    if difference <= tolerance * (_largest(expected, valid) + _largest(actual, valid)):
        return None
    return (
        f"the logits of the model differ from its output by up to {difference.item():.2g}. Something is added after it,"
        " so gamma cannot be measured at it."
    )


def _store_proof(model: nn.Module, effects: dict[nn.Module, _Effect], found: tuple[nn.Module, ...]) -> None:
    """Let recorders weigh the heads as the model does, and mark each as proved."""
    equal, structure = 1 / len(found), _structure(model)
    for head, effect in effects.items():
        child = offset_of(head)
        if head in found:
            child.place = found.index(head)  # copies may give the logits together
            within_rounding = abs(effect.coefficient - equal) <= effect.coefficient_tolerance
            child.coefficient = equal if within_rounding else effect.coefficient
        else:
            child.coefficient = 0.0
        # A head that runs in the forward for something else may not get gamma.
        child.left_out = head not in found and bool(effect.outputs)
        child.proved_structure = structure


def _structure(model: nn.Module) -> tuple[Any, ...]:
    # Not the addresses of the modules, which later ones may get.
    return tuple((name, type(module), ref(module)) for name, module in model.named_modules())


def _remedy(model: nn.Module, others: dict[str, _Effect], base: Tensor, whole: str, limit: int = 10) -> str:
    """Return a sentence that names the candidate that gives the logits, or how each changes them."""
    likely = head_candidates(model, frozen_networks(model))
    if better := [name for name, effect in others.items() if _problem([effect], base) is None]:
        return f'The head is {better[-1]!r}: pass `head="{better[-1]}"`.'
    shown = [(name, effect) for name, effect in others.items() if name in likely][-limit:]
    listed = ", ".join(f"{name!r} ({effect.coefficient:.4g} times)" for name, effect in shown) or "none"
    return f"Other candidates of that width: {listed}.{whole}"


def _whole_remedy(forward: Forward, model: nn.Module, base: Tensor) -> str:
    """Return how to make the output of the model, or of the part that ``forward`` runs, the head."""
    found: list[tuple[str, nn.Module]] = []

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        with suppress(ValueError):
            logits = get_logits(output).cpu()
            if logits.shape == base.shape and torch.allclose(logits, base):
                found.append((name, module))

    handles = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules()]
    try:
        _logits(forward, model)
    finally:
        for handle in handles:
            handle.remove()
    # The outermost module ends last. A step of a LightningModule may call the model in it and not the module itself.
    outermost = found[-1:] + [part for part in found if not is_lightning_module(part[1])]
    if not outermost or is_attached(unwrap(outermost[-1][1])):
        return " Let the forward return logits or their `log_softmax`." if _are_probabilities(base) else ""
    name, part = outermost[-1]
    argument = f'`head="{forward_name(name)}"`'
    if _are_probabilities(base):
        return f" If no layer gives them, let the forward return logits, or their `log_softmax`, and pass {argument}."
    text = f" If no layer gives the logits, pass {argument}, which stands for the output of the whole."
    if width_of(unwrap(part)) != base.shape[-1]:
        text += f" Set `num_classes = {base.shape[-1]}` on that {type(part).__name__} first."
    return text


def _random_offset(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (width,), generator=generator) * 2 - 1
    return signs * (1 + torch.rand(width, generator=generator, dtype=torch.float32))


def _are_probabilities(logits: Tensor) -> bool:
    """Return whether each row is non-negative and sums to one."""
    values = logits.double()
    return bool((values >= 0).all() and (values.sum(dim=-1) - 1).abs().max() < 1e-2)


def _log_space(logits: Tensor) -> Tensor:
    """Return logits as they are and the logarithm of probabilities, minus infinity where they underflow."""
    if not _are_probabilities(logits):
        return logits.double()
    return torch.where(logits < torch.finfo(logits.dtype).tiny, 0, logits.double()).log()


def _centered(values: Tensor, valid: Tensor) -> Tensor:
    """Subtract the mean of each row over its valid entries; the others become zero."""
    values = torch.where(valid, values, 0)
    mean = values.sum(dim=-1, keepdim=True) / valid.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.where(valid, values - mean, 0)


def _largest(values: Tensor, valid: Tensor) -> Tensor:
    """Return the _largest magnitude of the valid entries."""
    return torch.where(valid, values, 0).abs().max()


def _epsilon(*tensors: Tensor) -> float:
    """Return the coarsest resolution of the tensors' dtypes."""
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors)
