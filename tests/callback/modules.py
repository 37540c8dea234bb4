"""Modules as users write them: nothing in them knows of the calibration."""

from __future__ import annotations

import timm
import torch.nn.functional as F
import torchvision
from lightning.pytorch import LightningModule
from torch import nn

from tests.helpers.runs import (
    NUM_CLASSES,
    Plain,
    pretrained_weights,
)

IMAGES = (3, 16, 16)


class TimmNet(Plain):
    name, options, rate = "test_efficientnet_ln", {}, 0.003

    def build(self, dropout):
        self.lr = self.rate
        self.net = timm.create_model(self.name, pretrained=False, num_classes=NUM_CLASSES, **self.options)

    def forward(self, x):
        return self.net(x)


class TimmVit(TimmNet):
    name, options, rate = "test_vit", {"img_size": 16}, 0.001


class BackboneAndHead(Plain):
    def build(self, dropout):
        self.backbone = timm.create_model("test_resnet", pretrained=False, num_classes=0)
        self.head = nn.Linear(self.backbone.num_features, NUM_CLASSES)

    def forward(self, x):
        return self.head(self.backbone(x))


class Torchvision(Plain):
    def build(self, dropout):
        self.model = torchvision.models.resnet18(num_classes=NUM_CLASSES)

    def forward(self, x):
        return self.model(x)


class InSetup(Plain):
    """Not even the backbone exists before."""

    def build(self, dropout):
        pass

    def setup(self, stage):
        if not hasattr(self, "fc"):
            super().build(0.0)
            self.load_state_dict(pretrained_weights())


class InConfigureModel(Plain):
    def build(self, dropout):
        pass

    def configure_model(self):
        if not hasattr(self, "fc"):
            super().build(0.0)
            self.load_state_dict(pretrained_weights())


class HeadInSetup(Plain):
    """The backbone has a linear layer that is not the head."""

    def build(self, dropout):
        super().build(dropout)
        del self.fc

    def setup(self, stage):
        if not hasattr(self, "fc"):
            self.fc = nn.Linear(16, NUM_CLASSES)
            self.load_state_dict(pretrained_weights())


class NoForward(Plain):
    def build(self, dropout):
        self.net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))

    forward = LightningModule.forward  # not overridden

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class Manual(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class DictBatch(Plain):
    def loss(self, batch):
        return F.cross_entropy(self(batch["image"]), batch["label"])


class PopsLabel(Plain):
    def loss(self, batch):
        target = batch.pop("label")
        return F.cross_entropy(self(batch.pop("image")), target)


class NamedInputs(Plain):
    """Two tensors in a mapping, told apart by the names of the arguments of ``forward``."""

    def forward(self, image, scale):
        return self.fc(self.body(image * scale[:, None]))

    def loss(self, batch):
        return F.cross_entropy(self(batch["image"], batch["scale"]), batch["target"])


class TupleInputs(Plain):
    def forward(self, x, scale):
        return self.fc(self.body(x * scale[:, None]))

    def loss(self, batch):
        return F.cross_entropy(self(*batch[0]), batch[1])


class Triple(Plain):
    def loss(self, batch):
        index, x, target = batch
        assert index.ndim == 1
        return F.cross_entropy(self(x), target)


class SeveralLoaders(Plain):
    def training_step(self, batch, batch_idx):
        parts = batch.values() if isinstance(batch, dict) else batch
        return sum(self.loss(part) for part in parts if part is not None)


class Probabilities(Plain):
    def forward(self, x):
        return super().forward(x).softmax(dim=1)

    def loss(self, batch):
        return F.nll_loss(self(batch[0]).log(), batch[1])


class ConvHead(Plain):
    def build(self, dropout):
        self.body = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Unflatten(1, (16, 1, 1)))
        self.classifier = nn.Conv2d(16, NUM_CLASSES, 1)

    def forward(self, x):
        return self.classifier(self.body(x)).flatten(1)
