"""Modules with copies of their network: averages of the weights that are made by hand, and teachers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_calibft import (
    AbsentClassCalibration,
    calibrate,
    detach,
    fold_checkpoint,
    get_gamma,
    inspect_checkpoint,
    load_calibrated,
)
from lightning_calibft.head.offset import attached_heads, offset_of
from tests.helpers.references import _reference_ausuc, _reference_gap
from tests.helpers.runs import (
    ABSENT,
    NUM_CLASSES,
    SEEN,
    TRAIN,
    VAL,
    Plain,
    assert_same,
    loader,
    no_warnings,
    pretrained_weights,
    quiet,
    read,
    trainer_of,
    without_calibration,
)

pytestmark = [quiet, pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")]


class Net(nn.Module):
    def __init__(self, head_first=False):
        super().__init__()
        self.fc = nn.Linear(16, NUM_CLASSES) if head_first else None
        self.body = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.fc = self.fc or nn.Linear(16, NUM_CLASSES)
        self.load_state_dict(pretrained_weights())

    def forward(self, x):
        return self.fc(self.body(x))


class Averaged(Plain):
    """Trains ``model`` and evaluates ``ema``, its average."""

    made_in, head_first = "__init__", False

    def build(self, dropout):
        self.model = Net(self.head_first)
        self.make("__init__")

    def make(self, hook):
        if hook == self.made_in:
            self.ema = self.average()

    def average(self):
        return copy.deepcopy(self.model).requires_grad_(False)

    @property
    def evaluated(self):
        return getattr(self.ema, "module", self.ema)

    def forward(self, x):
        return (self.model if self.training else self.evaluated)(x)

    def setup(self, stage):
        self.make("setup")

    def on_fit_start(self):
        self.make("on_fit_start")

    def on_train_start(self):
        self.make("on_train_start")

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=self.lr, momentum=0.9)

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for average, weight in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            average.lerp_(weight, 0.3)


class WithBuffers(Averaged):
    """Pairs the buffers by position, and some have another shape than others."""

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        super().on_train_batch_end()
        for buffer, other in zip(self.ema.buffers(), self.model.buffers(), strict=False):
            buffer.copy_(other)


class HeadFirst(WithBuffers):
    head_first = True


class ByKeys(Averaged):
    @torch.no_grad()
    def on_train_batch_end(self, *_):
        weights = self.model.state_dict()
        for key, value in self.ema.state_dict().items():
            value.copy_(0.7 * value + 0.3 * weights[key].to(value.dtype))


class OfTorch(Averaged):
    def average(self):
        return AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)

    def on_train_batch_end(self, *_):
        self.ema.update_parameters(self.model)


class OfTimm(Averaged):
    def average(self):
        return ModelEmaV3(self.model, 0.7)

    def on_train_batch_end(self, *_):
        self.ema.update(self.model)


class InValidationOnly(OfTimm):
    """``forward`` calls the trained network, and the validation step its average."""

    def forward(self, x):
        return self.model(x)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.evaluated(batch[0]), batch[1]), batch_size=8)

    test_step = validation_step


class MeanTeacher(Averaged):
    """The average takes part in the training, in eval mode."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            soft = self.ema.eval()(batch[0]).softmax(dim=1)
        return super().training_step(batch, batch_idx) + F.cross_entropy(self(batch[0]), soft)


class WithTeacher(Averaged):
    """The copy is not trained, averaged or evaluated."""

    evaluated = property(lambda self: self.model)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + F.mse_loss(self(batch[0]), self.ema(batch[0]).detach())

    def on_train_batch_end(self, *_):
        pass


AVERAGES = [Averaged, WithBuffers, HeadFirst, ByKeys, OfTorch, OfTimm, InValidationOnly, MeanTeacher]
averages = pytest.mark.parametrize("make", AVERAGES)
HOOKS = ["__init__", "setup", "on_fit_start", "on_train_start"]


def fit(folder, make, *callbacks, **kwargs):
    torch.manual_seed(0)
    module = make()
    checkpoints = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = trainer_of(folder, *callbacks, checkpoints, **kwargs)
    trainer.fit(module, loader(), loader(VAL, shuffle=False))
    return trainer, module.eval(), [folder / f"epoch={epoch}.ckpt" for epoch in range(2)]


@torch.no_grad()
def raw_logits(module, inputs):
    shift = (get_gamma(module) or 0) * torch.isin(torch.arange(NUM_CLASSES), torch.tensor(ABSENT))
    return module.evaluated(inputs) - shift


