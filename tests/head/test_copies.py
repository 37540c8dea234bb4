"""Copies of a network in one model, as averages of its weights and teachers are."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_calibft import calibrate
from lightning_calibft.head import attach, find_head, fold, get_gamma, set_gamma
from lightning_calibft.head.copies import copies_of, in_place_of
from lightning_calibft.head.layers import head_names
from lightning_calibft.head.offset import attached_heads, offset_of
from lightning_calibft.head.probe import probe
from lightning_calibft.head.record import record_logits

from .models import GAMMA, NUM_CLASSES, SEEN, SHIFT, Convolutional, Distilled, Plain, Then, inputs

AVERAGES = {
    "deepcopy": lambda net: copy.deepcopy(net).requires_grad_(False),
    "trainable": copy.deepcopy,
    "swa_utils": AveragedModel,
    "swa_utils, buffers": lambda net: AveragedModel(net, use_buffers=True),
    "timm v2": ModelEmaV2,
    "timm v3": ModelEmaV3,
}
averages = pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)


class Averaged(nn.Module):
    """Trains one network and evaluates the other."""

    def __init__(self, net, average):
        super().__init__()
        self.model = net
        self.ema = average(net)

    def forward(self, x):
        return (self.model if self.training else getattr(self.ema, "module", self.ema))(x)


def _names(model, heads):
    return [head_names(model, copy) for copy in copies_of(model, heads)]


@averages
@pytest.mark.parametrize("make", [Plain, Convolutional, Distilled])
def test_both_copies_are_attached_and_the_evaluated_one_counts(make, average):
    model = attach(Averaged(make(), average))
    (heads, evaluated) = (list(dict.fromkeys(attached_heads(part).values())) for part in (model.model, model.ema))
    assert len(heads) == len(evaluated) == (2 if make is Distilled else 1)
    model.eval()
    probe(lambda: model(inputs()), model)
    assert [offset_of(head).coefficient for head in heads] == [0] * len(heads)
    assert [offset_of(head).coefficient for head in evaluated] == [1 / len(heads)] * len(heads)
    raw = model(inputs()).detach()
    with record_logits(model) as records:
        model.model(inputs()), model(inputs())
    torch.testing.assert_close(records, [raw])
    torch.testing.assert_close(set_gamma(model, GAMMA, SEEN)(inputs()), raw + SHIFT)
    torch.testing.assert_close(fold(model)(inputs()), raw + SHIFT)
    assert not attached_heads(model)


@averages
def test_state_dicts_and_buffers_still_match_by_position(average):
    model = attach(Averaged(Plain(), average))
    ema = getattr(model.ema, "module", model.ema)
    assert list(model.model.state_dict()) == list(ema.state_dict())
    assert [buffer.shape for buffer in model.model.buffers()] == [buffer.shape for buffer in ema.buffers()]


def test_what_was_copied_from_an_attached_network_is_recorded_apart():
    model = Averaged(attach(Distilled()), AVERAGES["deepcopy"]).eval()
    with record_logits(model) as records:
        first, second = model.model(inputs()), model.ema(2 * inputs())
    torch.testing.assert_close(records, [first, second])


def test_the_average_of_both_copies_is_the_model():
    class Ensemble(Averaged):
        def forward(self, x):
            return (self.model(x) + self.ema(x)) / 2

    model = attach(Ensemble(Plain(), AVERAGES["deepcopy"]), None).eval()
    nn.init.normal_(model.ema.fc.weight)
    probe(lambda: model(inputs()), model)
    assert [offset_of(head).coefficient for head in attached_heads(model).values()] == [0.5, 0.5]
    raw = model(inputs())
    torch.testing.assert_close(set_gamma(model, GAMMA, SEEN)(inputs()), raw + SHIFT)


def test_a_layer_like_the_head_that_runs_before_it_stays_without_gamma():
    def block():
        return nn.Sequential(nn.Linear(NUM_CLASSES, NUM_CLASSES), nn.Identity())

    model = Then(nn.Flatten(), nn.Linear(12, NUM_CLASSES), block(), block()).eval()
    attach(model, "3.0")
    attach(model[2][0])
    probe(lambda: model(inputs()), model)
    raw = model(inputs())
    torch.testing.assert_close(set_gamma(model, GAMMA, SEEN)(inputs()), raw + SHIFT)
    assert offset_of(model[2][0]).gamma() is None


def test_what_is_a_copy():
    net = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, NUM_CLASSES))
    model = nn.ModuleDict({"net": net, "same": copy.deepcopy(net), "other": nn.Sequential(nn.Linear(12, 9), net[1])})
    assert _names(model, (net[1],)) == [("same.1",)]
    nn.init.normal_(model["same"][1].weight)
    assert _names(model, (net[1],)) == [("same.1",)]
    assert copies_of(model, (net[1],), of_equal_weights=True) == []
    # Two layers of one shape are two heads, unless one was copied.
    model = nn.ModuleDict({"first": nn.Linear(8, 5), "second": nn.Linear(8, 5)})
    assert _names(model, (model["first"],)) == []
    model["copy"] = copy.deepcopy(model["first"])
    assert _names(model, (model["first"],)) == [("copy",)]
    # The largest network that has a copy: its parts are not compared with each other.
    model = Averaged(timm.create_model("test_resnet", num_classes=NUM_CLASSES), AVERAGES["deepcopy"])
    assert _names(model, (model.model.fc,)) == [("ema.fc",)]
    model = Averaged(torch.compile(Plain(), backend="eager"), lambda net: copy.deepcopy(net._orig_mod))
    assert _names(model, (model.model.fc,)) == [("ema.fc",)]


def test_equal_copies_are_not_ambiguous():
    model = Averaged(Plain(), copy.deepcopy)
    assert find_head(model) is model.model.fc
    nn.init.normal_(model.ema.fc.weight)
    with pytest.raises(ValueError, match=r"several modules.*'model\.fc', 'ema\.fc'"):
        find_head(model)


@pytest.mark.parametrize("teacher", [Plain, lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 7))])
@pytest.mark.parametrize("order", [["student", "teacher"], ["teacher", "student"]])
def test_a_teacher_is_never_chosen_or_named(teacher, order):
    made = {"student": Plain(), "teacher": teacher().requires_grad_(False)}
    model = nn.ModuleDict({name: made[name] for name in order})
    assert find_head(model) is model["student"].fc
    model["student"].head = nn.Linear(8, NUM_CLASSES)
    with pytest.raises(ValueError, match=r"'student\.fc', 'student\.head'.*head=\"student") as error:
        find_head(model)
    assert "teacher" not in str(error.value)
    model["student"].requires_grad_(False)  # nothing is trained, so nothing tells them apart
    with pytest.raises(ValueError, match="teacher"):
        find_head(model, "none")


def test_a_frozen_head_is_found():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES).requires_grad_(False))
    assert find_head(model) is model[-1]
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8)).requires_grad_(False)})
    model["fc"] = nn.Linear(8, NUM_CLASSES)
    assert find_head(model) is model["fc"]
    assert find_head(Plain().requires_grad_(False)) is not None


def test_calibrate_leaves_the_other_copy_as_it_was():
    model = Averaged(Plain(), AVERAGES["deepcopy"])
    keys = list(model.model.state_dict())
    batches = [(inputs(8), torch.tensor(SEEN * 4))]
    result = calibrate(model, batches, SEEN, progress=False)
    assert get_gamma(model) == pytest.approx(result.gamma)
    assert list(attached_heads(model)) == ["ema.fc"]
    assert list(model.model.state_dict()) == keys


def test_one_copy_in_place_of_another():
    model = Averaged(Plain(), AVERAGES["deepcopy"]).eval()
    nn.init.normal_(model.ema.fc.weight)
    expected, networks = model.ema(inputs()), (model.model, model.ema)
    with in_place_of(model, model.ema.fc, [model.model.fc]):
        assert torch.equal(model.model(inputs()), expected)
    assert (model.model, model.ema) == networks
    with pytest.raises(ZeroDivisionError), in_place_of(model, model.ema.fc, [model.model.fc]):
        1 / 0  # noqa: B018
    assert (model.model, model.ema) == networks


def test_a_head_of_one_output_has_no_absent_classes():
    for model in (nn.Linear(8, 1), nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))):
        with pytest.raises(ValueError, match=r"one output for each class, but it has one.*has no absent classes"):
            attach(model)
        assert not attached_heads(model)


def test_a_head_of_another_width_gets_new_buffers():
    head = set_gamma(nn.Linear(8, NUM_CLASSES), GAMMA, SEEN)
    head.weight, head.bias = (nn.Parameter(torch.randn(7, *shape)) for shape in ((8,), ()))
    head.out_features = 7
    attach(head)
    assert get_gamma(head) is None
    assert set_gamma(head, GAMMA, SEEN).absent_class_calibration.mask.tolist() == [0, 1, 0, 1, 1, 1, 1]
