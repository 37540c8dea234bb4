"""A child module of a classification head that adds gamma to the logits of the absent classes."""

# No postponed annotations here: `torch.jit.script` compiles the hook and the forward.
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Tuple, cast  # noqa: UP035

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from lightning_calibft._arguments import check_model
from lightning_calibft._format import CHILD_NAME as CHILD_NAME, METADATA_KEY, RECORD_NAME as RECORD_NAME
from lightning_calibft.head.layers import base_layer, is_channels_first
from lightning_calibft.head.output import get_logits, replace_logits
from lightning_calibft.split import ClassSplit

# `fold` sets this attribute of a head to True. It is not in the state dict.
FOLDED_NAME = "_absent_class_calibration_folded"
Recorder = Callable[["AbsentClassOffset", Tensor], None]


class AbsentClassOffset(nn.Module):
    """Add ``gamma`` to the logits of the absent classes, in eval mode only.

    The loss of a training step sees raw logits, so fitting a calibrated model again never adds gamma twice.

    Args:
        num_classes: Number of classes ``C``.
        channels_first: Whether the class axis of the logits is the third from the end, as after a ``Conv2d``.
        device: The device of the buffers.
    """

    offset: Tensor
    mask: Tensor

    def __init__(self, num_classes: int, channels_first: bool, device: torch.device) -> None:
        super().__init__()
        self.channels_first = channels_first
        # The place of this head among those that give the logits together. Copies of a head have the same one.
        self.place = 0
        # The weight of this head in the model's logits: less than 1 where heads are averaged, 0 in a copy of the model
        # that does not give them, such as the trained one if its average is evaluated.
        self.coefficient = 1.0
        # Whether this head stays without gamma: in a copy that neither gives the logits nor is trained.
        self.left_out = False
        # A compiled model guards on what the hook reads, so the hook reads this flag and not the recorders.
        self.recording = False
        self.recorders: tuple[Recorder, ...] = ()
        # The structure of the model for which `probe` last showed that this head produces the logits.
        self.proved_structure: tuple[Any, ...] | None = None
        # How that model is run on a batch.
        self.proved_call = ""
        # What is known of gamma: `CalibrationResult.as_dict`. It is not in the state dict, so it can be out of date.
        self.record: dict[str, Any] = {}
        # The hooks on the head, which `detach` removes.
        self.handles: tuple[RemovableHandle, ...] = ()
        # The mask is float32, because weight averaging interpolates buffers, which does not work for bool or integers.
        self.resize(num_classes, device)

    def resize(self, num_classes: int, device: torch.device) -> None:
        """Make new buffers, without gamma, for a head of ``num_classes``."""
        self.record = {}
        with torch.inference_mode(False):
            self.register_buffer("offset", torch.zeros((), dtype=torch.float32, device=device))
            self.register_buffer("mask", torch.zeros(num_classes, dtype=torch.float32, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Return the input unchanged. A head that runs its children in turn, such as a ``Sequential``, calls this."""
        return x

    def calibrate(self, logits: Tensor) -> Tensor:
        """Return the calibrated logits, in their own dtype and shape."""
        calibrated = logits
        if not self.training:
            shift = self.shift()
            if not torch.jit.is_scripting():  # type: ignore[attr-defined]
                shift = like_dtensor(shift, logits)
            calibrated = (logits + shift).to(logits.dtype)
        if not torch.jit.is_scripting() and self.recording:  # type: ignore[attr-defined]
            _record(self, logits)
        return calibrated

    def shift(self) -> Tensor:
        """Return the shift that is added to the logits, in float32 and in a shape that broadcasts with them.

        Adding it promotes half precision logits to float32.
        """
        shift = self.offset * self.mask
        return shift[:, None, None] if self.channels_first else shift

    def gamma(self) -> float | None:
        """Return the offset, or ``None`` if the head is not calibrated."""
        return self.offset.item() if self.mask.any() else None

    def set(self, gamma: float, split: ClassSplit, record: Mapping[str, Any] | None = None) -> None:
        """Set gamma in place, so that compiled code and existing state dicts see the change."""
        self.record = dict(record or {})
        with torch.no_grad():
            self.offset.fill_(gamma)
            self.mask.copy_(split.absent_mask)

    def set_recorders(self, recorders: tuple[Recorder, ...]) -> None:
        """Call ``recorders`` with the raw logits of each forward."""
        self.recorders, self.recording = recorders, bool(recorders)

    def reset_parameters(self) -> None:
        """Remove the calibration in place. Torch calls this after it has allocated a module that was on ``meta``."""
        self.record = {}
        for buffer in self.buffers():
            buffer.zero_()

    def extra_repr(self) -> str:
        """Return the number of classes for ``repr``."""
        return f"num_classes={len(self.mask)}"

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no recorders, and nothing has been proved about it yet.
        return {**self.__dict__, "recording": False, "recorders": (), "proved_structure": None}

    # Private in torch, but `.half()`, `.to()`, `.cuda()` and `to_empty()` all call this method. Only here can a buffer
    # follow the device without following the dtype.
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AbsentClassOffset":
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _record(child: AbsentClassOffset, logits: Tensor) -> None:
    for recorder in child.recorders:
        recorder(child, logits)


def _calibrate(self: nn.Module, input: Tuple[Tensor], output: Tensor) -> Tensor:  # noqa: UP006
    # `torch.jit.script` cannot parse a type-ignore comment with an error code.
    return self.absent_class_calibration.calibrate(output)  # type: ignore


def _calibrate_output(head: nn.Module, args: Any, output: Any) -> Any:
    """Calibrate the logits in the output of a module that is not a torch layer, such as a whole model."""
    child = cast(AbsentClassOffset, head.absent_class_calibration)
    if child.training and not child.recording:
        return output
    logits = get_logits(output, len(child.mask))
    if logits.shape[-3 if child.channels_first else -1] != len(child.mask):
        raise ValueError(
            f"Expected the logits of {type(head).__name__} to have {len(child.mask)} classes, as the module says, but"
            f" got the shape {tuple(logits.shape)}. Correct its `out_features` or `num_classes` and attach again."
        )
    return replace_logits(output, child.calibrate(logits), len(child.mask))


def _fill_missing_keys(head: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Make a state dict without the calibration load strictly.

    If the state dict holds the head, it comes from an uncalibrated model, and the calibration is reset. Otherwise the
    calibration does not change.
    """
    child_prefix = f"{prefix}{CHILD_NAME}."
    if any(key.startswith(child_prefix) for key in state_dict):
        return
    own = next((value for key, value in state_dict.items() if key.startswith(prefix)), None)
    for name, buffer in head.get_submodule(CHILD_NAME).named_buffers():
        device = own.device if isinstance(own, Tensor) else buffer.device
        state_dict[child_prefix + name] = buffer if own is None else torch.zeros_like(buffer, device=device)


def like_dtensor(tensor: Tensor, other: Tensor) -> Tensor:
    """Make ``tensor``, which is the same in all processes, distributed if ``other`` is, so that they can be added."""
    if isinstance(other, DTensor) and not isinstance(tensor, DTensor):
        return DTensor.from_local(tensor, other.device_mesh, run_check=False)
    return tensor


def add_offset(head: nn.Module, num_classes: int, device: torch.device) -> AbsentClassOffset:
    """Add the child module to ``head``, and the hooks that call it."""
    child = AbsentClassOffset(num_classes, is_channels_first(head), device).train(head.training)
    head.add_module(CHILD_NAME, child)
    # `torch.jit.script` compiles the hook of a layer, but not one that takes any output.
    hook: Callable[..., Any] = _calibrate if isinstance(head, (nn.Linear, nn.Conv2d)) else _calibrate_output
    child.handles = (
        head.register_forward_hook(hook),
        head.register_load_state_dict_pre_hook(_fill_missing_keys),  # type: ignore[no-untyped-call]
    )
    return child


def remove_offset(head: nn.Module) -> None:
    """Remove the child module and its hooks."""
    for handle in offset_of(head).handles:
        handle.remove()
    delattr(head, CHILD_NAME)


def is_attached(head: nn.Module) -> bool:
    """Return whether ``head`` itself carries a calibration."""
    # `hasattr` would be wrong: wrappers forward it to the module that they wrap.
    return isinstance(dict(head.named_children()).get(CHILD_NAME), AbsentClassOffset)


def record_of(head: nn.Module) -> dict[str, Any]:
    """Return what is known of the gamma that an attached or folded head has now; nothing if it has another one."""
    if not is_attached(head):
        return dict(vars(head).get(RECORD_NAME, {}))
    child = offset_of(head)
    same = child.record.get("absent_classes") == child.mask.nonzero().flatten().tolist()
    return child.record if same and math.isclose(child.record["gamma"], child.offset.item(), rel_tol=1e-6) else {}


def offset_of(head: nn.Module) -> AbsentClassOffset:
    """Return the calibration of an attached head."""
    return cast(AbsentClassOffset, head.get_submodule(CHILD_NAME))


def attached_heads(model: nn.Module) -> dict[str, nn.Module]:
    """Return the heads of ``model`` that carry a calibration, by their dotted names."""
    return {name: module for name, module in model.named_modules() if is_attached(module)}


def attached_copies(model: nn.Module) -> list[tuple[nn.Module, ...]]:
    """Return the heads of ``model`` that carry a calibration: of each copy of the network, those that belong together.

    The original of a head that PEFT trains in full is no copy: nothing calls it any more.
    """
    heads = attached_heads(model)
    copies: list[dict[int, nn.Module]] = []
    for module in heads.values():
        place = offset_of(module).place
        copy = next((copy for copy in copies if place not in copy), None)
        if copy is None:
            copies.append(copy := {})
        copy[place] = module
    if any("original_module" in name.split(".") for name in heads):
        return [tuple(heads.values())]
    return [tuple(copy.values()) for copy in copies]


def is_folded(model: nn.Module) -> bool:
    """Return whether gamma was folded into the bias of ``model`` or of a head in it.

    Example:
        >>> is_folded(nn.Linear(16, 5))
        False
    """
    check_model("model", model)
    return any(vars(module).get(FOLDED_NAME) is True or _is_folded_by_config(module) for module in model.modules())


def _is_folded_by_config(module: nn.Module) -> bool:
    """Return whether the config of a transformers model, in which ``export`` stores the metadata, says so."""
    metadata = getattr(vars(module).get("config"), METADATA_KEY, None)
    return isinstance(metadata, dict) and metadata.get("folded") is True


def mark_head_folded(head: nn.Module, record: Mapping[str, Any]) -> None:
    """Mark a head as folded, and also the layer inside it that remains after merging an adapter."""
    for module in {head, base_layer(head)}:
        setattr(module, FOLDED_NAME, True)
    keep_folded_record(head, {**record, "folded": True} if record else {})


def keep_folded_record(head: nn.Module, record: Mapping[str, Any]) -> None:
    """Keep what is known of a folded gamma in the head, and in the layer inside it."""
    for module in {head, base_layer(head)}:
        setattr(module, RECORD_NAME, dict(record))


def folded_heads(model: nn.Module) -> list[nn.Module]:
    """Return the heads of ``model`` that are marked as folded, without the layers inside them."""
    marked = [module for module in model.modules() if vars(module).get(FOLDED_NAME) is True]
    inner = [base_layer(module) for module in marked if base_layer(module) is not module]
    return [module for module in marked if module not in inner]


def check_not_folded(head: nn.Module, inside: Iterable[nn.Module] = ()) -> None:
    """Raise if the bias of a head already holds a gamma, according to its mark or the config of a model around it."""
    if is_folded(head) or any(map(_is_folded_by_config, inside)):
        raise ValueError(
            f"Expected a {type(head).__name__} without a folded gamma, but its bias already holds one, and calibrating"
            " again would count gamma twice. Rebuild the model and load the weights from before folding."
        )