def assert_calibrated(module):
    """Gamma is that of the evaluated network."""
    inputs, target = TRAIN.tensors
    expected = _reference_gap(raw_logits(module, inputs), target, SEEN, ABSENT)[0]
    (head,) = attached_heads(module.evaluated).values()
    assert offset_of(head).gamma() == pytest.approx(expected, rel=1e-5)
    assert abs(expected) > 1e-3
    return expected


@averages
def test_gamma_is_that_of_the_copy_that_is_evaluated(make, tmp_path):
    with no_warnings():
        trainer, module, files = fit(tmp_path, make, AbsentClassCalibration(), max_epochs=2)
    gamma = assert_calibrated(module)
    assert {name: offset_of(head).gamma() for name, head in attached_heads(module).items()} == {
        "model.fc": pytest.approx(gamma, rel=1e-5),
        "ema.module.fc" if isinstance(module, (OfTorch, OfTimm)) else "ema.fc": pytest.approx(gamma, rel=1e-5),
    }
    expected = _reference_ausuc(raw_logits(module, VAL.tensors[0]), VAL.tensors[1], SEEN, ABSENT)
    assert trainer.callback_metrics["val_ausuc"].item() == pytest.approx(expected, abs=1e-6)
    gammas = [assert_calibrated(load_calibrated(make, file)) for file in files]
    assert gammas[0] != pytest.approx(gammas[1], rel=1e-3)
    fold_checkpoint(files[1], tmp_path / "folded.ckpt")
    folded = make()
    folded.load_state_dict(read(tmp_path / "folded.ckpt")["state_dict"])
    torch.testing.assert_close(folded.eval().evaluated(VAL.tensors[0]), module.evaluated(VAL.tensors[0]))


@averages
@pytest.mark.parametrize("kwargs", [{}, {"refresh_on_validation": True}], ids=["end", "refresh"])
def test_training_and_files_are_those_of_a_run_without(make, kwargs, tmp_path):
    *_, plain = fit(tmp_path / "plain", make)
    *_, with_it = fit(tmp_path / "with", make, AbsentClassCalibration(**kwargs))
    for one, other in zip(plain, with_it, strict=True):
        state, expected = (without_calibration(read(path))["state_dict"] for path in (other, one))
        assert_same({**state}, {**expected})


@pytest.mark.parametrize("make", [ByKeys, OfTorch, OfTimm, InValidationOnly, WithTeacher])
@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("hook", HOOKS[1:])
def test_a_copy_that_is_made_later(make, hook, sanity, tmp_path):
    class Later(make):
        made_in = hook

        @property
        def evaluated(self):  # before the average exists
            return super().evaluated if hasattr(self, "ema") else self.model

    with no_warnings():
        _, module, _ = fit(tmp_path, Later, AbsentClassCalibration(), num_sanity_val_steps=sanity)
    assert_calibrated(module)


@pytest.mark.parametrize("head", ["model.fc", "ema.fc"])
def test_a_named_head_stands_for_its_copies(head, tmp_path):
    _, module, _ = fit(tmp_path, WithBuffers, AbsentClassCalibration(head=head))
    assert_calibrated(module)


@pytest.mark.parametrize("kwargs", [{}, {"refresh_on_validation": True}], ids=["end", "refresh"])
def test_a_teacher_stays_without_gamma(kwargs, tmp_path):
    _, module, files = fit(tmp_path, WithTeacher, AbsentClassCalibration(**kwargs))
    assert_calibrated(module)
    assert offset_of(module.ema.fc).gamma() is None
    for file in files:
        assert inspect_checkpoint(file)["heads"] == ["model.fc"]
        loaded = load_calibrated(WithTeacher, file)
        assert_calibrated(loaded)
        assert list(attached_heads(loaded)) == ["model.fc"]


@averages
def test_a_fresh_module_is_tested_and_resumed(make, tmp_path):
    _, module, files = fit(tmp_path, make, AbsentClassCalibration())
    expected = module.evaluated(VAL.tensors[0])
    for evaluate in ("test", "validate"):
        fresh, trainer = make(), trainer_of(tmp_path, AbsentClassCalibration())
        with no_warnings():
            getattr(trainer, evaluate)(fresh, loader(VAL, shuffle=False), ckpt_path=files[1], verbose=False)
        torch.testing.assert_close(fresh.eval().evaluated(VAL.tensors[0]), expected)
        ausuc = _reference_ausuc(raw_logits(fresh, VAL.tensors[0]), VAL.tensors[1], SEEN, ABSENT)
        (name,) = (name for name in trainer.callback_metrics if name.endswith("ausuc"))
        assert trainer.callback_metrics[name].item() == pytest.approx(ausuc, abs=1e-6)
    resumed = make()
    trainer = trainer_of(tmp_path, AbsentClassCalibration(), max_epochs=3)
    trainer.fit(resumed, loader(), loader(VAL, shuffle=False), ckpt_path=files[1])
    assert_calibrated(resumed.eval())


