"""Heads of Hugging Face models for images and for texts."""

from functools import partial

import pytest
import torch

from .round_trip import NUM_CLASSES, check, check_with_whole_model, random_weights

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VISION = {**TINY, "image_size": 32, "patch_size": 16}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
CONVOLUTIONAL = {**STAGES, "embedding_size": 8}
MOBILE_VIT = {"hidden_sizes": [16] * 3, "neck_hidden_sizes": [8] * 7, "num_attention_heads": 2}
SWIN = {"image_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
IMAGE_MODELS = {
    "ViT": (VISION, ("classifier",)),
    "DeiT": (VISION, ("classifier",)),
    "DeiTWithTeacher": (VISION, ("cls_classifier", "distillation_classifier")),
    "Swin": (SWIN, ("classifier",)),
    "ConvNextV2": ({**STAGES, "num_stages": 2}, ("classifier",)),
    "Dinov2": ({**VISION, "mlp_ratio": 2}, ("classifier",)),
    "Beit": (VISION, ("classifier",)),
    "MobileNetV2": ({"depth_multiplier": 0.25}, ("classifier",)),
    "MobileViT": (MOBILE_VIT, ("classifier",)),
    "RegNet": ({**CONVOLUTIONAL, "groups_width": 4}, ("classifier.1",)),
    "ResNet": ({**CONVOLUTIONAL, "layer_type": "basic"}, ("classifier.1",)),
}
TEXT = {
    **TINY,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHORT = {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
TEXT_MODELS = {
    "Bert": (TEXT, ("classifier",)),
    "Roberta": (TEXT, ("classifier.out_proj",)),
    "DistilBert": ({**TEXT, **SHORT}, ("classifier",)),
    "Electra": ({**TEXT, "embedding_size": 16}, ("classifier.out_proj",)),
}
# Their head `score` has no bias and gives the logits of each token; the model takes those of the last.
TOKEN_MODELS = {"GPT2": TEXT, "Llama": {**TEXT, "num_key_value_heads": 2}}


def _hugging_face(name, task, options):
    transformers = pytest.importorskip("transformers")
    family = name.removesuffix("WithTeacher")
    config = getattr(transformers, f"{family}Config")(num_labels=NUM_CLASSES, **options)
    model = getattr(transformers, f"{family}For{task}Classification{name.removeprefix(family)}")
    return partial(random_weights, partial(model, config))


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_hugging_face_images(name):
    options, heads = IMAGE_MODELS[name]
    make = _hugging_face(name, "Image", options)
    size = 64 if name.startswith("Mobile") else 32
    assert check(make, {"pixel_values": torch.randn(2, 3, size, size)}) == heads


def _tokens():
    return {"input_ids": torch.randint(3, 50, (2, 6)), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_hugging_face_texts(name):
    options, heads = TEXT_MODELS[name]
    assert check(_hugging_face(name, "Sequence", options), _tokens()) == heads


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_hugging_face_heads_on_each_token(name):
    make = _hugging_face(name, "Sequence", TOKEN_MODELS[name])
    match = r"'score' .* shape \(2, 6, 7\) and the output of the model \(2, 7\).*pass `head=\"forward\"`"
    check_with_whole_model(make, _tokens(), match)
