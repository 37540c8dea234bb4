import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_calibft.head import ZeroShotHead, attach, detach, fold, get_gamma, set_gamma
from lightning_calibft.head.offset import attached_heads, is_folded

from .models import (
    ABSENT,
    GAMMA,
    NUM_CLASSES,
    SEEN,
    SHIFT,
    Convolutional,
    CosineLinear,
    Distilled,
    Plain,
    Wrapper,
    inputs,
)

MODELS = [Plain, Convolutional, Distilled]


class _Normalized(nn.Linear):
    """A cosine head that takes no notice of its bias."""

    def forward(self, input):
        return nn.functional.linear(
            nn.functional.normalize(input, dim=-1), nn.functional.normalize(self.weight, dim=-1)
        )


class _Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class _Clipped(nn.Linear):
    def forward(self, input):
        return super().forward(input).relu()


class _Margin(nn.Linear):
    def forward(self, input, target):
        return super().forward(input)


class _Cast(nn.Linear):
    """As the layers of timm, which cast."""

    def forward(self, input):
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


@pytest.mark.parametrize("model_class", MODELS)
def test_a_folded_model_is_plain_and_gives_the_calibrated_logits(model_class):
    model, x = model_class().eval(), inputs()
    reference = copy.deepcopy(model)
    calibrated = set_gamma(model, GAMMA, SEEN)(x)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert fold(model) is model
    torch.testing.assert_close(model(x), calibrated, rtol=0, atol=1e-6)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    reference.load_state_dict(model.state_dict())
    torch.testing.assert_close(reference(x), calibrated, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_folding_adds_in_float32_and_keeps_the_dtype(dtype):
    model = Plain().to(dtype)
    nn.init.ones_(model.fc.bias)
    # Half precision rounds it to half a unit in the last place of 1, a tie that would be lost.
    gamma = 2**-8 + 2**-18
    fold(set_gamma(model, gamma, SEEN))
    expected = torch.tensor(1 + gamma, dtype=torch.float64).to(dtype)
    assert model.fc.bias.dtype == dtype
    torch.testing.assert_close(model.fc.bias[ABSENT].detach(), expected.expand(3), rtol=0, atol=0)
    assert (model.fc.bias[SEEN] == 1).all()


@pytest.mark.parametrize("model_class", [Plain, Convolutional])
def test_a_head_without_bias_gets_one_on_request_only(model_class):
    model, x = model_class(bias=False).eval(), inputs()
    calibrated = set_gamma(model, GAMMA, SEEN)(x)
    with pytest.raises(ValueError, match=r"a Linear or Conv2d with a bias .* but it has none. Pass `add_bias=True`"):
        fold(model)
    assert get_gamma(model) == GAMMA
    assert not is_folded(model)
    fold(model, add_bias=True)
    torch.testing.assert_close(model(x), calibrated, rtol=0, atol=1e-6)
    model_class(bias=True).load_state_dict(model.state_dict())


@pytest.mark.parametrize("prepare", [lambda model: model, attach])
def test_a_model_that_is_not_calibrated_does_not_fold(prepare):
    with pytest.raises(ValueError, match=r"to be calibrated. Call `calibrate` or `set_gamma` first"):
        fold(prepare(Plain()))


@pytest.mark.parametrize("head_class", [_Normalized, _Scaled, _Clipped, _Margin])
@pytest.mark.parametrize("bias", [True, False])
def test_a_head_that_does_not_add_its_bias_as_it_is_does_not_fold(head_class, bias):
    head = set_gamma(head_class(8, NUM_CLASSES, bias=bias), GAMMA, SEEN)
    keys = list(head.state_dict())
    with pytest.raises(ValueError, match=rf"a {head_class.__name__} whose own `forward` does not add it\. Keep the"):
        fold(head, add_bias=True)
    assert list(head.state_dict()) == keys
    assert get_gamma(head) == GAMMA


@pytest.mark.parametrize("head", [_Cast(8, NUM_CLASSES), ZeroShotHead(torch.randn(NUM_CLASSES, 8))])
def test_a_head_with_a_forward_of_its_own_that_adds_its_bias_folds(head):
    x = torch.randn(3, 8)
    expected = head.eval()(x) + SHIFT
    torch.testing.assert_close(fold(set_gamma(head, GAMMA, SEEN))(x), expected)


def test_a_head_that_is_not_linear_does_not_fold():
    model = nn.Sequential(nn.Flatten(), CosineLinear(12, NUM_CLASSES))
    with pytest.raises(ValueError, match=r"head '1' to be a Linear or Conv2d .* got a CosineLinear\. Keep the"):
        fold(set_gamma(model, GAMMA, SEEN), add_bias=True)


def test_nothing_changes_where_one_of_several_heads_does_not_fold():
    model = Distilled()
    model.head_dist = nn.Linear(8, NUM_CLASSES, bias=False)
    bias = model.head.bias.clone()
    with pytest.raises(ValueError, match="head 'head_dist'"):
        fold(set_gamma(model, GAMMA, SEEN))
    torch.testing.assert_close(model.head.bias, bias, rtol=0, atol=0)
    assert list(attached_heads(model)) == ["head", "head_dist"]


@pytest.mark.parametrize(
    "copy_of", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), Wrapper]
)
@pytest.mark.parametrize("model_class", MODELS)
def test_a_folded_model_is_not_calibrated_again(model_class, copy_of):
    assert not is_folded(set_gamma(model_class(), GAMMA, SEEN))
    model = fold(set_gamma(model_class(), GAMMA, SEEN))
    keys = list(model_class().state_dict())
    assert list(model.state_dict()) == keys
    model = copy_of(model)
    assert is_folded(model)
    for again in (attach, lambda m: set_gamma(m, GAMMA, SEEN), fold):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"without a folded gamma.* would count gamma twice\. Rebuild the model"):
            again(model)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert get_gamma(model) is None


def test_the_whole_of_a_folded_model_is_not_calibrated_either():
    model = fold(set_gamma(Plain(), GAMMA, SEEN))
    model.num_classes = NUM_CLASSES
    with pytest.raises(ValueError, match="would count gamma twice"):
        attach(model, head="forward")


def test_another_head_of_a_folded_model_may_be_calibrated():
    model = nn.ModuleDict({"student": Plain(), "teacher": Plain()})
    fold(set_gamma(model, GAMMA, SEEN, head="student.fc"))
    set_gamma(model, GAMMA, SEEN, head="teacher.fc")
    assert get_gamma(model["teacher"]) == GAMMA


def test_detaching_does_not_mark():
    assert not is_folded(detach(set_gamma(Plain(), GAMMA, SEEN)))
