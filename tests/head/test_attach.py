import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_calibft import ClassSplit
from lightning_calibft.head import attach, detach, find_head, fold, get_gamma, set_gamma
from lightning_calibft.head.offset import attached_heads

from .models import ABSENT, GAMMA, NUM_CLASSES, SEEN, SHIFT, Distilled, Plain, Wrapper, inputs


def test_attaching_twice_is_attaching_once():
    model = Plain()
    assert attach(model) is model
    set_gamma(model, GAMMA, SEEN)
    assert attach(attach(model), head="fc") is model
    assert get_gamma(model) == GAMMA
    assert len(model.fc._forward_hooks) == 1


def test_a_set_of_heads_is_attached_as_a_whole():
    assert list(attached_heads(attach(Distilled()))) == ["head", "head_dist"]


def test_detach_leaves_no_trace():
    model = Plain().eval()
    reference = copy.deepcopy(model)
    assert detach(set_gamma(model, GAMMA, SEEN)) is model
    assert attached_heads(model) == {}
    assert str(model) == str(reference)
    assert (len(model.fc._forward_hooks), len(model.fc._load_state_dict_pre_hooks)) == (0, 0)
    torch.testing.assert_close(model(inputs()), reference(inputs()), rtol=0, atol=0)
    detach(model)


def test_gamma_is_none_until_it_is_set():
    model = Plain()
    assert get_gamma(model) is None
    assert get_gamma(attach(model)) is None
    assert get_gamma(set_gamma(model, 0.0, SEEN)) == 0.0
    assert get_gamma(set_gamma(model, np.float64(-1.5), SEEN)) == -1.5
    assert get_gamma(model.fc) == -1.5


def test_set_gamma_replaces_the_classes_too():
    model, x = Plain().eval(), inputs()
    raw = model(x)
    set_gamma(model, 1.0, [0], [1])
    split = ClassSplit(NUM_CLASSES, SEEN, ABSENT)
    set_gamma(model, GAMMA, split.seen_classes, split.absent_classes)
    torch.testing.assert_close(model(x), raw + SHIFT)


def test_different_gammas_are_an_error_that_names_the_heads():
    model = attach(Distilled())
    set_gamma(model.head, 1.0, SEEN)
    set_gamma(model.head_dist, 2.0, SEEN)
    with pytest.raises(ValueError, match=r"one gamma, but got \{'head': 1.0, 'head_dist': 2.0\}"):
        get_gamma(model)


@pytest.mark.parametrize("gamma", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_an_infinite_gamma_is_refused(gamma):
    model = Plain()
    with pytest.raises(ValueError, match="`gamma` to be finite in float32"):
        set_gamma(model, gamma, SEEN)
    assert attached_heads(model) == {}


@pytest.mark.parametrize("gamma", [True, "1", None, [1.0]])
def test_a_gamma_that_is_no_number_is_refused(gamma):
    with pytest.raises(TypeError, match="`gamma` to be a number"):
        set_gamma(Plain(), gamma, SEEN)


def test_classes_outside_the_head_are_refused_before_anything_is_attached():
    model = Plain()
    with pytest.raises(ValueError, match=r"`seen_classes` to hold class ids in \[0, 5\), but got 5"):
        set_gamma(model, GAMMA, [0, 5])
    assert attached_heads(model) == {}


def test_the_whole_model_can_be_the_head():
    model, x = Wrapper(Plain()).eval(), inputs()
    model.out_features = NUM_CLASSES
    raw = model(x)
    set_gamma(model, GAMMA, SEEN, head=model)
    torch.testing.assert_close(model(x), raw + SHIFT)
    with pytest.raises(ValueError, match=r"but got a Wrapper. Keep the calibration attached"):
        fold(model, add_bias=True)


def test_gamma_goes_to_the_named_head_only():
    model = nn.ModuleDict({"student": Plain(), "teacher": Plain()})
    set_gamma(model, GAMMA, SEEN, head="student.fc")
    assert list(attached_heads(model)) == ["student.fc"]
    assert find_head(model) is model["student"].fc


def test_a_second_head_would_count_gamma_twice():
    model = Plain().eval()
    model.num_classes = NUM_CLASSES
    set_gamma(model, GAMMA, SEEN)
    expected = model(inputs())
    with pytest.raises(ValueError, match=r"at another head, but 'fc' has one.*`detach\(model\)` first"):
        set_gamma(model, GAMMA, SEEN, head="forward")
    assert torch.equal(model(inputs()), expected)
    set_gamma(detach(model), GAMMA, SEEN, head="forward")
    torch.testing.assert_close(model(inputs()), expected)
    with pytest.raises(ValueError, match=r"but 'forward' has one"):
        attach(model, "fc")


def test_a_head_without_memory_is_filled_uncalibrated():
    with torch.device("meta"):
        head = attach(nn.Linear(16, 5))
    head.to_empty(device="cpu")
    for buffer in head.absent_class_calibration.buffers():
        buffer.fill_(7)  # whatever was in the memory
    for module in head.modules():
        module.reset_parameters()
    assert get_gamma(head) is None
    assert head.absent_class_calibration.offset == 0
