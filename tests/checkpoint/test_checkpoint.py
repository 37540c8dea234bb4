"""Calibrated checkpoints: loading, folding and inspecting them."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_calibft import (
    AbsentClassCalibration,
    attach,
    calibrate,
    fold_checkpoint,
    inspect_checkpoint,
    load_calibrated,
)
from tests.helpers.runs import (
    ABSENT,
    NUM_CLASSES,
    OFFSET,
    SEEN,
    TRAIN,
    VAL,
    Plain,
    assert_calibrated,
    assert_same,
    loader,
    pretrained,
    quiet,
    raw_logits,
    read,
    split_state,
    trainer_of,
    without_calibration,
)

pytestmark = quiet
X = 3 * torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
SHIFT = torch.isin(torch.arange(NUM_CLASSES), torch.tensor(ABSENT)).float()


class Configured(Plain):
    """With hyperparameters, and weights that come in an older form if no version stands beside them."""

    def __init__(self, width: int, dropout: float = 0.1) -> None:
        self.width = width
        super().__init__(dropout)
        self.save_hyperparameters()

    def build(self, dropout):
        self.body = nn.Sequential(
            torch.nn.utils.spectral_norm(nn.Linear(5, self.width)), nn.BatchNorm1d(self.width), nn.Dropout(dropout)
        )
        self.fc = nn.Linear(self.width, NUM_CLASSES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with ``best.ckpt``, calibrated, and ``plain.ckpt``, written without the callback."""
    path = tmp_path_factory.mktemp("runs")
    for name, callbacks in (("best", [AbsentClassCalibration()]), ("plain", [])):
        torch.manual_seed(0)
        trainer = trainer_of(path, *callbacks, ModelCheckpoint(path, name))
        trainer.fit(Configured(16), loader(), loader(VAL, shuffle=False))
    return path


@pytest.fixture
def best(folder):
    return folder / "best.ckpt"


def raw(path):
    return raw_logits(read(path)["state_dict"], X, make=lambda: Configured(16))


def calibrated(path):
    gamma = assert_calibrated(read(path)["state_dict"], make=lambda: Configured(16))
    return raw(path) + gamma * SHIFT


def test_load_calibrated(best):
    before = best.read_bytes()
    module = load_calibrated(Configured, best)
    assert not any(part.training for part in module.modules())
    assert module.hparams == {"width": 16, "dropout": 0.1}
    torch.testing.assert_close(module(X), calibrated(best))
    assert not torch.equal(module(X).argmax(1), raw(best).argmax(1))
    assert_same(split_state(module.state_dict())[0], dict(split_state(read(best)["state_dict"])[0]))
    assert split_state(module.state_dict())[1:] == split_state(read(best)["state_dict"])[1:]
    assert best.read_bytes() == before
    assert torch.equal(load_calibrated(Configured, str(best))(X), module(X))


def test_what_the_user_meets_without_load_calibrated(best):
    with pytest.raises(RuntimeError, match=r"Unexpected key.*fc.absent_class_calibration.offset"):
        Configured.load_from_checkpoint(best)

    class Attaches(Configured):
        def build(self, dropout):
            super().build(dropout)
            attach(self)

    module = Attaches.load_from_checkpoint(best).eval()
    torch.testing.assert_close(module(X), calibrated(best))
    torch.testing.assert_close(load_calibrated(Attaches, best)(X), calibrated(best))


def test_arguments_of_load_from_checkpoint(best):
    module = load_calibrated(Configured, best, map_location="cpu", dropout=0.3)
    assert module.hparams.dropout == 0.3
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_calibrated(Configured, best, width=8)

    class More(Configured):
        def build(self, dropout):
            super().build(dropout)
            self.extra = nn.Parameter(torch.zeros(1))

    with pytest.raises(RuntimeError, match="Missing key"):
        load_calibrated(More, best)
    torch.testing.assert_close(load_calibrated(More, best, strict=False)(X), calibrated(best))


def test_a_loaded_model_can_be_trained_and_saved_again(best, tmp_path):
    module = load_calibrated(Configured, best)
    trainer = trainer_of(tmp_path, AbsentClassCalibration(), max_epochs=1)
    trainer.fit(module.train(), loader())
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert torch.allclose(load_calibrated(Configured, tmp_path / "again.ckpt")(X), calibrated(tmp_path / "again.ckpt"))


