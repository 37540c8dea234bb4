"""Ways to write a module and its batches at which attaching has failed. All run as they stand, and train as they do."""

from __future__ import annotations

import warnings
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import AbsentClassCalibration
from tests.helpers.runs import (
    NUM_CLASSES,
    SEEN,
    TRAIN,
    VAL,
    Plain,
    assert_calibrated,
    assert_same,
    loader,
    no_warnings,
    pretrained_weights,
    quiet,
    read,
    split_state,
    trainer_of,
)

pytestmark = quiet


def logits_of_parts(module, x):
    return module.fc(module.body(x))


class NoForward(Plain):
    """The step calls a backbone and a head one after the other."""

    forward = LightningModule.forward  # not overridden

    def logits(self, x):
        return self.fc(self.body(x))

    def loss(self, batch):
        return F.cross_entropy(self.logits(batch[0]), batch[1])


class PartsOfAttribute(NoForward):
    """The attribute has no ``forward``: its parts are called."""

    def build(self, dropout):
        super().build(dropout)
        self.net = nn.Module()
        self.net.body, self.net.fc = self.body, self.fc
        del self.body, self.fc

    def logits(self, x):
        return self.net.fc(self.net.body(x))


class PreparedInAStep(NoForward):
    """The attribute maps inputs to logits, but the step does not pass the inputs as they are."""

    def build(self, dropout):
        super().build(dropout)
        self.net = nn.Sequential(self.body, self.fc)
        del self.body, self.fc

    def logits(self, x):
        return self.net(x / 2)


class ForwardOfPreparedInputs(Plain):
    """``forward`` runs on the inputs of the batch, but the steps do not call it so."""

    def loss(self, batch):
        return F.cross_entropy(self(batch[0] / 2), batch[1])


class LinearProbe(NoForward):
    """The attribute is the head, and it sees the inputs."""

    def build(self, dropout):
        self.model = nn.Linear(5, NUM_CLASSES)

    def logits(self, x):
        return self.model(x)


class ManualWithoutForward(NoForward):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        scheduler = self.lr_schedulers()
        self.toggle_optimizer(first)
        loss = self.loss(batch)
        self.manual_backward(loss)
        self.clip_gradients(first, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        self.untoggle_optimizer(first)
        scheduler.step()
        self.log_dict({"train_loss": loss})

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.fc, self.body)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1, 0.99)]


class OnlyTrainingStep(NoForward):
    """Its validation step needs what only an epoch has."""

    def on_validation_epoch_start(self):
        self.outputs = []

    def validation_step(self, batch, batch_idx):
        self.outputs.append(self.loss(batch))

    def on_validation_epoch_end(self):
        self.log("val_loss", torch.stack(self.outputs).mean())
        del self.outputs


class TakesTheBatchApart(NoForward):
    def loss(self, batch):
        target = batch.pop("label")
        return F.cross_entropy(self.logits(batch.pop("image").mul_(0.5)), target)


