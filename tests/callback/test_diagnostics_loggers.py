"""The figures and the text of the report, as the loggers of the Trainer have written them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from lightning_calibft import AbsentClassCalibration, CalibrationDiagnostics
from lightning_calibft.analysis import verdict
from tests.callback.diagnosing import fit
from tests.helpers.runs import SEEN, quiet

pytestmark = quiet

WEIGHTS = {"row_norms", "updates", "update_similarity"}
FIGURES = {"seen_unseen_curve", "accuracies", "absent_logits", "seen_logits", *WEIGHTS}


def report_to(folder, logger, *others, output="report.md", **options):
    """Fit with loggers, and return the callback and the words of its verdict."""
    diagnostics = CalibrationDiagnostics(SEEN, output=output)
    fit(folder, diagnostics, *others, logger=logger, log_every_n_steps=1, **options)
    return diagnostics, verdict(diagnostics.snapshots)


def shows_something(image):
    assert image.size == (880, 920)
    assert len(image.convert("RGB").getcolors(image.width * image.height)) > 10


def events_of(logger):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(logger.log_dir, {"tensors": 0, "images": 0, "scalars": 0})
    return events.Reload()


def scalars(events):
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard(tmp_path):
    """Beside what is logged without the report, which stays as it is."""
    pytest.importorskip("tensorboard")
    logger, plain = TensorBoardLogger(tmp_path), TensorBoardLogger(tmp_path, name="plain")
    _, told = report_to(tmp_path, logger, AbsentClassCalibration())
    events = events_of(logger)
    assert {*events.Tags()["images"]} == {f"report/{name}" for name in FIGURES | {"accuracies_over_share"}}
    for tag in events.Tags()["images"]:
        (image,) = events.Images(tag)
        assert (image.step, image.width, image.height) == (12, 880, 920)
    (tag,) = events.Tags()["tensors"]
    (event,) = events.Tensors(tag)
    text = event.tensor_proto.string_val[0].decode()
    assert (tag, event.step) == ("report/text/text_summary", 12)
    assert all(sentence in text for sentence in told)
    assert "| calibrated |" in text
    assert "data:image" not in text  # TensorBoard would show none
    assert "## Norms of the head's rows" not in text  # which is but a figure

    fit(tmp_path, AbsentClassCalibration(), logger=plain, log_every_n_steps=1)
    assert {"val_loss", "gamma"} <= scalars(events).keys()
    assert scalars(events) == scalars(events_of(plain))


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")  # so that it is put back: the logger sets it
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    try:
        _, told = report_to(tmp_path, logger, AbsentClassCalibration(), output="sub/report.html")
        logged = {key: value for key, value in dict(logger.experiment.summary).items() if key.startswith("report/")}
        step = logger.experiment.summary["trainer/global_step"]
        folder = logger.experiment.dir
    finally:
        wandb.finish()
    assert logged.keys() == {f"report/{name}" for name in FIGURES | {"accuracies_over_share", "text"}}
    assert step == 12
    for name in FIGURES:
        (entry,) = logged[f"report/{name}"]["filenames"]
        with Image.open(f"{folder}/{entry}") as image:
            shows_something(image)
    with open(f"{folder}/{logged['report/text']['path']}") as file:
        ((text,),) = json.load(file)["data"]
    assert all(sentence in text for sentence in told)


def test_mlflow(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs more packages
    logger = MLFlowLogger(tracking_uri=(tmp_path / "runs").as_uri())
    logger.experiment.log_text(logger.run_id, "mine", "accuracies.png")
    report_to(tmp_path, logger, output="sub/report.html")
    artifacts = tmp_path / "runs" / logger.experiment_id / logger.run_id / "artifacts"
    assert {path.name for path in artifacts.glob("report/*")} == {f"{name}.png" for name in FIGURES} | {"report.html"}
    for name in FIGURES:
        with Image.open(artifacts / "report" / f"{name}.png") as image:
            shows_something(image)
    assert (artifacts / "report" / "report.html").read_text() == (tmp_path / "sub" / "report.html").read_text()
    assert (artifacts / "accuracies.png").read_text() == "mine"
    assert logger.experiment.get_run(logger.run_id).info.status == "FINISHED"


def files(logger):
    return {path.name: path.read_text() for path in Path(logger.log_dir).iterdir()}


def test_a_logger_that_fails_and_one_that_shows_no_figures(tmp_path):
    """The fit does not fail, the logger after it gets the report all the same, and all are finished."""
    pytest.importorskip("tensorboard")
    finished = []

    class Finishes(TensorBoardLogger):
        def finalize(self, status):
            super().finalize(status)
            finished.append((self.name, status))

    class Offline(Finishes):
        @property
        def experiment(self):
            writer = super().experiment
            writer.add_text = self.connect
            return writer

        def connect(self, *_):
            raise ConnectionError("no route to host")

    table, *others = CSVLogger(tmp_path), Offline(tmp_path, name="first"), Finishes(tmp_path, name="second")
    with pytest.warns(UserWarning, match="could not give its report") as met:
        report_to(tmp_path, [table, *others])
    (told,) = [str(each.message) for each in met if "its report" in str(each.message)]
    assert told.endswith("could not give its report to Offline: ConnectionError('no route to host').")
    assert {*events_of(others[1]).Tags()["images"]} == {f"report/{name}" for name in FIGURES}
    assert finished == [("first", "success"), ("second", "success")]

    alone = CSVLogger(tmp_path, name="alone")
    fit(tmp_path, logger=alone, log_every_n_steps=1)
    assert files(table) == files(alone)


def test_nothing_measured_and_nothing_trained(tmp_path):
    pytest.importorskip("tensorboard")
    logger = TensorBoardLogger(tmp_path, name="weights")
    report_to(tmp_path, logger, data=[], limit_val_batches=0)
    assert {*events_of(logger).Tags()["images"]} == {f"report/{name}" for name in WEIGHTS}
    logger = TensorBoardLogger(tmp_path, name="nothing")
    with pytest.warns(UserWarning, match="writes no report"):
        fit(tmp_path, CalibrationDiagnostics(), logger=logger, max_epochs=0)
    assert events_of(logger).Tags()["images"] == []
