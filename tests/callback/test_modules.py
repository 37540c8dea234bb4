"""The callback is the only change to modules, data and datamodules that are written in many ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_calibft import AbsentClassCalibration
from tests.runs import (
    ABSENT,
    NUM_CLASSES,
    OFFSET,
    SEEN,
    TRAIN,
    VAL,
    Plain,
    assert_calibrated,
    blobs,
    loader,
    no_warnings,
    pretrained,
    pretrained_weights,
    quiet,
    raw_logits,
    read,
    trainer_of,
)

pytestmark = quiet

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


def dicts(dataset, **names):
    """Each sample a mapping; ``names`` of the input and the target."""
    return [{names["x"]: x, names["y"]: y} for x, y in dataset]


def shards(dataset):
    """Three loaders of different lengths over disjoint parts."""
    x, y = dataset.tensors
    return [loader(torch.utils.data.TensorDataset(x[a:b], y[a:b])) for a, b in ((0, 10), (10, 17), (17, len(x)))]


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return iter(self.dataset)


def triples(batch):
    """What a user passes as ``unpack_batch``."""
    return batch[1], batch[2]


@dataclass
class Case:
    make: Callable = Plain
    train: Callable[[Any], Any] = loader
    val: Callable[[Any], Any] = lambda dataset: loader(dataset, shuffle=False)
    forward: Callable | None = None  # the plain module's logits
    shape: tuple[int, ...] = (5,)
    arguments: dict[str, Any] = field(default_factory=dict)
    pretrain: bool = True


def both(make):
    """The same kind of loader for training and validation."""
    return {"train": make, "val": make}


ONES = torch.ones(())
CASES = {
    "timm": Case(TimmNet, shape=IMAGES, pretrain=False),
    "timm_vit": Case(TimmVit, shape=IMAGES, pretrain=False),
    "backbone_and_head": Case(BackboneAndHead, shape=IMAGES, pretrain=False),
    "torchvision": Case(Torchvision, shape=IMAGES, pretrain=False),
    "in_setup": Case(InSetup, pretrain=False),
    "in_configure_model": Case(InConfigureModel, pretrain=False),
    "head_in_setup": Case(HeadInSetup, pretrain=False, arguments={"head": "fc"}),
    "no_forward": Case(NoForward, forward=lambda module, x: module.net(x)),
    "manual": Case(Manual),
    "dict": Case(DictBatch, **both(lambda dataset: DataLoader(dicts(dataset, x="image", y="label"), 8))),
    "pops_label": Case(PopsLabel, **both(lambda dataset: DataLoader(dicts(dataset, x="image", y="label"), 8))),
    "named_inputs": Case(
        NamedInputs,
        forward=lambda module, x: module(x, torch.full((len(x),), 2.0)),
        **both(lambda dataset: DataLoader([{"scale": 2 * ONES, "image": x, "target": y} for x, y in dataset], 8)),
    ),
    "tuple_inputs": Case(
        TupleInputs,
        forward=lambda module, x: module(x, torch.full((len(x),), 2.0)),
        **both(lambda dataset: DataLoader([((x, 2 * ONES), y) for x, y in dataset], 8)),
    ),
    "unpack_function": Case(
        Triple,
        arguments={"unpack_batch": triples},
        **both(lambda dataset: DataLoader([(i, *pair) for i, pair in enumerate(dataset)], 8)),
    ),
    "unpack_path": Case(
        Triple,
        arguments={"unpack_batch": "tests.callback.test_modules.triples"},
        **both(lambda dataset: DataLoader([(i, *pair) for i, pair in enumerate(dataset)], 8)),
    ),
    "list_of_loaders": Case(SeveralLoaders, train=shards),
    "dict_of_loaders": Case(SeveralLoaders, train=lambda dataset: dict(zip("abc", shards(dataset), strict=True))),
    "iterable": Case(Plain, **both(lambda dataset: DataLoader(Stream(dataset), 8))),
    "probabilities": Case(Probabilities, forward=lambda module, x: module(x).log()),
    "conv_head": Case(ConvHead),
}


def predicted_absent(logits):
    return torch.isin(logits.argmax(1), torch.tensor(ABSENT)).sum().item()


@pytest.mark.parametrize("name", CASES)
def test_the_callback_is_the_only_change(name, tmp_path):
    case = CASES[name]
    train, val = blobs(SEEN, case.shape), blobs([*SEEN, *ABSENT], case.shape, each=4, seed=2)
    torch.manual_seed(0)
    module = case.make()
    if case.pretrain:
        module.load_state_dict(pretrained_weights(case.make, case.forward))
    callback = AbsentClassCalibration(**case.arguments)
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_ausuc", mode="max", save_last=True)
    trainer = trainer_of(tmp_path, callback, checkpoints, max_epochs=1 if case.shape == IMAGES else 2)
    with no_warnings():
        trainer.fit(module, case.train(train), case.val(val))

    reference = {"make": case.make, "forward": case.forward}
    gamma = assert_calibrated(module.state_dict(), train, **reference)
    assert callback.result.gamma == pytest.approx(gamma, rel=1e-6)
    assert callback.result.num_samples == len(train)
    for path in (checkpoints.best_model_path, checkpoints.last_model_path):
        assert_calibrated(read(path)["state_dict"], train, **reference)

    x = torch.randn(64, *case.shape)
    raw = raw_logits(module.state_dict(), x, **reference)
    module.eval()
    with torch.no_grad():
        logits = module(x) if case.forward is None else case.forward(module, x)
    shift = gamma * torch.isin(torch.arange(NUM_CLASSES), torch.tensor(ABSENT))
    torch.testing.assert_close(logits.log_softmax(1), (raw + shift).log_softmax(1))
    assert predicted_absent(logits) > predicted_absent(raw)


@pytest.mark.parametrize("make", [InSetup, InConfigureModel])
def test_a_head_that_is_built_late_is_there_when_weights_are_restored(make, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_ausuc", mode="max", save_top_k=-1)
    trainer_of(tmp_path, AbsentClassCalibration(), checkpoints).fit(make(), loader(), loader(VAL, shuffle=False))
    paths = sorted(checkpoints.best_k_models)

    for path in paths:  # in a fresh Trainer, with a fresh module and callback
        module, trainer = make(), trainer_of(tmp_path, AbsentClassCalibration())
        (values,) = trainer.test(module, loader(VAL, shuffle=False), ckpt_path=path, verbose=False)
        assert_calibrated(module.state_dict())
        assert_calibrated(read(path)["state_dict"])
        assert module.fc.absent_class_calibration.offset == read(path)["state_dict"][f"fc.{OFFSET}"]
        predicted = module.eval()(VAL.tensors[0]).argmax(1)
        assert values["test_acc"] == pytest.approx((predicted == VAL.tensors[1]).double().mean().item())

    resumed, trainer = make(), trainer_of(tmp_path, AbsentClassCalibration(), max_epochs=3)
    trainer.fit(resumed, loader(), ckpt_path=paths[0])
    assert trainer.global_step == 18
    assert_calibrated(resumed.state_dict())


def test_a_backbone_layer_taken_for_a_late_head_is_refused_before_training(tmp_path):
    module = HeadInSetup()
    with pytest.raises(ValueError, match=r'The head is \'fc\': pass `head="fc"`'):
        trainer_of(tmp_path, AbsentClassCalibration()).fit(module, loader())
    assert module.trainer.global_step == 0


class Data(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(VAL, shuffle=False)

    test_dataloader = val_dataloader


def test_a_datamodule(tmp_path):
    module, callback = pretrained(), AbsentClassCalibration()
    trainer = trainer_of(tmp_path, callback, ModelCheckpoint(tmp_path, monitor="val_ausuc", mode="max"))
    trainer.fit(module, datamodule=Data())
    assert_calibrated(module.state_dict())
    trainer.test(module, datamodule=Data(), ckpt_path="best", verbose=False)
    assert_calibrated(module.state_dict())


def mixup(samples):
    """A collate function that gives soft labels."""
    x, y = torch.utils.data.default_collate(samples)
    return (x + x.flip(0)) / 2, (F.one_hot(y, NUM_CLASSES) + F.one_hot(y.flip(0), NUM_CLASSES)) / 2


class MixedData(Data):
    def train_dataloader(self):
        return loader(collate_fn=mixup)


class MixedDataWithClean(MixedData):
    def calibration_dataloader(self):
        return loader()


class WithClean(Plain):
    def calibration_dataloader(self):
        return loader()


@pytest.mark.parametrize("arguments", [{}, {"seen_classes": SEEN}], ids=["inferred", "given"])
@pytest.mark.parametrize(
    ("make", "data"), [(Plain, MixedDataWithClean), (WithClean, MixedData)], ids=["data", "module"]
)
def test_calibration_dataloader_replaces_mixed_labels(make, data, arguments, tmp_path):
    module, callback = pretrained(make), AbsentClassCalibration(**arguments)
    checkpoints = ModelCheckpoint(tmp_path)
    trainer_of(tmp_path, callback, checkpoints).fit(module, datamodule=data())
    assert_calibrated(module.state_dict(), make=make)
    assert_calibrated(read(checkpoints.best_model_path)["state_dict"], make=make)
    assert callback.result.num_samples == len(TRAIN)


class MixesInModel(Plain):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return mixup(list(zip(*batch, strict=True))) if self.training else batch


class MixesInTrainer(Plain):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return mixup(list(zip(*batch, strict=True))) if self.trainer.training else batch


@pytest.mark.parametrize("mixes", [MixesInModel, MixesInTrainer])
@pytest.mark.parametrize("max_epochs", [0, 2])
def test_transfer_hooks_do_not_mix_in_the_pass(mixes, max_epochs, tmp_path):
    class Module(mixes, WithClean):
        pass

    module = pretrained(Module)
    trainer_of(tmp_path, AbsentClassCalibration(), max_epochs=max_epochs).fit(module, loader())
    assert_calibrated(module.state_dict(), make=Module)


class Shifts(Plain):
    """Labels and inputs are what the hooks make of them."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0], batch[1] - 10

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] / 2, batch[1]


@pytest.mark.parametrize("max_epochs", [0, 2])
def test_transfer_hooks_apply_to_the_pass(max_epochs, tmp_path):
    dataset = torch.utils.data.TensorDataset(2 * TRAIN.tensors[0], TRAIN.tensors[1] + 10)
    module = pretrained(Shifts)
    trainer_of(tmp_path, AbsentClassCalibration(), max_epochs=max_epochs).fit(module, loader(dataset))
    assert_calibrated(module.state_dict(), make=Shifts)


def test_a_compiled_module(tmp_path):
    module = pretrained()
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_ausuc", mode="max")
    trainer = trainer_of(tmp_path, AbsentClassCalibration(), checkpoints)
    trainer.fit(torch.compile(module, backend="eager"), loader(), loader(VAL, shuffle=False))
    gamma = assert_calibrated(module.state_dict())
    assert_calibrated(read(checkpoints.best_model_path)["state_dict"])
    x = VAL.tensors[0]
    shift = gamma * torch.isin(torch.arange(NUM_CLASSES), torch.tensor(ABSENT))
    torch.testing.assert_close(module.eval()(x), raw_logits(module.state_dict(), x) + shift)
