"""What goes wrong in other packages if things are done in the wrong order, and that the right order is right."""

import copy
import warnings

import pytest
import timm
import torch
from timm.models import load_checkpoint
from timm.utils import ModelEmaV3
from timm.utils.model import reparameterize_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_calibft.head import attach, detach, find_head, fold, get_gamma, set_gamma
from lightning_calibft.head.layers import head_names
from lightning_calibft.head.offset import CHILD_NAME
from lightning_calibft.head.probe import probe

from .models import GAMMA, NUM_CLASSES, SEEN, SHIFT, Distilled, Plain, inputs


def _timm(name="test_resnet", **options):
    return timm.create_model(name, num_classes=NUM_CLASSES, **options).eval()


def _images(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def _calibrated(model, x):
    """Calibrate a model; return it and the logits from before."""
    with torch.no_grad():
        raw = model.eval()(x)
    return set_gamma(model, GAMMA, SEEN), raw


@torch.no_grad()
def _assert_logits(model, x, expected):
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=1e-5)


# Averages of weights that other code makes go through the tensors of two models in step.


def test_an_average_of_timm_from_before_the_calibration_has_no_gamma():
    model, x = _timm(), _images()
    average = ModelEmaV3(model, decay=0.0)
    model, raw = _calibrated(model, x)
    average.update(model)
    assert get_gamma(average) is None
    _assert_logits(average.module, x, raw)


def test_an_average_of_timm_from_before_the_calibration_mixes_up_the_weights_behind_it():
    for attached_first in (True, False):
        model = attach(Distilled()) if attached_first else Distilled()
        average = ModelEmaV3(model, decay=0.0)  # a mere copy of the weights
        average.update(set_gamma(model, GAMMA, SEEN))
        # In the wrong order the weight of the second head was overwritten by gamma.
        same = torch.equal(average.module.head_dist.weight, model.head_dist.weight)
        assert same is attached_first
    assert (average.module.head_dist.weight == GAMMA).all()


def test_an_average_of_torch_from_before_the_calibration_has_no_gamma():
    model, x = Plain(), inputs()
    average = AveragedModel(model, use_buffers=True)
    model, raw = _calibrated(model, x)
    average.update_parameters(model)
    assert get_gamma(average) is None
    _assert_logits(average, x, raw)


# What builds a new layer leaves the calibration behind.


@pytest.mark.parametrize("name", ["levit_128s", "repvit_m0_9"])
def test_reparameterization_keeps_gamma_only_if_it_is_folded(name):
    x = _images(224 if name.startswith("levit") else 64)
    model, raw = _calibrated(_timm(name), x)
    dropped = reparameterize_model(model)
    assert get_gamma(dropped) is None
    _assert_logits(dropped, x, raw)
    _assert_logits(reparameterize_model(fold(model)), x, raw + SHIFT)


@pytest.mark.parametrize("width", [NUM_CLASSES, NUM_CLASSES + 1])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "convnext_atto", "mobilenetv3_small_050"])
def test_a_new_classifier_is_not_calibrated(name, width):
    model = set_gamma(_timm(name), GAMMA, SEEN)
    model.reset_classifier(width)
    assert get_gamma(model) is None
    assert not [key for key in model.state_dict() if CHILD_NAME in key]
    assert get_gamma(set_gamma(model, 2 * GAMMA, SEEN)) == 2 * GAMMA


@pytest.mark.parametrize("layer", ["fc", "whole model"])
def test_dynamic_quantization_of_a_head_goes_after_folding(layer):
    quantization = pytest.importorskip("torch.ao.quantization")
    model, raw = _calibrated(Plain(), inputs())
    kinds = {"fc"} if layer == "fc" else {nn.Linear}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        broken = quantization.quantize_dynamic(model, kinds)
        sound = quantization.quantize_dynamic(fold(model), kinds)
    with pytest.raises(AttributeError, match=CHILD_NAME):
        broken(inputs())
    torch.testing.assert_close(sound(inputs()), raw + SHIFT, rtol=0, atol=0.05)


# Loading that leaves out what it does not know.


def test_timm_drops_gamma_where_loading_is_not_strict(tmp_path):
    model, raw = _calibrated(_timm(), _images())
    torch.save(model.state_dict(), tmp_path / "attached.pth")
    fresh = _timm()
    with pytest.raises(RuntimeError, match=rf"Unexpected key.*fc\.{CHILD_NAME}\.offset"):
        load_checkpoint(fresh, str(tmp_path / "attached.pth"))
    load_checkpoint(fresh, str(tmp_path / "attached.pth"), strict=False)
    _assert_logits(fresh, _images(), raw)

    torch.save(fold(model).state_dict(), tmp_path / "folded.pth")
    for strict in (True, False):
        fresh = _timm()
        load_checkpoint(fresh, str(tmp_path / "folded.pth"), strict=strict)
        _assert_logits(fresh, _images(), raw + SHIFT)


# Models that are not what they seem.


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
        self.fc = self.classifier = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        return self.fc(self.body(x))


def test_a_head_under_two_names_is_one_head():
    plain, x = TwoNames().eval(), inputs()
    model, raw = _calibrated(copy.deepcopy(plain), x)
    probe(lambda: model(x), model)
    _assert_logits(model, x, raw + SHIFT)
    keys = [key for key in model.state_dict() if CHILD_NAME in key]
    assert keys == [f"{name}.{CHILD_NAME}.{key}" for name in ("fc", "classifier") for key in ("offset", "mask")]

    other = attach(TwoNames())
    other.load_state_dict(model.state_dict())
    _assert_logits(other, x, raw + SHIFT)
    other.load_state_dict(plain.state_dict())
    assert get_gamma(other) is None

    _assert_logits(fold(model), x, raw + SHIFT)  # once
    assert list(model.state_dict()) == list(plain.state_dict())


WITHOUT_CLASSES = ("test_resnet", "test_vit", "convnext_atto", "mobilenetv3_small_050", "levit_128s", "repvit_m0_9")


@pytest.mark.parametrize("name", [*WITHOUT_CLASSES, "crossvit_tiny_240", "pit_ti_distilled_224"])
def test_a_model_without_classes_has_no_head(name):
    model = timm.create_model(name, num_classes=0)
    with pytest.raises(ValueError, match=r"Found (no classification head|several modules)"):
        find_head(model)


def test_a_layer_before_the_missing_classifier_is_refused_with_data():
    model, x = timm.create_model("test_mambaout", num_classes=0), _images(96)
    attach(model)
    with pytest.raises(
        ValueError, match=r"Expected the head 'head\.pre_logits\.fc' of MambaOut to give the logits, but"
    ):
        probe(lambda: model(x), model)


def test_the_auxiliary_head_that_a_pretrained_config_names_is_no_head():
    model = _timm("volo_d1_224", img_size=32)
    assert model.pretrained_cfg["classifier"] == ("head", "aux_head")
    assert head_names(model, find_head(model)) == ("head",)


def test_a_classifier_that_gives_the_logits_of_each_position():
    """Attention pooling projects all positions, here 5, and returns the first."""
    model, x = _timm("resnet50_clip", img_size=64), _images(64)
    raw = model(x).detach()
    if head_names(model, find_head(model)) == ("head",):
        pytest.skip("this timm fails to name the projection, and what is found instead is right")
    attach(model)
    with pytest.raises(ValueError, match=r'shape \(2, 5, 5\) .* pass `head="head"`'):
        probe(lambda: model(x), model)
    set_gamma(detach(model), GAMMA, SEEN, head="head")
    probe(lambda: model(x), model)
    _assert_logits(model, x, raw + SHIFT)