def test_fold_checkpoint(best, tmp_path):
    before, destination = best.read_bytes(), tmp_path / "folded.ckpt"
    fold_checkpoint(best, destination)
    assert best.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["folded.ckpt"]
    module = Configured.load_from_checkpoint(destination).eval()  # strictly, without the package
    torch.testing.assert_close(module(X), calibrated(best))
    folded, source = read(destination), read(best)
    assert folded["lightning_calibft"] == {**source["lightning_calibft"], "folded": True}
    gamma = source["state_dict"][f"fc.{OFFSET}"]
    assert torch.equal(folded["state_dict"]["fc.bias"], source["state_dict"]["fc.bias"] + gamma * SHIFT)
    folded["state_dict"]["fc.bias"] = source["state_dict"]["fc.bias"]
    assert_same(without_calibration(folded)["state_dict"], without_calibration(source)["state_dict"])
    for key in folded.keys() - {"state_dict", "lightning_calibft"}:
        assert_same(folded[key], source[key])


def test_fold_a_plain_state_dict(best, tmp_path):
    state = read(best)["state_dict"]
    torch.save(state, tmp_path / "state.pt")
    assert inspect_checkpoint(tmp_path / "state.pt")["gamma"] == state[f"fc.{OFFSET}"].item()
    fold_checkpoint(tmp_path / "state.pt", tmp_path / "folded.pt")
    module = Configured(16).eval()
    module.load_state_dict(read(tmp_path / "folded.pt"))
    torch.testing.assert_close(module(X), calibrated(best))


@pytest.mark.parametrize("kind", ["same", "relative", "link"])
def test_fold_onto_itself_is_refused(kind, best, tmp_path, monkeypatch):
    source = shutil.copy(best, tmp_path / "best.ckpt")
    before = source.read_bytes()
    (tmp_path / "link.ckpt").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    destination = {"same": source, "relative": "best.ckpt", "link": "link.ckpt"}[kind]
    with pytest.raises(ValueError, match=r"`destination` to differ from `source`.*keep the calibrated file"):
        fold_checkpoint(source, destination)
    assert source.read_bytes() == before


def test_folding_twice_is_refused(best, tmp_path):
    fold_checkpoint(best, tmp_path / "folded.ckpt")
    text = r"gamma is already folded into the bias\. Load it like any other"
    with pytest.raises(ValueError, match=text):
        fold_checkpoint(tmp_path / "folded.ckpt", tmp_path / "twice.ckpt")
    with pytest.raises(ValueError, match=text):
        load_calibrated(Configured, tmp_path / "folded.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["folded.ckpt"]


def test_inspect(folder, best, tmp_path):
    state = read(best)["state_dict"]
    info = inspect_checkpoint(best)
    expected = {
        "calibrated": True,
        "folded": False,
        "heads": ["fc"],
        "gamma": state[f"fc.{OFFSET}"].item(),
        "standard_error": read(best)["lightning_calibft"]["standard_error"],
        "num_samples": len(TRAIN),
        "estimator": "alg",
        "num_classes": NUM_CLASSES,
        "seen_classes": SEEN,
        "absent_classes": ABSENT,
        "share_table": read(best)["lightning_calibft"]["share_table"],
        "verdict": "cannot be told",
        "version": version("lightning-calibft"),
        "torch_version": str(torch.__version__),
        "lightning_version": lightning.__version__,
    }
    assert info == expected
    fold_checkpoint(best, tmp_path / "folded.ckpt")
    folded = inspect_checkpoint(tmp_path / "folded.ckpt")
    assert (folded["calibrated"], folded["folded"], folded["heads"]) == (False, True, [])
    assert folded["gamma"] == pytest.approx(expected["gamma"])
    nothing = {"calibrated": False, "folded": False, "heads": []}
    assert inspect_checkpoint(folder / "plain.ckpt") == {**nothing, "lightning_version": lightning.__version__}
    torch.save(attach(pretrained()).state_dict(), tmp_path / "attached.pt")
    assert inspect_checkpoint(tmp_path / "attached.pt") == nothing


def test_inspect_what_calibrate_made(tmp_path):
    model = pretrained()
    result = calibrate(model, loader(), progress=False)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    info = inspect_checkpoint(tmp_path / "model.pt")
    assert info["gamma"] == pytest.approx(result.gamma)
    assert (info["absent_classes"], info["num_classes"]) == (ABSENT, NUM_CLASSES)


def test_objects_in_a_trusted_file(best, tmp_path):
    path = tmp_path / "objects.ckpt"
    torch.save({**read(best), "extra": Path("a")}, path)
    with pytest.raises(ValueError, match="holds other Python objects"):
        load_calibrated(Configured, path)
    torch.testing.assert_close(load_calibrated(Configured, path, weights_only=False)(X), calibrated(best))
    assert inspect_checkpoint(path, weights_only=False)["calibrated"]
    fold_checkpoint(path, tmp_path / "folded.ckpt", weights_only=False)
    assert torch.load(tmp_path / "folded.ckpt", weights_only=False)["extra"] == Path("a")
