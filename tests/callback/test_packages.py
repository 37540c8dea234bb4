"""Both packages of Lightning, in one process and each without the other."""

from __future__ import annotations

import importlib
import json
import re

import pytest

from lightning_calibft import AbsentClassCalibration, CalibrationDiagnostics, load_calibrated
from lightning_calibft.callback.lightning_package import lightning_of
from lightning_calibft.callback.trainer_checks import check_trainer
from tests.helpers.processes import run_python, run_script
from tests.helpers.runs import SEEN, VAL, Plain, assert_calibrated, loader, quiet, read

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]
pytestmark = quiet


@pytest.fixture(params=PACKAGES)
def package(request):
    return importlib.import_module(request.param)


def module_class(package):
    """The module that all tests train, of either package."""

    class OfPackage(package.LightningModule):
        build, forward, loss, configure_optimizers = (
            Plain.build,
            Plain.forward,
            Plain.loss,
            Plain.configure_optimizers,
        )
        training_step, validation_step, test_step = Plain.training_step, Plain.validation_step, Plain.test_step

        def __init__(self):
            super().__init__()
            self.lr = 0.02
            self.build(0.0)

    return OfPackage


def fit(package, folder, callbacks, module=None, **options):
    trainer = package.Trainer(
        default_root_dir=folder,
        callbacks=callbacks,
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = module or module_class(package)()
    trainer.fit(module, loader(), loader(VAL, shuffle=False))
    return trainer, module


def test_the_package_of_a_trainer(package):
    class Own(package.Trainer):
        pass

    for kind in (package.Trainer, Own):
        assert lightning_of(kind(logger=False, accelerator="cpu", enable_checkpointing=False)) is package
    assert lightning_of(package.callbacks.ModelCheckpoint()) is package


def test_what_is_of_no_package():
    remedy = (
        r"a Trainer of `lightning\.pytorch` or `pytorch_lightning`, but got a list\. .* call `lightning_calibft\.ca"
    )
    with pytest.raises(TypeError, match=remedy):
        lightning_of([])


@pytest.mark.parametrize("estimator", ["alg", "pcv"])
def test_the_same_callback_with_one_after_the_other(tmp_path, estimator):
    callback = AbsentClassCalibration(estimator=estimator)
    for name in [*PACKAGES, PACKAGES[0]]:
        package = importlib.import_module(name)
        trainer, module = fit(package, tmp_path / name, callback)
        assert trainer.callbacks[-2] is callback
        (file,) = callback.checkpoint_results
        assert load_calibrated(type(module), file).fc.absent_class_calibration.offset == callback.result.gamma
        if estimator == "alg":
            assert_calibrated(module.state_dict())


def test_checkpoints_are_saved_behind_it(tmp_path, package):
    checkpoint = package.callbacks.ModelCheckpoint(tmp_path, save_top_k=2, monitor="val_ausuc", save_last=True)
    callback, early = AbsentClassCalibration(), package.callbacks.EarlyStopping("val_ausuc")
    trainer, _ = fit(package, tmp_path, [checkpoint, callback, early])
    assert trainer.callbacks.index(early) < trainer.callbacks.index(callback)
    assert trainer.callbacks[-2:] == [callback, checkpoint]
    assert len(callback.checkpoint_results) == 3
    for file in callback.checkpoint_results:
        assert_calibrated(read(file)["state_dict"])


def test_averaged_weights(tmp_path, package):
    checkpoint, callback = package.callbacks.ModelCheckpoint(tmp_path), AbsentClassCalibration()
    averaging = package.callbacks.EMAWeightAveraging(decay=0.9)
    _, module = fit(package, tmp_path, [callback, averaging, checkpoint])
    assert_calibrated(module.state_dict())
    assert_calibrated(read(checkpoint.best_model_path)["state_dict"])
    with pytest.raises(RuntimeError, match="EMAWeightAveraging comes before AbsentClassCalibration"):
        fit(package, tmp_path, [averaging, callback])
    for each in (averaging, package.callbacks.StochasticWeightAveraging(0.1)):
        with pytest.raises(RuntimeError, match=f"is not supported with {type(each).__name__}"):
            fit(package, tmp_path, [AbsentClassCalibration(refresh_on_validation=True), each])


def test_diagnostics(tmp_path, package):
    diagnostics = CalibrationDiagnostics(SEEN)
    fit(package, tmp_path, [diagnostics, AbsentClassCalibration()])
    assert len(diagnostics.snapshots) == 3
    assert (tmp_path / "calibration_report.md").exists()
    fit(package, tmp_path, CalibrationDiagnostics(SEEN))


class Own(AbsentClassCalibration):
    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        self.begun = True


def test_a_subclass(tmp_path, package):
    own = Own()
    _, module = fit(package, tmp_path, own)
    assert own.begun
    assert issubclass(Own, package.Callback)
    assert_calibrated(module.state_dict())

    class Mixed(AbsentClassCalibration, package.Callback):
        pass

    fit(package, tmp_path, Mixed())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*deprecated in v4")
def test_the_command_line(tmp_path, package, monkeypatch):
    pytest.importorskip("jsonargparse")
    cli = importlib.import_module(f"{package.__name__}.cli")
    callbacks = [
        {"class_path": "lightning_calibft.CalibrationDiagnostics", "init_args": {"every_n_epochs": 3}},
        {"class_path": "tests.callback.test_packages.Own", "init_args": {"seen_classes": SEEN}},
    ]
    (tmp_path / "run.yaml").write_text(json.dumps({"trainer": {"callbacks": callbacks}}))

    class CLI(cli.LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_lightning_class_args(AbsentClassCalibration, "calibration")

    monkeypatch.setattr("sys.argv", ["run.py", f"--config={tmp_path / 'run.yaml'}", "--calibration.max_samples=5"])
    run = CLI(module_class(package), run=False, save_config_callback=None, seed_everything_default=False)
    made = {type(each).__name__: each for each in run.trainer.callbacks}
    assert made["CalibrationDiagnostics"].every_n_epochs == 3
    assert made["Own"].seen_classes == SEEN
    assert made["AbsentClassCalibration"].max_samples == 5


def test_a_module_of_the_other_package(tmp_path, package):
    (other,) = {*map(importlib.import_module, PACKAGES)} - {package}
    module = module_class(other)()
    with pytest.raises(TypeError, match="`model` must be a `LightningModule`"):  # Lightning refuses it
        fit(package, tmp_path, AbsentClassCalibration(), module)
    trainer = package.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    remedy = rf"but got a .*OfPackage\. Derive it from `{re.escape(package.__name__)}\.LightningModule`"
    with pytest.raises(TypeError, match=remedy):
        check_trainer(trainer, module)


@pytest.mark.parametrize("refused", ["nothing", "the other"])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_script_that_imports_one(tmp_path, name, refused):
    (other,) = {*PACKAGES} - {name}
    missing = other.split(".")[0] if refused == "the other" else refused
    run_script("tests.callback.package_script", name, missing, tmp_path)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_script_that_imports_lightning_first(name):
    run_python(
        "-c",
        f"import {name} as pl; from lightning_calibft import AbsentClassCalibration, CalibrationDiagnostics\n"
        "assert issubclass(AbsentClassCalibration, pl.Callback) and issubclass(CalibrationDiagnostics, pl.Callback)",
    )
