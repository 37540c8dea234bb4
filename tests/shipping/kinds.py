"""Every kind of head in a model as small as it gets, and what its input is."""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnetv2 import ResNetV2
from torch import Tensor, nn

from lightning_calibft.head import ZeroShotHead
from tests.head.round_trip import random_weights

NUM_CLASSES = 5
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TOKENS = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


class Kind(NamedTuple):
    """How to make a model, the input, and the argument `head`."""

    build: Callable[[], nn.Module]
    inputs: Tensor
    head: str | None = None

    def make(self) -> nn.Module:
        """Return the model in eval mode, with the same weights each time."""
        return copy.deepcopy(_built(self))


@cache
def _built(kind: Kind) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return random_weights(kind.build).eval()


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=NUM_CLASSES, **options)


_vit = _timm("test_vit", img_size=32)


class CosineHead(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))


def _cosine() -> nn.Module:
    model = _vit()
    model.head = CosineHead(model.num_features, NUM_CLASSES)
    return model


def _torchvision(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    if name == "squeezenet1_1":
        return models.squeezenet1_1(num_classes=NUM_CLASSES)
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=NUM_CLASSES)


def _hugging_face(name: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name.partition('For')[0]}Config")(num_labels=NUM_CLASSES, **options)
    return getattr(transformers, name)(config)


def _clip() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=12, **TINY)
    texts = torch.randn(NUM_CLASSES, 12, generator=torch.Generator().manual_seed(0))
    return nn.Sequential(transformers.CLIPVisionModelWithProjection(config), ZeroShotHead(texts, 10.0))


def _peft(**options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(_vit(), peft.LoraConfig(**options))


def _images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


TEXTS = torch.arange(3, 15).view(2, 6)
# The order is that of the table.
KINDS = {
    "`Linear` (ResNet of timm)": Kind(_timm("test_resnet"), _images()),
    "`Linear` in a container (ConvNeXt of timm)": Kind(_timm("test_convnext"), _images()),
    "1x1 `Conv2d` (ResNetV2 of timm)": Kind(
        partial(ResNetV2, layers=(1, 1), channels=(128, 128), stem_chs=32, num_classes=NUM_CLASSES), _images()
    ),
    "averaged pair (distilled DeiT of timm)": Kind(
        _timm("deit_tiny_distilled_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2), _images()
    ),
    "`ModuleList` (CrossViT of timm)": Kind(
        _timm(
            "crossvit_9_240",
            img_size=48,
            img_scale=(1.0, 1.0),
            embed_dim=(16, 24),
            num_heads=(2, 2),
            depth=((1, 1, 0),),
        ),
        _images(48),
    ),
    "RepVit's classifier (timm)": Kind(_timm("repvit_m0_9", embed_dim=(8, 16), depth=(1, 1)), _images()),
    "custom cosine head": Kind(_cosine, _images()),
    "ResNet of torchvision": Kind(partial(_torchvision, "resnet"), _images()),
    "image classifier of Hugging Face (ViT)": Kind(
        partial(_hugging_face, "ViTForImageClassification", image_size=32, patch_size=16, **TINY), _images()
    ),
    "text classifier of Hugging Face (BERT)": Kind(
        partial(_hugging_face, "BertForSequenceClassification", max_position_embeddings=64, **TINY, **TOKENS), TEXTS
    ),
    "`ZeroShotHead` (CLIP of Hugging Face)": Kind(_clip, _images()),
    "LoRA on the head (PEFT)": Kind(partial(_peft, target_modules=["fc1", "head"]), _images()),
    "head in `modules_to_save` (PEFT)": Kind(
        partial(_peft, target_modules=["fc1"], modules_to_save=["head"]), _images()
    ),
    '`head="forward"` (SqueezeNet of torchvision)': Kind(partial(_torchvision, "squeezenet1_1"), _images(), "forward"),
    '`head="forward"` (GPT-2 of Hugging Face)': Kind(
        partial(
            _hugging_face,
            "GPT2ForSequenceClassification",
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=64,
            use_cache=False,
            **TOKENS,
        ),
        TEXTS,
        "forward",
    ),
}