class Distilled(Plain):
    """The teacher is another network. Only the optimizer knows that it is not trained."""

    def build(self, dropout):
        self.student = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))
        self.teacher = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, NUM_CLASSES))

    def forward(self, x):
        return self.student(x)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            target = self.teacher(batch[0])
        return F.mse_loss(self(batch[0]), target)

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=self.lr)


class DistilledFrozen(Distilled):
    def build(self, dropout):
        super().build(dropout)
        self.teacher.requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class DistilledFromMoreClasses(Distilled):
    def build(self, dropout):
        super().build(dropout)
        self.teacher[1] = nn.Linear(8, 20)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), self.teacher(batch[0])[:, :NUM_CLASSES].argmax(1))


@pytest.mark.parametrize("make", [Distilled, DistilledFrozen, DistilledFromMoreClasses])
def test_the_head_is_never_that_of_the_teacher(make, tmp_path):
    module = make()
    trainer_of(tmp_path, AbsentClassCalibration()).fit(module, loader())
    assert list(attached_heads(module)) == ["student.2"]
    assert get_gamma(module) is not None


@pytest.mark.parametrize("make", [Distilled, DistilledFrozen])
def test_an_error_does_not_name_the_teacher(make, tmp_path):
    class TwoHeads(make):
        def build(self, dropout):
            super().build(dropout)
            self.student = nn.Linear(5, 16)
            self.head_a, self.head_b = nn.Linear(16, NUM_CLASSES), nn.Linear(16, NUM_CLASSES)

        def forward(self, x):
            return self.head_a(self.student(x)), self.head_b(self.student(x))

    trainer = trainer_of(tmp_path, AbsentClassCalibration())
    with pytest.raises(ValueError, match=r"several modules .*'head_a', 'head_b'\. .*`head=\"head_b\"`") as error:
        trainer.fit(TwoHeads(), loader())
    assert "teacher" not in str(error.value)
    assert trainer.global_step == 0


@pytest.mark.parametrize("make", [OfTimm, InValidationOnly])
def test_the_weights_before_fine_tuning_of_the_evaluated_copy(make, tmp_path):
    before = make()
    _, module, _ = fit(tmp_path, make, AbsentClassCalibration(estimator="pseudo_absent", source="train"))
    average, gamma = copy.deepcopy(module.evaluated), get_gamma(module)
    result = calibrate(
        detach(average), loader(), SEEN, estimator="pseudo_absent", pretrained=before.evaluated, progress=False
    )
    assert gamma == pytest.approx(result.gamma, rel=1e-4)


class Ensemble(Averaged):
    """Two networks, both trained and evaluated together."""

    def average(self):
        other = Net()
        nn.init.normal_(other.fc.weight)
        return other

    def forward(self, x):
        return (self.model(x) + self.ema(x)) / 2

    def on_train_batch_end(self, *_):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def test_networks_that_are_evaluated_together(tmp_path):
    trainer, module, _ = fit(tmp_path, Ensemble, AbsentClassCalibration())
    shift = get_gamma(module) * torch.isin(torch.arange(NUM_CLASSES), torch.tensor(ABSENT))
    with torch.no_grad():
        raw, val = (module(data.tensors[0]) - shift for data in (TRAIN, VAL))
    assert get_gamma(module) == pytest.approx(_reference_gap(raw, TRAIN.tensors[1], SEEN, ABSENT)[0], rel=1e-5)
    expected = _reference_ausuc(val, VAL.tensors[1], SEEN, ABSENT)
    assert trainer.callback_metrics["val_ausuc"].item() == pytest.approx(expected, abs=1e-6)


class ValidatesBoth(OfTimm):
    """``forward`` decides."""

    def validation_step(self, batch, batch_idx):
        for name, network in (("trained", self.model), ("average", self.evaluated)):
            self.log(name, F.cross_entropy(network(batch[0]), batch[1]), batch_size=8)


def test_forward_decides_if_both_copies_are_validated(tmp_path):
    with no_warnings():
        trainer, module, _ = fit(tmp_path, ValidatesBoth, AbsentClassCalibration())
    assert_calibrated(module)
    expected = _reference_ausuc(raw_logits(module, VAL.tensors[0]), VAL.tensors[1], SEEN, ABSENT)
    assert trainer.callback_metrics["val_ausuc"].item() == pytest.approx(expected, abs=1e-6)