class MixesInAHook(Plain):
    """Only training mixes, so the pass reads class ids."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.mixed(*batch) if self.trainer.training else batch

    def mixed(self, x, y):
        return 0.7 * x + 0.3 * x.flip(0), 0.7 * F.one_hot(y, NUM_CLASSES) + 0.3 * F.one_hot(y.flip(0), NUM_CLASSES)


class MixesInAHookOfItsMode(MixesInAHook):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return self.mixed(*batch) if self.training else batch


class MixesPairsInAHook(MixesInAHook):
    """A training batch has four parts, another one two."""

    def mixed(self, x, y):
        return 0.7 * x + 0.3 * x.flip(0), y, y.flip(0), 0.7

    def loss(self, batch):
        x, y, *others = batch
        z = self(x / 2)
        return (
            F.cross_entropy(z, y) if not others else 0.7 * F.cross_entropy(z, y) + 0.3 * F.cross_entropy(z, others[0])
        )


class AugmentsWhileTraining(Plain):
    def forward(self, x):
        if self._trainer is not None and self.trainer.training:
            x = x / 2
        return super().forward(x)


class StepAugmentsWhileTraining(NoForward):
    validation_step = LightningModule.validation_step

    def logits(self, x):
        if self._trainer is not None and self.trainer.training:
            x = x / 2
        return super().logits(x)


class AsksForItsStage(NoForward):
    def training_step(self, batch, batch_idx):
        assert self.trainer.training
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        assert self.trainer.validating or self.trainer.sanity_checking
        return super().validation_step(batch, batch_idx)


class SigmoidOfEachClass(NoForward):
    def loss(self, batch):
        one_hot = F.one_hot(batch[1], NUM_CLASSES).float()
        return F.binary_cross_entropy_with_logits(self.logits(batch[0]), one_hot)


class SigmoidOfAnAttribute(SigmoidOfEachClass):
    def build(self, dropout):
        super().build(dropout)
        self.net = nn.Sequential(self.body, self.fc)
        del self.body, self.fc

    def logits(self, x):
        return self.net(x)


class LossAndAccuracy(Plain):
    """``forward`` takes the batch and returns no logits."""

    def forward(self, batch):
        x, y = batch
        z = logits_of_parts(self, x)
        return F.cross_entropy(z, y), (z.argmax(1) == y).float().mean()

    def loss(self, batch):
        return self(batch)[0]


class WithLabels(Plain):
    def forward(self, input_ids, mask, labels):
        z = self.fc(self.body(input_ids * mask))
        return F.cross_entropy(z, labels), z

    def loss(self, batch):
        return self(*batch)[0]


class WithLabelsByName(WithLabels):
    def loss(self, batch):
        return self(batch["input_ids"], batch["mask"], labels=batch["label"])[0]


class Keywords(Plain):
    def forward(self, **inputs):
        z = self.fc(self.body(inputs["input_ids"] * inputs["mask"]))
        return SimpleNamespace(loss=F.cross_entropy(z, inputs["labels"]), other=SimpleNamespace(scores=z))

    def loss(self, batch):
        return self(**batch).loss


class Masked(Plain):
    """``forward`` also runs without the mask, on which its logits depend."""

    def forward(self, x, mask=None):
        return self.fc(self.body(x if mask is None else x * mask))

    def loss(self, batch):
        return F.cross_entropy(self(batch[0], batch[1]), batch[2])


class FeaturesAndLogits(Plain):
    returned = staticmethod(lambda features, logits: (features, logits))

    def forward(self, x):
        features = self.body(x)
        return self.returned(features, self.fc(features))

    def loss(self, batch):
        features = self.body(batch[0])
        return F.cross_entropy(self.fc(features), batch[1])


class FeaturesLogitsDomain(FeaturesAndLogits):
    """The domain is as wide as the logits."""

    def build(self, dropout):
        super().build(dropout)
        self.domain = nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        features = self.body(x)
        return features, self.domain(features), self.fc(features)


class LogitsInADict(FeaturesAndLogits):
    returned = staticmethod(lambda features, logits: {"embedding": features, "out": {"y_hat": logits}})


Output = namedtuple("Output", ["embedding", "y_hat"])


class LogitsInANamedTuple(FeaturesAndLogits):
    returned = Output


class LogitsInAnObject(FeaturesAndLogits):
    returned = staticmethod(lambda features, logits: SimpleNamespace(embedding=features, y_hat=logits))


class OnePosition(Plain):
    def forward(self, x):
        return self.fc(self.body(x)[:, None])

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]).squeeze(1), batch[1])


class TwoHeads(Plain):
    """One of two heads is meant. The other one is as wide, and also trained."""

    def build(self, dropout):
        super().build(dropout)
        self.genus = nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        features = self.body(x)
        return {"genus": self.genus(features), "species": self.fc(features)}

    def loss(self, batch):
        z = self(batch[0])
        return F.cross_entropy(z["species"], batch[1]) + F.cross_entropy(z["genus"], batch[1] // 2)


class Third(Plain):
    """Also of an index in front, of attributes and of other keys."""

    def loss(self, batch):
        return F.cross_entropy(self(batch[-1]), batch[1])


class FirstAndTarget(Plain):
    target = 1

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[self.target])


class FirstAndLast(FirstAndTarget):
    target = 2


class Keyed(Plain):
    def loss(self, batch):
        return F.cross_entropy(self(batch["image"]), batch["fine_label"])


class Attributes(Plain):
    def loss(self, batch):
        return F.cross_entropy(self(batch.x), batch.y)


class WholeObject(Attributes):
    def forward(self, data):
        return self.fc(self.body(data.x))

    def loss(self, batch):
        return F.cross_entropy(self(batch), batch.y)


class Column(Plain):
    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1].squeeze(1))


class OneHot(Plain):
    """Takes one-hot vectors as a cross-entropy does."""

    def loss(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


@dataclass
class Graph:
    x: torch.Tensor
    y: torch.Tensor


def graphs(samples):
    return Graph(torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples]))


def pairs(make, **options):
    """The loaders of a run, in which ``make`` turns the inputs and the target of a sample into the sample."""
    return {"samples": lambda dataset: [make(x, y) for x, y in dataset], **options}


ONES = torch.full((5,), 2.0)
HALF = {"reference": lambda module, x: module.logits(x)}
TWICE = {"reference": lambda module, x: module.fc(module.body(2 * x))}
BY_PARTS = {"reference": logits_of_parts}
FORMS: dict[str, tuple[type[Plain], dict[str, Any]]] = {
    "no forward": (NoForward, HALF),
    "parts of an attribute": (PartsOfAttribute, HALF),
    "no forward, inputs are prepared": (PreparedInAStep, HALF),
    "forward of prepared inputs": (
        ForwardOfPreparedInputs,
        {"reference": lambda module, x: module(x / 2)},
    ),
    "linear probe": (LinearProbe, HALF),
    "manual optimization without forward": (ManualWithoutForward, HALF),
    "only the training step runs": (OnlyTrainingStep, HALF),
    "a step takes the batch apart": (
        TakesTheBatchApart,
        {"reference": lambda module, x: module.logits(x / 2), **pairs(lambda x, y: {"image": x.clone(), "label": y})},
    ),
    "a hook mixes": (MixesInAHook, {}),
    "a hook of its mode mixes": (MixesInAHookOfItsMode, {}),
    "a hook mixes pairs": (MixesPairsInAHook, {"reference": lambda module, x: module(x / 2)}),
    "forward augments while training": (AugmentsWhileTraining, BY_PARTS),
    "a step augments while training": (StepAugmentsWhileTraining, BY_PARTS),
    "steps ask for their stage": (AsksForItsStage, HALF),
    "sigmoid of each class": (SigmoidOfEachClass, HALF),
    "sigmoid of an attribute": (SigmoidOfAnAttribute, HALF),
    "loss and accuracy": (LossAndAccuracy, BY_PARTS),
    "labels in forward": (WithLabels, {**TWICE, **pairs(lambda x, y: (x, ONES, y))}),
    "labels in forward by name": (
        WithLabelsByName,
        {**TWICE, **pairs(lambda x, y: {"input_ids": x, "mask": ONES, "label": y})},
    ),
    "keywords": (Keywords, {**TWICE, **pairs(lambda x, y: {"input_ids": x, "mask": ONES, "labels": y})}),
    "optional mask": (Masked, {**TWICE, **pairs(lambda x, y: (x, ONES, y))}),
    "features and logits": (FeaturesAndLogits, BY_PARTS),
    "features, domain and logits": (FeaturesLogitsDomain, {**BY_PARTS, "arguments": {"head": "fc"}}),
    "logits in a dict": (LogitsInADict, BY_PARTS),
    "logits in a named tuple": (LogitsInANamedTuple, BY_PARTS),
    "logits in an object": (LogitsInAnObject, BY_PARTS),
    "one position": (OnePosition, BY_PARTS),
    "two heads": (TwoHeads, {**BY_PARTS, "arguments": {"head": "fc"}}),
    "name after the target": (FirstAndTarget, pairs(lambda x, y: (x, y, "name"))),
    "weight before the target": (FirstAndLast, pairs(lambda x, y: (x, torch.rand(()), y))),
    "index after the target": (FirstAndTarget, pairs(lambda x, y: (x, y, 100 + int(1000 * abs(x[0]))))),
    "index before the inputs": (Third, pairs(lambda x, y: (100 + int(1000 * abs(x[0])), y, x))),
    "further keys": (Keyed, pairs(lambda x, y: {"crs": ONES, "image": x, "fine_label": y, "index": 7, "bounds": ONES})),
    "attributes": (Attributes, {"collate": graphs}),
    "whole object": (WholeObject, {"collate": graphs, "reference": logits_of_parts}),
    "column of targets": (Column, pairs(lambda x, y: (x, y[None]))),
    "one-hot targets": (OneHot, pairs(lambda x, y: (x, F.one_hot(y, NUM_CLASSES).float()))),
    "one-hot integers": (
        type("OneHotIntegers", (OneHot,), {"loss": lambda self, b: F.cross_entropy(self(b[0]), b[1].float())}),
        pairs(lambda x, y: (x, F.one_hot(y, NUM_CLASSES))),
    ),
}


def run(folder, name, *callbacks, **trainer):
    """Fine-tune a module of a form. Return it, and the logger and the checkpoints of the run."""
    make, options = FORMS[name]
    torch.manual_seed(3)
    module = make()
    module.load_state_dict(pretrained_weights(make, options.get("reference")))
    samples, collate = options.get("samples", list), options.get("collate")
    train, val = (DataLoader(samples(data), 8, shuffle=data is TRAIN, collate_fn=collate) for data in (TRAIN, VAL))
    checkpoints, logger = ModelCheckpoint(folder, save_last=True), CSVLogger(folder)
    options = {"logger": logger, "log_every_n_steps": 1, **trainer}
    trainer_of(folder, *callbacks, checkpoints, **options).fit(module, train, val)
    return module, logger, checkpoints


@pytest.mark.parametrize("name", FORMS)
def test_a_form_runs_as_it_stands_and_trains_as_it_does(name, tmp_path):
    make, options = FORMS[name]
    plain, logged, _ = run(tmp_path / "plain", name)
    callback = AbsentClassCalibration(**options.get("arguments", {}))
    with no_warnings():
        module, logged_with, checkpoints = run(tmp_path / "with", name, callback)

    reference = {"make": make, "forward": options.get("reference")}
    gamma = assert_calibrated(module.state_dict(), **reference)
    assert callback.result.gamma == pytest.approx(gamma, rel=1e-6)
    for path in (checkpoints.best_model_path, checkpoints.last_model_path):
        assert_calibrated(read(path)["state_dict"], **reference)
    assert_same(split_state(module.state_dict())[0], dict(plain.state_dict()))
    losses, losses_with = (
        [{key: row[key] for key in row if "loss" in key} for row in each.experiment.metrics]
        for each in (logged, logged_with)
    )
    assert [row for row in losses_with if row] == [row for row in losses if row]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("features and logits", "The head is 'fc': pass `head=\"fc\"`."),
        ("loss and accuracy", "The head may be 'fc': pass `head=\"fc\"`."),
        ("two heads", "Its output holds the logits of 'genus' and 'fc'. Name one: `head=\"fc\"`."),
    ],
)
def test_the_advice_names_the_head_and_never_the_features(name, advice, tmp_path):
    with pytest.raises(ValueError, match=r"Expected the head 'body\.0' of") as error:
        run(tmp_path, name, AbsentClassCalibration(head="body.0"))
    assert str(error.value).endswith(advice)


UNLABELED = {
    "one tensor": TensorDataset(VAL.tensors[0]),
    "weak and strong": TensorDataset(VAL.tensors[0], VAL.tensors[0] + 0.1),
    "marked -1": TensorDataset(VAL.tensors[0], torch.full((len(VAL),), -1)),
    "labels that training does not use": VAL,
    "marked -100": TensorDataset(VAL.tensors[0], torch.full((len(VAL),), -100)),
}


class SemiSupervised(Plain):
    def training_step(self, batch, batch_idx):
        pseudo = self(batch["unlabeled"][0]).detach().argmax(1)
        return self.loss(batch["labeled"]) + 0.1 * F.cross_entropy(self(batch["unlabeled"][0]), pseudo)


@pytest.mark.parametrize("kind", UNLABELED)
@pytest.mark.parametrize("seen", [None, SEEN])
def test_of_several_loaders_only_the_labeled_one_is_read(kind, seen, tmp_path):
    module, callback = SemiSupervised(), AbsentClassCalibration(seen)
    module.load_state_dict(pretrained_weights())
    loaders = {"labeled": loader(), "unlabeled": loader(UNLABELED[kind])}
    with no_warnings():
        trainer_of(tmp_path, callback).fit(module, CombinedLoader(loaders, "max_size_cycle"), loader(VAL))
    assert_calibrated(module.state_dict())
    assert callback.result.num_samples == len(TRAIN)


class SeveralTasks(Plain):
    """Heads of other widths than the one that is meant, in a dictionary or as attributes."""

    def build(self, dropout):
        super().build(dropout)
        del self.fc
        wide = nn.Sequential(nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 2 * NUM_CLASSES))
        self.heads = nn.ModuleDict({"species": nn.Linear(16, NUM_CLASSES), "site": wide})

    def forward(self, x):
        features = self.body(x)
        return {name: head(features) for name, head in self.heads.items()}

    def loss(self, batch):
        z = self(batch[0])
        return F.cross_entropy(z["species"], batch[1]) + F.cross_entropy(z["site"], batch[1] + 1)


class SeveralTaskHeads(SeveralTasks):
    def build(self, dropout):
        super().build(dropout)
        self.task_heads = self.heads
        del self.heads

    def forward(self, x):
        features = self.body(x)
        return {name: head(features) for name, head in self.task_heads.items()}


class SeveralAttributes(SeveralTasks):
    def build(self, dropout):
        super().build(dropout)
        self.species_head, self.site_head = self.heads["species"], self.heads["site"]
        del self.heads

    def forward(self, x):
        features = self.body(x)
        return {"species": self.species_head(features), "site": self.site_head(features)}


@pytest.mark.parametrize(
    ("make", "head", "other"),
    [
        (SeveralTasks, "heads.species", "heads.site.2"),
        (SeveralTaskHeads, "task_heads.species", "task_heads.site.2"),
        (SeveralAttributes, "species_head", "site_head.2"),
    ],
)
def test_one_of_several_tasks_must_be_named(make, head, other, tmp_path):
    reference = {"make": make, "forward": lambda module, x: module(x)["species"]}
    module = make()
    module.load_state_dict(pretrained_weights(make, reference["forward"]))
    with pytest.raises(ValueError, match=f"could be the classification head: '{head}', '{other}'"):
        trainer_of(tmp_path, AbsentClassCalibration()).fit(module, loader())
    assert module.trainer.global_step == 0
    trainer_of(tmp_path, AbsentClassCalibration(head=head)).fit(module, loader())
    assert_calibrated(module.state_dict(), **reference)


class Raises(Plain):
    def forward(self, x, y, z):
        raise KeyError("of the user")

    loss = NoForward.loss
    logits = NoForward.logits

    def training_step(self, batch, batch_idx):
        return None if batch_idx is None else 1 / 0

    def validation_step(self, batch, batch_idx):
        raise NotImplementedError("also of the user")


def test_the_error_that_is_left_names_the_call_and_the_line_and_the_argument(tmp_path):
    module = Raises()
    with pytest.raises(ValueError, match="Could not read the logits of Raises") as error:
        trainer_of(tmp_path, AbsentClassCalibration(), num_sanity_val_steps=0).fit(module, loader())
    text = str(error.value)
    assert "`forward(batch[0])` raised TypeError" in text
    assert "`validation_step` raised NotImplementedError at " in text
    assert "test_forms.py" in text
    assert '(`raise NotImplementedError("also of the user")`): also of the user' in text
    assert "`training_step` raised ZeroDivisionError" in text
    assert "Pass `unpack_batch`" in text
    assert module.trainer.global_step == 0


class Clipped(NoForward):
    def logits(self, x):
        return self.fc(self.body(x)).relu()


class Auxiliary(NoForward):
    def build(self, dropout):
        super().build(dropout)
        self.other = nn.Linear(16, NUM_CLASSES)

    def loss(self, batch):
        self.other(self.body(batch[0]))
        return super().loss(batch)


class Prototypes(NoForward):
    """The output of its only layer is as wide as the features."""

    def build(self, dropout):
        self.encoder = nn.Linear(5, 8)
        self.prototypes = nn.Parameter(torch.randn(NUM_CLASSES, 8))

    def logits(self, x):
        return -torch.cdist(self.encoder(x), self.prototypes)


class PrototypesOfAnEncoder(Prototypes):
    """The attribute maps inputs to features."""

    def build(self, dropout):
        super().build(dropout)
        self.encoder = nn.Sequential(self.encoder)


@pytest.mark.parametrize(
    ("make", "head", "text"),
    [
        (Clipped, "fc", "a number added to all its outputs changes the loss, .* define `forward`"),
        (Prototypes, None, "a number added to all its outputs changes the loss, .* define `forward`"),
        (PrototypesOfAnEncoder, None, "a number added to all its outputs changes the loss, .* define `forward`"),
        (Auxiliary, "other", r'its output does not reach the loss.* The head may be \'fc\': pass `head="fc"`'),
    ],
)
def test_a_head_whose_output_is_not_the_logits_of_the_loss_is_refused(make, head, text, tmp_path):
    module = make()
    with pytest.raises(ValueError, match=text):
        trainer_of(tmp_path, AbsentClassCalibration(head=head)).fit(module, loader(), loader(VAL))
    assert module.trainer.global_step == 0


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (torch.full((len(TRAIN),), -1), "but got -1. Samples without a label are often marked -1"),
        (TRAIN.tensors[1] + 4, r"class ids in \[0, 6\), rows of the classification head, but got"),
        (0.5 * F.one_hot(TRAIN.tensors[1], NUM_CLASSES), "Soft and multi-label targets do not name a single class"),
    ],
)
def test_labels_are_refused_before_the_first_step(target, text, tmp_path):
    module = Plain()
    with pytest.raises((TypeError, ValueError), match=text):
        trainer_of(tmp_path, AbsentClassCalibration()).fit(module, loader(TensorDataset(TRAIN.tensors[0], target)))
    assert module.trainer.global_step == 0


class MixesInItsStep(Plain):
    """The inputs of the batch are not those of the step, and nobody knows the labels of what is mixed."""

    validation_step = LightningModule.validation_step

    def training_step(self, batch, batch_idx):
        order = torch.randperm(len(batch[0]))
        return F.cross_entropy(self(0.7 * batch[0] + 0.3 * batch[0][order]), batch[1])


def test_inputs_that_a_step_mixes_are_read_as_they_are(tmp_path):
    module = MixesInItsStep()
    module.load_state_dict(pretrained_weights())
    trainer_of(tmp_path, AbsentClassCalibration()).fit(module, loader())
    assert_calibrated(module.state_dict())


class Logs(Plain):
    """Logs in ``forward``, to the Trainer and to the logger itself, and keeps a state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.sizes, self.generator = [], torch.Generator().manual_seed(4)

    def forward(self, x):
        z = super().forward(x + 0.01 * torch.rand((), generator=self.generator))
        self.calls += 1
        self.sizes.append(len(x))
        if self._trainer is not None:
            self.log("entropy", z.softmax(1).amax(), on_epoch=True, on_step=False)
            self.logger.log_metrics({"direct": float(self.calls)})
        return z


