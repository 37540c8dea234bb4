"""Check with data that a head gives the logits of its model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
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
from lightning_calibft.head.output import LOGIT_NAMES, Path, get_logits, replace_logits, tensors_in
from lightning_calibft.head.record import class_axis_last, gather_dtensor

Forward = Callable[[], Any]


# Part of an error that is not final: the output may hold another tensor that the head does reach.
_UNREACHED = "its output does not reach them"


class NoLogitsError(ValueError):
    """The output of the model shows neither its logits nor a loss."""


class HeadRefusedError(ValueError):
    """The output of the head is not the logits."""


class NotFiniteError(ValueError):
    """The output of the head is NaN or infinite, so the probe cannot judge it."""


def probe(forward: Forward, model: nn.Module) -> None:
    r"""Check that adding an offset to the output of the attached head moves the model's logits by that offset.

    A random offset :math:`r` added to the output :math:`z_k` of head :math:`k` changes the logits by :math:`\Delta_k`.
    The heads pass if :math:`\Delta_k = a_k r` and :math:`\sum_k a_k = 1`, and if :math:`\sum_k a_k z_k` are the logits.
    The mean over the classes is subtracted first, so a softmax or log-softmax after the head is allowed. A whole model
    that gives probabilities does not pass, because gamma would be added to these.

    If the output holds several tensors of the head's width, the logits are the one that passes. If it holds only
    scalars, such as the loss of a batch, these must depend on the output of the head. When one number is added to all
    logits, they must stay the same, as the softmax in a loss does, or must be a sum over classes, as with a sigmoid.

    The model runs as in :func:`~lightning_calibft.head.evaluation.evaluation`. A head that passes is proved:
    :func:`is_proved` is then true of the model until its structure changes.

    Args:
        forward: Runs ``model`` on some inputs and returns its output: the logits ``(N, C)`` or their (log-)softmax, or
            a tuple, list, mapping or object that holds them or the loss.
        model: A model that :func:`attach` has seen.

    Raises:
        NoLogitsError: If the output holds neither logits nor scalars.
        HeadRefusedError: If the head does not give the logits. The message names the head that does, if there is one.

    Example:
        >>> from lightning_calibft.head import attach
        >>> model = attach(nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.LogSoftmax(dim=-1)))
        >>> probe(lambda: model(torch.randn(3, 16)), model)
    """
    heads = attached_heads(model)
    if not heads:
        raise ValueError("Expected argument `model` to carry a calibration. Call `attach(model)` first.")
    with evaluation(model):
        before = _tensors(forward, model)
        width = num_classes(next(iter(heads.values())))
        matrices = {path: tensor for path, tensor in before.items() if tensor.ndim > 1}
        candidates = {path: tensor for path, tensor in matrices.items() if tensor.shape[-1] == width} or matrices
        scalars = {path: tensor for path, tensor in before.items() if tensor.numel() == 1}
        if not candidates and not scalars:
            raise NoLogitsError(
                f"Expected the output of {type(model).__name__} to hold logits or a loss, but it holds no tensor of"
                " either kind."
            )
        # The heads of one copy of the model give the logits, or all heads do so together.
        copies = list(dict.fromkeys((*attached_copies(model), tuple(heads.values()))))
        meant, problems = copies[0], list[str]()
        for path, base in candidates.items():
            effects = {head: _effect(forward, model, base, path, head) for head in heads.values()}
            _check_finite(model, effects.values(), base)
            of_copies = {copy: _problem([effects[head] for head in copy], base) for copy in copies}
            if found := next((copy for copy, problem in of_copies.items() if problem is None), ()):
                _store_proof(model, effects, found)
                return
            meant = next((copy for copy in copies if all(effects[head].outputs for head in copy)), meant)
            problems.append(of_copies[meant] or "")
        if scalars and all(_UNREACHED in problem for problem in problems):
            for copy in copies:
                if (problem := _problem_of_scalars(forward, model, list(copy), scalars)) is None:
                    _store_proof(model, {head: _Effect([], 1 / len(copy)) for head in heads.values()}, copy)
                    return
                problems.append(problem)
        remedy = _remedy(forward, model, matrices, scalars)
    names = " and ".join(repr(name or "forward") for name, head in heads.items() if head in meant)
    raise HeadRefusedError(
        f"Expected the head {names} of {type(model).__name__} to give the logits, but {problems[0]}{remedy}"
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
    child = next(child for child in map(offset_of, attached_heads(model).values()) if child.coefficient != 0)
    expected = logits.cpu().double()
    if not child.training:
        expected = expected + (child.offset * child.mask).cpu()
    return any(
        _difference(expected, actual, _epsilon(logits, actual)) is None
        for actual in _float_tensors(output).values()
        if actual.shape == expected.shape
    )


class _Effect(NamedTuple):
    """How an offset at the output of one head changes the logits."""

    outputs: list[Tensor]  # of each call in the forward, before the offset
    coefficient: float = 0.0
    residual: float = math.inf  # relative to the offset, as the two tolerances
    coefficient_tolerance: float = 0.0
    residual_tolerance: float = 0.0
    adds_to_probabilities: bool = False


def _tensors(forward: Forward, model: nn.Module) -> dict[Path, Tensor]:
    """Return the tensors in the output of one forward. Each call sees the same random numbers and the same buffers."""
    with unchanged(model):
        return _float_tensors(forward())


def _float_tensors(output: Any) -> dict[Path, Tensor]:
    return {
        path: gather_dtensor(tensor.detach()).cpu()  # Some devices have no float64.
        for path, tensor in tensors_in(output)
        if tensor.is_floating_point()
    }


def _check_finite(model: nn.Module, effects: Iterable[_Effect], base: Tensor) -> None:
    if not all(output.isfinite().all() for effect in effects for output in effect.outputs):
        raise NotFiniteError(f"Expected the head of {type(model).__name__} to give finite logits, but it does not.")
    if base.isnan().any():
        raise HeadRefusedError(f"Expected the logits of {type(model).__name__} to be numbers, but got NaN.")


@contextmanager
def _added(heads: Iterable[nn.Module], offset: Tensor, grow: bool = False) -> Iterator[list[Tensor]]:
    """Add an offset to the output of each head. Yield the outputs of each call, before the offset.

    Args:
        heads: The heads.
        offset: The offset of each class, of shape ``(C,)``.
        grow: Whether to multiply ``offset`` in place by the largest magnitude of the first output, if that is above 1.
    """
    outputs: list[Tensor] = []

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        logits = get_logits(output, len(offset))
        channels_first = is_channels_first(module)
        on_cpu = gather_dtensor(logits).cpu()
        if grow and not outputs:
            offset.mul_(on_cpu.abs().max().clamp(min=1))
        outputs.append(class_axis_last(on_cpu, channels_first))
        shift = offset.to(logits.device)
        shifted = logits + like_dtensor(shift[:, None, None] if channels_first else shift, logits)
        return replace_logits(output, shifted.to(logits.dtype), len(offset))

    handles = [head.register_forward_hook(add) for head in heads]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _effect(forward: Forward, model: nn.Module, base: Tensor, path: Path, head: nn.Module) -> _Effect:
    """Return the effect on one tensor of the output, which is ``base`` without an offset."""
    offset = _random_offset(num_classes(head))
    # Larger than the logits, so that an activation after the head is noticed, unless a softmax would underflow.
    with _added([head], offset, grow=not _are_probabilities(base)) as outputs:
        shifted = _tensors(forward, model).get(path)
    if not outputs or shifted is None or shifted.shape != base.shape or base.shape[-1] != len(offset):
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


def _problem_of_scalars(
    forward: Forward, model: nn.Module, heads: list[nn.Module], scalars: dict[Path, Tensor]
) -> str | None:
    """Return in words why the loss does not treat the output of the heads as logits, or ``None`` if it does."""
    width = num_classes(heads[0])
    with _added(heads, _random_offset(width), grow=True) as outputs:
        random = _tensors(forward, model)
    if problem := _problem_of_calls([len(outputs) / len(heads)]):
        return problem
    if not all(output.isfinite().all() for output in outputs):
        raise NotFiniteError(f"Expected the head of {type(model).__name__} to give finite logits, but it does not.")
    with _added(heads, torch.ones(width), grow=True):
        constant = _tensors(forward, model)
    if not any(_changes(value, random.get(path)) for path, value in scalars.items()):
        return "its output does not reach the loss. It may be an auxiliary head, or unused."
    changed = {path: value for path, value in scalars.items() if _changes(value, constant.get(path))}
    if not changed or _adds_up_over_classes(forward, model, heads, changed, constant):
        return None
    return (
        "a number added to all its outputs changes the loss, which the softmax of a cross-entropy would not do, and the"
        " loss is no sum over classes, as that of a sigmoid is. Something after it clips or replaces its output, or the"
        " loss is another one. If its output is right, define `forward`, which maps inputs to logits."
    )


def _adds_up_over_classes(
    forward: Forward,
    model: nn.Module,
    heads: list[nn.Module],
    scalars: dict[Path, Tensor],
    together: dict[Path, Tensor],
) -> bool:
    """Return whether what one number at all classes does to the loss is what it does at either half of them."""
    halves = []
    for parity in (0, 1):
        with _added(heads, (torch.arange(num_classes(heads[0])) % 2 == parity).float(), grow=True):
            halves.append(_tensors(forward, model))
    sums = {path: sum(half[path] for half in halves) - value for path, value in scalars.items()}
    return not any(_changes(value, together.get(path)) for path, value in sums.items())


def _changes(value: Tensor, other: Tensor | None) -> bool:
    if other is None or not (value.isfinite().all() and other.isfinite().all()):
        return False
    return not torch.allclose(other.double(), value.double(), rtol=1e-3, atol=1e-3)


def _problem(effects: list[_Effect], base: Tensor) -> str | None:
    """Return in words why the heads do not give the logits, or ``None`` if they do."""
    if problem := _problem_of_calls([len(effect.outputs) for effect in effects]):
        return problem
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
        return f"{_UNREACHED} (0 times). It may be an auxiliary head, or unused."
    residual = max(effect.residual for effect in effects)
    coefficients = " + ".join(f"{effect.coefficient:.4g}" for effect in effects)
    return (
        f"an offset added to its output moves them by {coefficients} times that offset instead of once, with a residual"
        f" of {residual:.2g}. Something after it scales, clips or replaces its output."
    )


def _problem_of_calls(calls: list[float]) -> str | None:
    if min(calls) == 0:
        return "the forward never calls it. Its weights may be used without it, as by `F.linear`."
    if max(calls) > 1:
        return f"one forward calls it {max(calls):g} times, so its output is not the logits of one batch."
    return None


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


def _remedy(forward: Forward, model: nn.Module, matrices: dict[Path, Tensor], scalars: dict[Path, Tensor]) -> str:
    """Return a sentence that names the module that gives the logits, or how others change them.

    Args:
        forward: As in :func:`probe`.
        model: As in :func:`probe`.
        matrices: What could be the logits in the output of ``model``.
        scalars: What could be the loss.
    """
    others = {name: module for name, module in head_candidates(model).items() if not is_attached(module)}
    likely = head_candidates(model, frozen_networks(model))
    better, worse = [], []
    for path, base in matrices.items():
        for name, module in others.items():
            if num_classes(module) == base.shape[-1]:
                effect = _effect(forward, model, base, path, module)
                better += [name] if _problem([effect], base) is None else []
                worse += [f"{name!r} ({effect.coefficient:.4g} times)"] if name in likely else []
    if len(better) > 1:
        return f' Its output holds the logits of {" and ".join(map(repr, better))}. Name one: `head="{better[-1]}"`.'
    if better:
        return f' The head is {better[0]!r}: pass `head="{better[0]}"`.'
    if not matrices:
        for name, module in others.items():
            with suppress(NotFiniteError):
                if _problem_of_scalars(forward, model, [module], scalars) is None:
                    return f' The head may be {name!r}: pass `head="{name}"`.'
        return ""
    text = f" Other candidates of that width: {', '.join(worse[-10:]) or 'none'}."
    # One of several matrices may hold features, unless its name says that it does not.
    logits = [base for path, base in matrices.items() if len(matrices) == 1 or not set(LOGIT_NAMES).isdisjoint(path)]
    return text + (_whole_remedy(forward, model, logits[0]) if logits else "")


def _whole_remedy(forward: Forward, model: nn.Module, base: Tensor) -> str:
    """Return how to make the output of the model, or of the part that ``forward`` runs, the head."""
    found: list[tuple[str, nn.Module]] = []

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        with suppress(ValueError):
            logits = get_logits(output, base.shape[-1]).cpu()
            if logits.shape == base.shape and torch.allclose(logits, base):
                found.append((name, module))

    handles = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules()]
    try:
        _tensors(forward, model)
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
