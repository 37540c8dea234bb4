"""Heads of models that people use: timm and torchvision."""

from functools import partial

import pytest
import timm
import torch

from .round_trip import NUM_CLASSES, check, check_with_whole_model, random_weights

MAX_PARAMETERS = 30_000_000
# Their logits are not what one layer gives: VOLO adds the maximum of an auxiliary head. The whole model is right.
WHOLE = ("volo_",)


def _timm_inputs(name):
    """Inputs of shapes that the model may take, the smallest first."""
    config = timm.get_pretrained_cfg(name)
    sizes = [config.input_size] if config.fixed_input_size else [(3, 96, 96), (3, 128, 128), config.input_size]
    return [torch.randn(2, *size, generator=torch.Generator().manual_seed(0)) for size in sizes]


def _first_that_fits(model, batches):
    for x in batches[:-1]:
        try:
            model(x)
        except (AssertionError, RuntimeError, ValueError):
            continue
        return x
    return batches[-1]


def _check_timm(name):
    make = partial(timm.create_model, name, num_classes=NUM_CLASSES)
    x = _first_that_fits(make().eval(), _timm_inputs(name))
    if name.startswith(WHOLE):
        return check_with_whole_model(make, x, 'Something is added after it.*pass `head="forward"`')
    return check(make, x)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("test_resnet", ("fc",)),
        ("test_vit", ("head",)),
        ("mobilenetv3_small_050", ("classifier",)),
        ("densenet121", ("classifier",)),
        ("convnext_atto", ("head.fc",)),
        ("mambaout_femto", ("head.fc",)),
        ("dla34", ("fc",)),
        ("repvit_m0_9", ("head.head.l", "head.head_dist.l")),
        ("levit_128s", ("head.linear", "head_dist.linear")),
        ("pit_ti_distilled_224", ("head", "head_dist")),
        ("crossvit_tiny_240", ("head.0", "head.1")),
        ("efficientvim_m1", ("heads.0", "heads.1", "heads.2", "heads.3")),
    ],
)
def test_timm(name, heads):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    assert _check_timm(name) == heads


def test_timm_with_an_auxiliary_head():
    make = partial(timm.create_model, "volo_d1_224", num_classes=NUM_CLASSES, img_size=32)
    check_with_whole_model(make, torch.randn(2, 3, 32, 32), r"Something is added after it.*'aux_head' \(0\.5 times\)")


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models())
def test_every_small_timm_model(name):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in timm.create_model(name, num_classes=NUM_CLASSES).parameters())
    if parameters > MAX_PARAMETERS:
        pytest.skip("too large")
    _check_timm(name)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("resnet18", ("fc",)),
        ("mobilenet_v3_small", ("classifier.3",)),
        ("densenet121", ("classifier",)),
        ("convnext_tiny", ("classifier.2",)),
        ("shufflenet_v2_x0_5", ("fc",)),
        ("efficientnet_b0", ("classifier.1",)),
        ("googlenet", ("fc",)),
    ],
)
def test_torchvision(name, heads):
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False} if name == "googlenet" else {}
    make = partial(models.get_model, name, num_classes=NUM_CLASSES, **options)
    assert check(make, torch.randn(2, 3, 64, 64)) == heads


def test_the_vision_transformer_of_torchvision():
    models = pytest.importorskip("torchvision.models")
    make = partial(models.VisionTransformer, 32, 16, 1, 2, 16, 32, num_classes=NUM_CLASSES)
    assert check(partial(random_weights, make), torch.randn(2, 3, 32, 32)) == ("heads.head",)


def test_the_activation_after_the_head_of_squeezenet():
    models = pytest.importorskip("torchvision.models")
    make = partial(models.squeezenet1_1, num_classes=NUM_CLASSES)
    match = r"head 'classifier\.1' of SqueezeNet .*clips.*pass `head=\"forward\"`"
    check_with_whole_model(make, torch.randn(2, 3, 64, 64), match)