@pytest.mark.parametrize(
    "arguments",
    [{}, {"refresh_on_validation": True}, {"source": "training_steps", "seen_classes": SEEN}, {"tolerance": 0.3}],
)
def test_an_evaluation_logs_nothing_and_leaves_no_state(arguments, tmp_path):
    runs = []
    for callbacks in ([], [AbsentClassCalibration(**arguments, log_metrics=False)]):
        torch.manual_seed(3)
        module, logger = Logs(), CSVLogger(tmp_path / str(len(runs)))
        module.load_state_dict({**pretrained_weights(), "calls": torch.zeros(())})
        trainer_of(tmp_path, *callbacks, logger=logger, log_every_n_steps=1).fit(module, loader(), loader(VAL))
        rows = [row for row in logger.experiment.metrics if not any("gamma" in key for key in row)]
        rows = [{key: value for key, value in row.items() if "calibrated" not in key} for row in rows]
        state = {key: value for key, value in module.state_dict().items() if "absent" not in key}
        runs.append((rows, state, module.sizes, module.generator.get_state()))
    for plain, other in zip(*runs, strict=True):
        assert_same(plain, other)


def test_the_loggers_of_the_trainer_are_its_own_again(tmp_path):
    callback = AbsentClassCalibration()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, logger, _ = run(tmp_path, "no forward", callback)
    assert module.trainer.loggers == [logger]
    assert "log" not in vars(module)
    assert "optimizers" not in vars(module)
