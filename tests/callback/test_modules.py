"""The callback is the only change to modules, data and datamodules that are written in many ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_calibft import AbsentClassCalibration
from tests.callback.modules import (
    IMAGES,
    BackboneAndHead,
    ConvHead,
    DictBatch,
    HeadInSetup,
    InConfigureModel,
    InSetup,
    Manual,
    NamedInputs,
    NoForward,
    PopsLabel,
    Probabilities,
    SeveralLoaders,
    TimmNet,
    TimmVit,
    Torchvision,
    Triple,
    TupleInputs,
)
from tests.helpers.runs import (
    ABSENT,
    NUM_CLASSES,
    OFFSET,
    SEEN,
    VAL,
    Plain,
    Stream,
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


def dicts(dataset, **names):
    """Each sample a mapping; ``names`` of the input and the target."""
    return [{names["x"]: x, names["y"]: y} for x, y in dataset]


def shards(dataset):
    """Three loaders of different lengths over disjoint parts."""
    x, y = dataset.tensors
    return [loader(torch.utils.data.TensorDataset(x[a:b], y[a:b])) for a, b in ((0, 10), (10, 17), (17, len(x)))]


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


def probability_of_absent(logits):
    return logits.softmax(1)[:, ABSENT].sum().item()


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
    assert probability_of_absent(logits) > probability_of_absent(raw)


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
        assert values["test_acc_all"] == pytest.approx((predicted == VAL.tensors[1]).double().mean().item())

    resumed, trainer = make(), trainer_of(tmp_path, AbsentClassCalibration(), max_epochs=3)
    trainer.fit(resumed, loader(), ckpt_path=paths[0])
    assert trainer.global_step == 18
    assert_calibrated(resumed.state_dict())


def test_a_backbone_layer_taken_for_a_late_head_is_refused_before_training(tmp_path):
    module = HeadInSetup()
    with pytest.raises(ValueError, match=r'The head is \'fc\': pass `head="fc"`'):
        trainer_of(tmp_path, AbsentClassCalibration()).fit(module, loader())
    assert module.trainer.global_step == 0


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


def test_a_head_that_setup_builds_anew(tmp_path):
    """The one that is there when the callback is set up is not the one that is trained."""

    class Anew(Plain):
        def setup(self, stage):
            self.fc = torch.nn.Linear(16, NUM_CLASSES)

    module = Anew()
    trainer_of(tmp_path, AbsentClassCalibration()).fit(module, loader(), loader(VAL, shuffle=False))
    assert_calibrated(module.state_dict())
