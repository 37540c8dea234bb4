"""What goes wrong in the calibration pass: for the model when training ends, or for a kept file after that."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
import warnings
import weakref

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_calibft import AbsentClassCalibration, calibrate, get_gamma, inspect_checkpoint
from lightning_calibft.head.offset import attached_heads, offset_of
from tests.faults.checks import Armed, Arms, Faulty, assert_sound, calibrated, die, faulty, interruptible
from tests.helpers.runs import SEEN, Plain, loader, pretrained, quiet, trainer_of

pytestmark = [quiet, pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training")]
places = pytest.mark.parametrize("place", ["model", "file"])
NEITHER, LATTER = ({"epoch=0.ckpt": False, "epoch=1.ckpt": done} for done in (False, True))


def fit(module, data, place, folder):
    """Fit, with a file of other weights and one of those that training ends with; return what is raised, as text."""
    checkpoints = ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    callback = AbsentClassCalibration(SEEN)
    try:
        trainer_of(folder, callback, checkpoints, Arms(data, place)).fit(module, loader())
    except (Exception, SystemExit) as error:
        assert (callback.result is None) == (place == "model")
        assert not callback.checkpoint_results
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def assert_survived(module, data, place, folder, text):
    """The pass of ``place`` has failed with this text, and nothing else has."""
    told = fit(module, data, place, folder)
    assert not multiprocessing.active_children()
    kind, _, rest = text.partition(": ")
    if place == "model":
        assert told.startswith(kind)
        assert calibrated(folder) == NEITHER
    else:
        assert told.startswith("RuntimeError: Could not calibrate the checkpoints")
        assert "epoch=0.ckpt'" in told
        assert "epoch=1.ckpt'" not in told
        assert "These files are unchanged, and the model in memory is calibrated" in told
        assert calibrated(folder) == LATTER
    assert rest in told
    data.armed = False
    assert_sound(module, is_calibrated=place == "file")


def missing_image():
    raise ValueError("no such image")


@places
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (missing_image, "ValueError: Caught ValueError in DataLoader worker process 3."),
        (die, "RuntimeError: DataLoader worker (pid"),
    ],
    ids=["raises", "is_killed"],
)
def test_a_worker_process(fault, text, place, tmp_path):
    data = Armed(fault)
    # Of four workers the fault is in the first batch of the last. One that dies while a batch of it is on its way can
    # also end the loop of the loader with the error of the broken connection.
    assert_survived(faulty(data, num_workers=4), data, place, tmp_path, text)


@places
def test_one_batch_with_nan(place, tmp_path):
    data = Armed(lambda: torch.full((5,), torch.nan))
    text = "ValueError: Expected finite logits in the calibration pass, but batch 3 has NaN or infinite ones."
    assert_survived(faulty(data), data, place, tmp_path, text)


@pytest.mark.parametrize("error", [KeyError("caption"), TypeError("a str is no image"), AttributeError("no photo")])
def test_any_error_of_the_user_in_the_pass_of_a_file(error, tmp_path):
    """It is told with its traceback, which keeps nothing of the batch that it was in."""
    held = []

    def fails():
        batch = torch.zeros(9)
        held.append(weakref.ref(batch))
        raise error

    data = Armed(fails)
    module, checkpoints = faulty(data), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callback = AbsentClassCalibration(SEEN)
    with pytest.raises(RuntimeError, match="Could not calibrate the checkpoints") as raised:
        trainer_of(tmp_path, callback, checkpoints, Arms(data, "file")).fit(module, loader())
    assert f"epoch=0.ckpt': {type(error).__name__}: {error}. These files are unchanged" in str(raised.value)
    assert raised.value.__cause__ is error
    assert "fails" in {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    assert [batch() for batch in held] == [None]
    assert calibrated(tmp_path) == LATTER
    assert_sound(module, is_calibrated=True)


class Large(Faulty):
    """Has no room for more than eight samples in the calibration pass."""

    def forward(self, x):
        if len(x) > 8 and self.loader.dataset.armed:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(x)


def large(data):
    module = faulty(data, batch_size=16)
    module.__class__ = Large
    return module


@places
def test_out_of_memory(place, tmp_path):
    data = Armed()
    module = large(data)
    text = (
        "OutOfMemoryError: Out of memory in the calibration pass. Gamma stays unset. Give it smaller batches, from a"
        " `calibration_dataloader` or as the `loader` of `calibrate`. If the estimator keeps all samples, set"
        " `max_samples`, too. The error was: CUDA out of memory. Tried to allocate 2.00 GiB."
    )
    assert_survived(module, data, place, tmp_path, text)
    data.armed = True
    result = calibrate(module, DataLoader(data, 8), SEEN, progress=False)  # the remedy
    assert get_gamma(module) == pytest.approx(result.gamma)


def test_out_of_memory_without_lightning():
    data = Armed()
    module, data.armed = large(data), True
    keys = list(module.state_dict())
    with pytest.raises(torch.OutOfMemoryError, match="Out of memory in the calibration pass"):
        calibrate(module, module.loader, SEEN, progress=False)
    assert list(module.state_dict()) == keys
    assert module.training
    assert not module.fc._forward_hooks
    calibrate(module, DataLoader(data, 8), SEEN, progress=False)
    assert get_gamma(module) is not None


@places
def test_ctrl_c(place, tmp_path):
    data = Armed(lambda: signal.raise_signal(signal.SIGINT))
    module = faulty(data)
    with interruptible(), warnings.catch_warnings(record=True) as met, contextlib.suppress(KeyboardInterrupt):
        warnings.simplefilter("always")
        told = fit(module, data, place, tmp_path)
    assert told == "SystemExit: 1"
    text = "the model and its checkpoints are not" if place == "model" else "the model in memory is calibrated, but not"
    assert [text in str(warning.message) for warning in met if "interrupted" in str(warning.message)] == [True]
    assert calibrated(tmp_path) == NEITHER  # that of the same weights comes after the other
    assert_sound(module, is_calibrated=place == "file")


def test_ctrl_c_without_lightning():
    data = Armed(lambda: signal.raise_signal(signal.SIGINT))
    data.armed, module = True, pretrained()
    keys = list(module.state_dict())
    with interruptible(), pytest.raises(KeyboardInterrupt):
        calibrate(module, DataLoader(data, 8), SEEN, progress=False)
    assert list(module.state_dict()) == keys
    assert module.training
    assert not module.fc._forward_hooks


@pytest.mark.parametrize("error", [OSError, KeyError, torch.OutOfMemoryError])
@pytest.mark.filterwarnings("ignore:The metric received no absent samples")
def test_an_error_in_the_pass_before_a_validation(error, tmp_path):
    """The training goes on, and the end finds what is missing."""

    def fails():
        raise error("the share is gone")

    data, callback = Armed(fails), AbsentClassCalibration(SEEN, refresh_on_validation=True)
    module, checkpoints = faulty(data), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer = trainer_of(tmp_path, callback, checkpoints, Arms(data, "validation"))
    with pytest.warns(UserWarning, match=r"leaves step 12 without gamma\. .*the share is gone"):
        trainer.fit(module, loader(), loader(shuffle=False))
    assert calibrated(tmp_path) == {"epoch=0.ckpt": True, "epoch=1.ckpt": True}
    assert_sound(module, is_calibrated=True)


@pytest.mark.filterwarnings("ignore:Fitting was interrupted", "ignore:The metric received no absent samples")
def test_ctrl_c_in_the_pass_before_a_validation(tmp_path):
    """What was saved before is calibrated, and so is the model as it was then."""
    data = Armed(lambda: signal.raise_signal(signal.SIGINT))
    module, checkpoints = faulty(data), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    callbacks = (AbsentClassCalibration(SEEN, refresh_on_validation=True), checkpoints, Arms(data, "validation"))
    with interruptible(), pytest.raises(SystemExit):
        trainer_of(tmp_path, *callbacks).fit(module, loader(), loader(shuffle=False))
    assert calibrated(tmp_path) == {"epoch=0.ckpt": True}
    assert get_gamma(module) == pytest.approx(inspect_checkpoint(tmp_path / "epoch=0.ckpt")["gamma"])
    assert not any(offset_of(head).recording for head in attached_heads(module).values())


@pytest.mark.filterwarnings("ignore:The metric received no absent samples")
def test_an_error_in_a_training_step_that_gamma_is_found_on(tmp_path):
    """What was saved before has the gamma of its steps; nothing records any more."""

    class Fails(Plain):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 2:
                raise OSError("the share is gone")
            return super().training_step(batch, batch_idx)

    callback, checkpoints = AbsentClassCalibration(SEEN, source="training_steps"), ModelCheckpoint(tmp_path, "{epoch}")
    module = pretrained(Fails)
    with pytest.raises(OSError, match="the share is gone"):
        trainer_of(tmp_path, callback, checkpoints).fit(module, loader())
    told = inspect_checkpoint(tmp_path / "epoch=0.ckpt")
    assert told["calibrated"]
    assert told["gamma"] == pytest.approx(get_gamma(module))
    assert not any(offset_of(head).recording for head in attached_heads(module).values())
