"""Classifiers made of the features of texts."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_calibft.head import ZeroShotHead, attach, find_head, fold, get_gamma, set_gamma
from lightning_calibft.head.layers import head_names
from lightning_calibft.head.probe import probe
from lightning_calibft.head.record import record_logits

from .models import GAMMA, NUM_CLASSES, SEEN, SHIFT, Wrapper

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TOKENS = torch.randint(1, 48, (NUM_CLASSES, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _reference_logits(images, texts, scale, bias=0.0):
    """Cosines, one by one."""
    return torch.tensor(
        [[scale * (x @ t / x.norm() / t.norm()).item() + bias for t in texts] for x in images], dtype=images.dtype
    )


def _transformers(name):
    transformers = pytest.importorskip("transformers")
    vision, text = {**TINY, "image_size": 8, "patch_size": 4}, {**TINY, "vocab_size": 50, "max_position_embeddings": 8}
    text.update(bos_token_id=0, eos_token_id=49, pad_token_id=1)
    projection = {"projection_dim": 12} if name == "CLIP" else {}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **projection)
    tokens = TOKENS.clone()
    tokens[:, -1] = 49
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        output = model(input_ids=tokens, pixel_values=IMAGES)
    return model, tokens, output


def _clip():
    transformers = pytest.importorskip("transformers")
    model, _, output = _transformers("CLIP")
    vision = transformers.CLIPVisionModelWithProjection(model.config.vision_config).eval()
    vision.config.projection_dim = 12
    vision.visual_projection = model.visual_projection
    vision.vision_model = model.vision_model
    return nn.Sequential(vision, ZeroShotHead(output.text_embeds, model.logit_scale.exp())), output.logits_per_image


def _siglip():
    model, _, output = _transformers("Siglip")
    head = ZeroShotHead(output.text_embeds, model.logit_scale.exp(), model.logit_bias)
    return nn.Sequential(model.vision_model, head), output.logits_per_image


def _open_clip():
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 8, "layers": 1, "width": 16, "patch_size": 4, "head_width": 8}
    text = {"context_length": 7, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text).eval()
    with torch.no_grad():
        logits, _ = model.get_logits(IMAGES, TOKENS)
        return nn.Sequential(model.visual, ZeroShotHead(model.encode_text(TOKENS), model.logit_scale.exp())), logits


@pytest.mark.parametrize("make", [_clip, _siglip, _open_clip])
@torch.no_grad()
def test_the_classifier_gives_the_logits_of_the_model_and_is_calibrated(make):
    model, raw = make()
    model.eval()
    torch.testing.assert_close(model(IMAGES), raw, rtol=0, atol=1e-5)
    assert head_names(model, find_head(model)) == ("1",)
    attach(model)
    probe(lambda: model(IMAGES), model)
    set_gamma(model, GAMMA, SEEN)
    with record_logits(model) as recorded:
        calibrated = model(IMAGES)
    torch.testing.assert_close(recorded, [raw], rtol=0, atol=1e-5)
    torch.testing.assert_close(calibrated, raw + SHIFT, rtol=0, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(model)(IMAGES), calibrated)
    assert get_gamma(model) == GAMMA
    fold(model)
    torch.testing.assert_close(model(IMAGES), raw + SHIFT, rtol=0, atol=1e-5)


@torch.no_grad()
def test_clip_itself_with_its_whole_output_as_the_head():
    model, tokens, expected = _transformers("CLIP")

    def forward():
        return model(input_ids=tokens, pixel_values=IMAGES)

    # What transformers says of a model without labels is 2.
    attach(model, head="forward")
    with pytest.raises(ValueError, match=r"CLIPModel to have 2 classes.*the shape \(3, 5\)\. Correct its"):
        forward()
    model, tokens, expected = _transformers("CLIP")
    model.num_classes = NUM_CLASSES
    attach(model, head="forward")
    probe(forward, model)
    set_gamma(model, GAMMA, SEEN)
    with record_logits(model) as recorded:
        output = forward()
    torch.testing.assert_close(recorded, [expected.logits_per_image])
    assert type(output) is type(expected)
    torch.testing.assert_close(output.logits_per_image, expected.logits_per_image + SHIFT)
    torch.testing.assert_close(output.logits_per_text, expected.logits_per_text)
    torch.testing.assert_close(output.image_embeds, expected.image_embeds)


@torch.no_grad()
def test_what_get_image_features_returns_is_an_input():
    model, _, output = _transformers("CLIP")
    head = ZeroShotHead(output.text_embeds, model.logit_scale.exp())
    logits = head(model.get_image_features(pixel_values=IMAGES))
    torch.testing.assert_close(logits, output.logits_per_image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_logits_are_scaled_cosines(dtype):
    texts, images = torch.randn(NUM_CLASSES, 8).to(dtype), torch.randn(3, 8).to(dtype)
    head = ZeroShotHead(texts, logit_scale=20.0, logit_bias=-3.0)
    assert {p.dtype for p in head.parameters()} == {dtype}
    expected = _reference_logits(images.double(), texts.double(), 20.0, -3.0)
    tolerance = 0.3 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(head(images).double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(head(SimpleNamespace(image_embeds=7 * images)), head(images), rtol=0, atol=tolerance)


def test_the_scale_is_100_unless_given():
    texts = torch.randn(NUM_CLASSES, 8)
    expected = _reference_logits(texts, texts, 100.0)
    torch.testing.assert_close(ZeroShotHead(texts)(texts), expected)


def test_the_head_is_frozen_until_asked_and_owns_its_weights():
    texts = torch.randn(NUM_CLASSES, 8, requires_grad=True)
    before, state = texts.detach().clone(), torch.get_rng_state()
    head = ZeroShotHead(texts)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(head, nn.Linear)
    assert (head.in_features, head.out_features) == (8, NUM_CLASSES)
    assert not any(p.requires_grad for p in head.parameters())
    with torch.no_grad():
        head.weight.zero_()
    torch.testing.assert_close(texts.detach(), before, rtol=0, atol=0)
    assert all(p.requires_grad for p in head.requires_grad_().parameters())


def test_the_images_get_gradients_of_a_head_made_in_inference_mode_too():
    images = torch.randn(3, 8, requires_grad=True)
    with torch.inference_mode():
        head = ZeroShotHead(torch.randn(NUM_CLASSES, 8))
    head.requires_grad_()(images).square().sum().backward()
    assert images.grad.abs().sum() > 0
    assert head.weight.grad.abs().sum() > 0


def test_the_head_comes_before_the_classifier_of_the_encoder():
    encoder = nn.Module()
    encoder.head = nn.Linear(8, 12)
    encoder.get_classifier = lambda: encoder.head
    model = nn.ModuleDict({"encoder": encoder, "texts": ZeroShotHead(torch.randn(12, 12))})
    assert find_head(Wrapper(model)) is model["texts"]
    model["other"] = ZeroShotHead(torch.randn(12, 12))
    with pytest.raises(ValueError, match=r"several modules.*: 'model.texts', 'model.other'"):
        find_head(Wrapper(model))


def test_saved_and_loaded(tmp_path):
    head, x = ZeroShotHead(torch.randn(NUM_CLASSES, 8)).eval(), torch.randn(3, 8)
    expected = set_gamma(head, GAMMA, SEEN)(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(head))(x), expected)
    other = attach(ZeroShotHead(torch.randn(NUM_CLASSES, 8))).eval()
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(x), expected)
    plain = ZeroShotHead(torch.randn(NUM_CLASSES, 8)).eval()
    plain.load_state_dict(fold(head).state_dict())
    torch.testing.assert_close(plain(x), expected)


def test_compile_and_export():
    head, x = ZeroShotHead(torch.randn(NUM_CLASSES, 8)).eval(), torch.randn(3, 8)
    expected = set_gamma(head, GAMMA, SEEN)(x)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(head, backend="eager", fullgraph=True)(x), expected)
    torch.testing.assert_close(torch.export.export(nn.Sequential(nn.Identity(), head), (x,)).module()(x), expected)


def test_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = nn.Sequential(nn.Linear(6, 8), ZeroShotHead(torch.randn(NUM_CLASSES, 8))).eval(), torch.randn(3, 6)
    expected = set_gamma(model, GAMMA, SEEN)(x).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(fold(model), (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([[1.0, 0.0]],), TypeError, "`text_features` to be a floating point tensor, but got list"),
        ((torch.ones(2, 2, dtype=torch.long),), TypeError, "but got torch.int64"),
        ((SimpleNamespace(),), TypeError, "pass its `text_embeds` or `pooler_output`"),
        ((torch.ones(3),), ValueError, r"the shape \(C, D\), but got \(3,\)"),
        ((torch.ones(0, 3),), ValueError, r"but got \(0, 3\)"),
        ((torch.zeros(2, 3),), ValueError, "finite rows that are not zero"),
        ((torch.tensor([[1.0, float("nan")]]),), ValueError, "finite rows that are not zero"),
        ((torch.ones(2, 3), 0.0), ValueError, r"`logit_scale` to be positive and finite, but got 0.0.*logit_scale.exp"),
        ((torch.ones(2, 3), -1), ValueError, "but got -1.0"),
        ((torch.ones(2, 3), float("inf")), ValueError, "but got inf"),
        ((torch.ones(2, 3), 1.0, float("nan")), ValueError, "`logit_bias` to be finite, but got nan"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        ZeroShotHead(*arguments)


def test_a_bad_input():
    with pytest.raises(TypeError, match=r"ZeroShotHead to be a tensor, or to have one as .* got <class 'tuple'>"):
        ZeroShotHead(torch.ones(2, 3))((torch.ones(1, 3),))
