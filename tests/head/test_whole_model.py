"""The output of a whole model as the head."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_calibft.head import attach, detach, find_head, fold, get_gamma, set_gamma
from lightning_calibft.head.find import HeadNotFoundError
from lightning_calibft.head.layers import num_classes
from lightning_calibft.head.offset import attached_heads
from lightning_calibft.head.probe import probe
from lightning_calibft.head.record import record_logits

from .models import (
    GAMMA,
    NUM_CLASSES,
    OUTPUTS,
    SEEN,
    SHIFT,
    Convolutional,
    Distilled,
    Plain,
    Prototypes,
    Scaled,
    Then,
    Wrapper,
    inputs,
    logits_by_hand,
    tensors_of,
)

KEYS = ["absent_class_calibration.offset", "absent_class_calibration.mask"]


@pytest.mark.parametrize("kind", OUTPUTS)
def test_every_kind_of_output_is_calibrated_in_eval_mode_only(kind):
    model, x = Scaled(kind).eval(), inputs()
    expected = model(x)
    raw = logits_by_hand(kind, expected)
    attach(model, head="forward")
    probe(lambda: model(x), model)
    set_gamma(model, GAMMA, SEEN)
    with record_logits(model) as recorded:
        output = model(x)
    torch.testing.assert_close(recorded, [raw.detach()])
    torch.testing.assert_close(logits_by_hand(kind, output), raw + SHIFT)
    for part, old in zip(tensors_of(output), tensors_of(expected), strict=True):
        if part is not logits_by_hand(kind, output):
            torch.testing.assert_close(part, old)
    model.get_submodule("absent_class_calibration").train()
    torch.testing.assert_close(logits_by_hand(kind, model(x)), raw)


def test_the_name_of_a_part_stands_for_its_output():
    model = Wrapper(Scaled())
    assert find_head(model, "model.forward") is model.model
    assert find_head(model, "model") is model.model.model.fc
    assert find_head(model, "model.model.fc.forward") is model.model.model.fc
    attach(model, head="model.forward")
    assert [key for key in model.state_dict() if "calibration" in key] == [f"model.{key}" for key in KEYS]
    assert find_head(model) is model.model
    detach(model)
    attach(model.model, head="forward")
    assert list(attached_heads(model)) == ["model"]


@pytest.mark.parametrize(
    "wrap", [AveragedModel, nn.DataParallel, lambda model: torch.compile(model, backend="eager"), lambda model: model]
)
@pytest.mark.parametrize("head", ["forward", None])
def test_wrappers_are_looked_through(wrap, head):
    model = wrap(Prototypes())
    head = find_head(model, head)
    assert type(head) is Prototypes
    assert num_classes(head) == NUM_CLASSES


def test_the_width_of_a_model_is_what_it_says():
    model = nn.Module()
    with pytest.raises(ValueError, match=r"'forward', to state its number of classes.*Set `num_classes` on it"):
        find_head(model, "forward")
    for change in (
        lambda: setattr(model, "config", SimpleNamespace(num_labels=2)),
        lambda: setattr(model, "num_labels", 3),
        lambda: setattr(model, "num_classes", 4),
        lambda: setattr(model, "out_features", 5),
    ):
        change()
        assert num_classes(find_head(model, "forward")) in (2, 3, 4, 5)
    widths = []
    for name in ("out_features", "num_classes", "num_labels", "config"):
        widths.append(num_classes(find_head(model, "forward")))
        delattr(model, name)
    assert widths == [5, 4, 3, 2]
    # An encoder of timm says so.
    model.num_classes = 0
    with pytest.raises(ValueError, match="to state its number of classes"):
        find_head(model, "forward")


def test_a_part_that_is_not_there_may_come_later():
    with pytest.raises(HeadNotFoundError, match=r"but got 'net\.forward'"):
        find_head(Plain(), "net.forward")


def test_a_model_without_any_layer_for_a_head_is_its_own():
    model, x = Prototypes().eval(), inputs()
    raw = model(x)
    assert find_head(model) is model
    attach(model)
    probe(lambda: model(x), model)
    torch.testing.assert_close(set_gamma(model, GAMMA, SEEN)(x), raw + SHIFT)


def test_a_model_whose_head_is_still_to_come_is_not_its_own():
    class Late(LightningModule):
        def __init__(self):
            super().__init__()
            self.num_classes = NUM_CLASSES
            self.body = nn.Conv2d(3, 8, 2)

    with pytest.raises(HeadNotFoundError, match=r"Build the head first, or pass `head=\"forward\"`"):
        find_head(Late())
    assert find_head(late := Late(), "forward") is late
    empty = nn.Module()
    empty.num_classes = NUM_CLASSES
    with pytest.raises(HeadNotFoundError):
        find_head(empty)
    lazy = nn.Module()
    lazy.num_classes, lazy.body = NUM_CLASSES, nn.LazyConv2d(8, 2)
    with pytest.raises(HeadNotFoundError, match="'forward' has no weights yet"):
        find_head(lazy)


@pytest.mark.parametrize("model_class", [Plain, Convolutional, Distilled])
def test_the_layers_inside_stay_as_they_are(model_class):
    model, x = model_class().eval(), inputs()
    model.num_classes = NUM_CLASSES
    raw = model(x)
    set_gamma(model, GAMMA, SEEN, head="forward")
    probe(lambda: model(x), model)
    torch.testing.assert_close(model(x), raw + SHIFT)
    assert list(attached_heads(model)) == [""]


def test_a_model_that_runs_all_its_children_runs_the_calibration_once():
    model, x = Then(Plain(), nn.Softplus()).eval(), inputs()
    raw = model(x)
    attach(model, head="forward")
    probe(lambda: model(x), model)
    torch.testing.assert_close(model(x), raw)
    torch.testing.assert_close(set_gamma(model, GAMMA, SEEN)(x), raw + SHIFT)


def test_a_width_that_is_not_that_of_the_logits_is_refused():
    model = Scaled().eval()
    model.num_classes = 7
    attach(model, head="forward")
    with pytest.raises(ValueError, match=r"Scaled to have 7 classes.*the shape \(4, 5\)\. Correct its `out_features`"):
        model(inputs())


def test_an_output_without_logits_passes_in_training_mode_only():
    model = set_gamma(Scaled(), GAMMA, SEEN, head="forward")
    model.register_forward_hook(lambda *_: None)
    model.kind = "losses"
    OUTPUTS["losses"] = lambda z, h: {"loss": z.sum()}
    try:
        assert list(model(inputs())) == ["loss"]
        with pytest.raises(ValueError, match="to hold logits"):
            model.eval()(inputs())
    finally:
        del OUTPUTS["losses"]


def test_a_whole_model_does_not_fold():
    model = set_gamma(Scaled(), GAMMA, SEEN, head="forward")
    with pytest.raises(
        ValueError, match=r"head 'forward' to be a Linear.* got a Scaled\. Keep the calibration attached"
    ):
        fold(model, add_bias=True)
    assert get_gamma(model) == GAMMA
