"""Modules that build their network, or its head, again: before weights are restored, and in the middle of a fit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_calibft import AbsentClassCalibration, attach, get_gamma, load_calibrated, set_gamma
from lightning_calibft.head.offset import attached_heads
from tests.helpers.runs import (
    ABSENT,
    NUM_CLASSES,
    OFFSET,
    SEEN,
    VAL,
    Plain,
    assert_calibrated,
    loader,
    no_warnings,
    pretrained,
    pretrained_weights,
    quiet,
    raw_logits,
    read,
    split_state,
    trainer_of,
)

pytestmark = quiet
X = VAL.tensors[0]


class Rebuilds(Plain):
    """Builds its network with a head of ``width``, and again in one of its hooks."""

    hook = "on_load_checkpoint"

    def __init__(self, width=NUM_CLASSES):
        self.width = width
        super().__init__()

    def build(self, dropout):
        super().build(dropout)
        self.fc = nn.Linear(16, self.width)

    def build_again(self, hook, width=NUM_CLASSES):
        if hook == self.hook and self.width != width:
            self.width = width
            self.build(0.0)
            self.load_state_dict(pretrained_weights())

    def setup(self, stage):
        self.build_again("setup")

    def configure_model(self):
        self.build_again("configure_model")

    def on_save_checkpoint(self, checkpoint):
        checkpoint["width"] = self.width

    def on_load_checkpoint(self, checkpoint):
        if self.hook == "on_load_checkpoint":
            self.width = checkpoint["width"]
            self.build(0.0)


class InSetup(Rebuilds):
    hook = "setup"


class InConfigureModel(Rebuilds):
    hook = "configure_model"


widths = pytest.mark.parametrize("width", [2, NUM_CLASSES, 9])
arguments = pytest.mark.parametrize("kwargs", [{}, {"seen_classes": SEEN, "absent_classes": ABSENT}], ids=["", "given"])


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rebuilds")
    module = Rebuilds()
    module.load_state_dict(pretrained_weights())
    checkpoints = ModelCheckpoint(folder, save_last=True)
    trainer_of(folder, AbsentClassCalibration(), checkpoints).fit(module, loader())
    return checkpoints.last_model_path


def expected_logits(path):
    state = read(path)["state_dict"]
    return raw_logits(state, X) + split_state(state)[1] * torch.isin(torch.arange(NUM_CLASSES), torch.tensor(ABSENT))


@widths
@arguments
def test_a_fresh_module_is_evaluated_with_the_weights_of_a_file(width, kwargs, best, tmp_path):
    expected = expected_logits(best)
    loss = F.cross_entropy(expected, VAL.tensors[1]).item()
    for evaluate, name in (("test", "test_loss"), ("validate", "val_loss")):
        module, trainer = Rebuilds(width), trainer_of(tmp_path, AbsentClassCalibration(**kwargs))
        with no_warnings():
            getattr(trainer, evaluate)(module, loader(VAL, shuffle=False), ckpt_path=best, verbose=False)
        assert trainer.callback_metrics[name].item() == pytest.approx(loss, rel=1e-5)
        assert_calibrated(module.state_dict())
    trainer = trainer_of(tmp_path, AbsentClassCalibration(**kwargs))
    predictions = trainer.predict(Rebuilds(width), DataLoader(X, 16), ckpt_path=best)
    torch.testing.assert_close(torch.cat(predictions), expected)


@widths
def test_the_module_of_a_fit_is_tested_with_an_earlier_file(width, tmp_path):
    module, checkpoints = pretrained(Rebuilds), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = trainer_of(tmp_path, AbsentClassCalibration(), checkpoints)
    trainer.fit(module, loader())
    first = tmp_path / "epoch=0.ckpt"
    assert split_state(read(first)["state_dict"])[1] != pytest.approx(get_gamma(module), rel=1e-3)
    module.width = width
    trainer.test(module, loader(VAL, shuffle=False), ckpt_path=first, verbose=False)
    torch.testing.assert_close(module.eval()(X), expected_logits(first))


@widths
@arguments
def test_a_fit_is_resumed(width, kwargs, best, tmp_path):
    module = Rebuilds(width)
    trainer_of(tmp_path, AbsentClassCalibration(**kwargs), max_epochs=3).fit(module, loader(), ckpt_path=best)
    assert_calibrated(module.state_dict())
    assert module.strict_loading


@widths
@arguments
@pytest.mark.parametrize("make", [InSetup, InConfigureModel])
def test_a_network_that_is_built_again_before_the_fit(make, width, kwargs, tmp_path):
    module, checkpoints = make(width), ModelCheckpoint(tmp_path, save_last=True)
    if width == NUM_CLASSES:
        module.load_state_dict(pretrained_weights())
    trainer_of(tmp_path, AbsentClassCalibration(**kwargs), checkpoints).fit(module, loader())
    assert_calibrated(module.state_dict())
    fresh = make(width)
    trainer = trainer_of(tmp_path, AbsentClassCalibration(**kwargs))
    trainer.test(fresh, loader(VAL, shuffle=False), ckpt_path=checkpoints.last_model_path, verbose=False)
    torch.testing.assert_close(fresh.eval()(X), module.eval()(X))


@widths
def test_load_calibrated_uses_the_hooks_of_the_module(width, best):
    torch.testing.assert_close(load_calibrated(Rebuilds, best, width=width)(X), expected_logits(best))


def test_a_file_without_a_calibration_resets_gamma(tmp_path):
    path = tmp_path / "plain.ckpt"
    trainer = trainer_of(tmp_path)
    trainer.fit(pretrained(Rebuilds), loader())
    trainer.save_checkpoint(path)
    module = set_gamma(pretrained(Rebuilds), 2.0, SEEN)
    trainer_of(tmp_path, AbsentClassCalibration()).validate(
        module, loader(VAL, shuffle=False), ckpt_path=path, verbose=False
    )
    assert get_gamma(module) is None
    assert list(attached_heads(module)) == ["fc"]


class Replaces(Plain):
    """Replaces its head, and trains on, as with ``reset_classifier``."""

    hook, epoch, width = "on_train_epoch_start", 1, NUM_CLASSES

    def replace(self, hook):
        if hook == self.hook and self.current_epoch == self.epoch and self.fc.weight.requires_grad:
            with torch.random.fork_rng():
                torch.manual_seed(1)
                self.old, self.fc = [self.fc.requires_grad_(False)], nn.Linear(16, self.width)
            self.trainer.optimizers = [self.configure_optimizers()]
            self.epoch = -1

    def on_train_epoch_start(self):
        self.replace("on_train_epoch_start")

    def on_train_start(self):
        self.replace("on_train_start")

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 3:
            self.replace("on_train_batch_start")

    def on_train_batch_end(self, *_):
        if self.trainer.is_last_batch:
            self.replace("on_train_batch_end")

    def on_train_end(self):
        if self.hook == "on_train_end":
            self.fc = copy.deepcopy(self.fc)


WHERE = [
    ("on_train_start", 0),
    ("on_train_epoch_start", 0),
    ("on_train_epoch_start", 1),
    ("on_train_batch_start", 0),
    ("on_train_batch_start", 1),
    ("on_train_batch_end", 1),
]


@pytest.mark.parametrize("where", WHERE, ids=map(str, WHERE))
@pytest.mark.parametrize("kwargs", [{}, {"refresh_on_validation": True}, {"seen_classes": SEEN}], ids=str)
def test_a_head_that_is_replaced_in_the_fit(where, kwargs, tmp_path):
    def fit(*callbacks):
        torch.manual_seed(0)
        module = pretrained(Replaces)
        module.hook, module.epoch = where
        checkpoints = ModelCheckpoint(tmp_path / str(len(callbacks)), save_last=True)
        trainer_of(tmp_path, *callbacks, checkpoints).fit(module, loader(), loader(VAL, shuffle=False))
        return module, read(checkpoints.last_model_path)["state_dict"]

    module, saved = fit(AbsentClassCalibration(**kwargs))
    assert_calibrated(module.state_dict())
    assert_calibrated(saved)
    assert module.old[0] not in attached_heads(module).values()
    plain, _ = fit()
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("where", [("on_train_start", 0), ("on_train_epoch_start", 1)], ids=map(str, WHERE[:3:2]))
def test_the_training_steps_of_the_new_head_count(where, tmp_path):
    class Remembers(Replaces):
        def __init__(self):
            super().__init__()
            self.logits = []

        def loss(self, batch):
            logits = self(batch[0])
            if self.training:
                self.logits.append((self.current_epoch, logits.detach(), batch[1]))
            return F.cross_entropy(logits, batch[1])

    module = pretrained(Remembers)
    module.hook, module.epoch = where
    trainer_of(tmp_path, AbsentClassCalibration(SEEN, source="training_steps")).fit(module, loader())
    last = [(logits, target) for epoch, logits, target in module.logits if epoch == 1]
    logits, target = (torch.cat(parts).double() for parts in zip(*last, strict=True))
    others = logits[:, SEEN].sum(1) - logits.gather(1, target.long()[:, None])[:, 0]
    gap = others / (len(SEEN) - 1) - logits[:, ABSENT].mean(1)
    assert get_gamma(module) == pytest.approx(gap.mean().item(), rel=1e-5)


def test_a_head_of_another_width_in_the_fit(tmp_path):
    class Wider(Replaces):
        width = 9

    module = pretrained(Wider)
    with no_warnings():
        callback = AbsentClassCalibration()
        trainer_of(tmp_path, callback).fit(module, loader(), loader(VAL, shuffle=False))
    assert callback.result.split.num_classes == 9
    assert list(callback.result.split.seen_classes) == SEEN
    assert module.fc.absent_class_calibration.mask.nonzero().flatten().tolist() == [*ABSENT, 6, 7, 8]


class Whole(Plain):
    """Only the output of the network is the logits. Its inner layers have the same width."""

    def build(self, dropout):
        self.net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES), nn.Softplus())

    def forward(self, x):
        return self.net(x)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    module = pretrained(Whole)
    module.net.num_classes = NUM_CLASSES
    checkpoints = ModelCheckpoint(folder, save_last=True)
    trainer_of(folder, AbsentClassCalibration(head="net.forward"), checkpoints).fit(module, loader())
    return module.eval(), checkpoints.last_model_path


def test_a_file_is_loaded_at_the_module_that_it_names(whole, tmp_path):
    module, path = whole
    loaded = load_calibrated(Whole, path)  # it does not state its number of classes
    assert list(attached_heads(loaded)) == ["net"]
    assert torch.equal(loaded(X), module(X))
    assert not torch.allclose(module(X), module.train()(X))
    module.eval()
    # A Trainer, too, finds the head in the file, and the calibrated module stays what it is.
    for fresh in (Whole(), loaded):
        trainer = trainer_of(tmp_path, AbsentClassCalibration())
        trainer.test(fresh, loader(VAL, shuffle=False), ckpt_path=path, verbose=False)
        assert list(attached_heads(fresh)) == ["net"]
        assert torch.equal(fresh.eval()(X), module(X))


def test_a_class_that_attaches_elsewhere_is_loaded_as_the_file_says(whole):
    class Attaches(Whole):
        def build(self, dropout):
            super().build(dropout)
            attach(self)

    module, path = whole
    loaded = load_calibrated(Attaches, path)
    assert list(attached_heads(loaded)) == ["net"]
    assert torch.equal(loaded(X), module(X))


def test_the_names_of_a_file_may_have_other_wrappers(tmp_path):
    class Compiled(Plain):
        def build(self, dropout):
            super().build(dropout)
            self.body = torch.nn.DataParallel(self.body)
            self.fc = torch.compile(self.fc, backend="eager")

    class Unwraps(Plain):
        def on_load_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {
                key.replace("._orig_mod", "").replace(".module", ""): value for key, value in state.items()
            }

    module, checkpoints = Compiled(), ModelCheckpoint(tmp_path, save_last=True)
    trainer_of(tmp_path, AbsentClassCalibration(), checkpoints).fit(module, loader())
    assert f"fc._orig_mod.{OFFSET}" in module.state_dict()
    for make, name in ((Compiled, "fc._orig_mod"), (Unwraps, "fc")):
        loaded = load_calibrated(make, checkpoints.last_model_path)
        assert list(attached_heads(loaded)) == [name]
        torch.testing.assert_close(loaded(X), module.eval()(X))


def test_a_class_without_the_module_of_the_file_is_refused(whole):
    class Other(Plain):
        def build(self, dropout):
            self.model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES), nn.Softplus())

        def on_load_checkpoint(self, checkpoint):
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {key.replace("net.", "model."): value for key, value in state.items()}

    with pytest.raises(ValueError, match=r"`module_class` to have the module 'net', .*Other has none\. Pass the class"):
        load_calibrated(Other, whole[1])


def test_a_mask_of_another_width_is_refused(best, tmp_path):
    checkpoint = read(best)
    key = next(key for key in checkpoint["state_dict"] if key.endswith("mask"))
    checkpoint["state_dict"][key] = torch.ones(4)
    checkpoint.pop("lightning_calibft")
    torch.save(checkpoint, tmp_path / "narrow.ckpt")
    with pytest.raises(ValueError, match=r"one number of classes, but got \[4, 6\]"):
        load_calibrated(Rebuilds, tmp_path / "narrow.ckpt")


class OneLogit(Plain):
    def build(self, dropout):
        super().build(dropout)
        self.fc = nn.Linear(16, 1)

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0])[:, 0], (batch[1] > 0).float())


@pytest.mark.parametrize("kwargs", [{}, {"seen_classes": SEEN}, {"head": "fc"}], ids=str)
def test_a_binary_classifier_has_no_absent_classes(kwargs, tmp_path):
    module, trainer = OneLogit(), trainer_of(tmp_path, AbsentClassCalibration(**kwargs))
    with pytest.raises(ValueError, match=r"'fc' of OneLogit to have one output for each class.*has no absent classes"):
        trainer.fit(module, loader())
    assert trainer.global_step == 0
    assert not attached_heads(module)


def test_the_old_head_may_stay_in_the_module(tmp_path):
    class Keeps(Replaces):
        def replace(self, hook):
            super().replace(hook)
            if hasattr(self, "old"):
                self.kept = self.old[0]

    module = pretrained(Keeps)
    trainer_of(tmp_path, AbsentClassCalibration()).fit(module, loader(), loader(VAL, shuffle=False))
    assert list(attached_heads(module)) == ["fc"]
    assert get_gamma(module) is not None


@pytest.mark.parametrize("head", [copy.deepcopy, lambda fc: nn.Linear(16, NUM_CLASSES)], ids=["copy", "new"])
def test_gamma_goes_with_the_head_that_is_replaced_before_a_test(head, tmp_path):
    class InSetupAgain(Plain):
        def setup(self, stage):
            if stage == "test":
                self.fc = head(self.fc)

    module = set_gamma(pretrained(InSetupAgain), 2.5, SEEN, ABSENT)
    trainer_of(tmp_path, AbsentClassCalibration()).test(module, loader(VAL, shuffle=False), verbose=False)
    assert get_gamma(module) == 2.5
    assert list(attached_heads(module)) == ["fc"]
