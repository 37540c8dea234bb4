"""Heads of models that people use: timm, torchvision, Hugging Face."""

import pytest
import timm
import torch

from lightning_calibft.head import attach, find_head, fold, head_names, probe, record_logits, set_gamma

NUM_CLASSES = 7
MAX_PARAMETERS = 30_000_000
# Their logits are not what one layer gives: VOLO adds the maximum of an auxiliary head.
REFUSED = ("volo_",)


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


@torch.no_grad()
def _check(model, x, logits_of=lambda output: output):
    """Go once around: find, attach, probe, record, calibrate and fold."""
    model.eval()
    keys, raw = list(model.state_dict()), logits_of(model(x))
    names = head_names(model, find_head(model))
    attach(model)
    probe(lambda: model(x), model)
    with record_logits(model) as recorded:
        model(x)
    # Some models without pre-trained weights have logits of 1e9.
    scale = max(1.0, raw.abs().max().item())
    torch.testing.assert_close(recorded, [raw], rtol=0, atol=1e-4 * scale)
    set_gamma(model, scale, seen_classes=[0, 1, 2])
    expected = raw + scale * torch.tensor([0, 0, 0, 1, 1, 1, 1])
    torch.testing.assert_close(logits_of(model(x)), expected, rtol=0, atol=1e-4 * scale)
    fold(model)
    torch.testing.assert_close(logits_of(model(x)), expected, rtol=0, atol=1e-4 * scale)
    assert list(model.state_dict()) == keys
    return names


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
    try:
        model = timm.create_model(name, num_classes=NUM_CLASSES)
    except RuntimeError:
        pytest.skip(f"this timm has no {name}")
    assert _check(model, _first_that_fits(model.eval(), _timm_inputs(name))) == heads


def test_heads_whose_output_is_not_the_logits_are_refused_unless_the_whole_model_is_the_head():
    model = timm.create_model("volo_d1_224", num_classes=NUM_CLASSES, img_size=32)
    x = torch.randn(2, 3, 32, 32)
    attach(model)
    with pytest.raises(ValueError, match=r"Something is added after it.*set `out_features = 7` on the module"):
        probe(lambda: model(x), model)
    model = timm.create_model("volo_d1_224", num_classes=NUM_CLASSES, img_size=32)
    model.out_features = NUM_CLASSES
    attach(model)
    probe(lambda: model(x), model)


@pytest.mark.slow
@pytest.mark.parametrize("name", timm.list_models())
def test_every_small_timm_model(name):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in timm.create_model(name, num_classes=NUM_CLASSES).parameters())
    if parameters > MAX_PARAMETERS:
        pytest.skip("too large")
    model = timm.create_model(name, num_classes=NUM_CLASSES).eval()
    x = _first_that_fits(model, _timm_inputs(name))
    if name.startswith(REFUSED):
        with pytest.raises(ValueError, match="to give the logits"):
            _check(model, x)
    else:
        _check(model, x)


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
    model = models.get_model(name, num_classes=NUM_CLASSES, **options)
    assert _check(model, torch.randn(2, 3, 64, 64)) == heads


def test_the_vision_transformer_of_torchvision():
    models = pytest.importorskip("torchvision.models")
    model = models.VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=NUM_CLASSES)
    torch.nn.init.normal_(model.heads.head.weight)
    assert _check(model, torch.randn(2, 3, 32, 32)) == ("heads.head",)


def test_the_activation_after_the_head_of_squeezenet_is_seen():
    models = pytest.importorskip("torchvision.models")
    model = models.squeezenet1_1(num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match=r"head 'classifier\.1' of SqueezeNet .*clips"):
        _check(model, torch.randn(2, 3, 64, 64))


def _hugging_face():
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**tiny, "image_size": 32, "patch_size": 16}
    text = {**tiny, "vocab_size": 50, "max_position_embeddings": 64}
    pixels, tokens = {"pixel_values": torch.randn(2, 3, 32, 32)}, {"input_ids": torch.randint(3, 50, (2, 6))}
    conv = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return {
        "ViTForImageClassification": ("ViTConfig", vision, pixels, ("classifier",)),
        "ResNetForImageClassification": ("ResNetConfig", conv, pixels, ("classifier.1",)),
        "DeiTForImageClassificationWithTeacher": (
            "DeiTConfig",
            vision,
            pixels,
            ("cls_classifier", "distillation_classifier"),
        ),
        "BertForSequenceClassification": ("BertConfig", text, tokens, ("classifier",)),
        "RobertaForSequenceClassification": ("RobertaConfig", text, tokens, ("classifier.out_proj",)),
    }


@pytest.mark.parametrize("name", _hugging_face())
def test_hugging_face(name):
    transformers = pytest.importorskip("transformers")
    config, options, batch, heads = _hugging_face()[name]
    model = getattr(transformers, name)(getattr(transformers, config)(num_labels=NUM_CLASSES, **options))
    wrapped = _Keywords(model)
    assert _check(wrapped, batch, lambda output: output.logits) == tuple(f"model.{head}" for head in heads)


class _Keywords(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(**batch)
