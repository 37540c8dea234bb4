"""CalibrationDiagnostics in two processes."""

from __future__ import annotations

import os

import pytest
import torch
import torch.multiprocessing as mp

from lightning_calibft import CalibrationDiagnostics
from tests.helpers.processes import free_port, hand_over
from tests.helpers.runs import quiet, trainer_of
from tests.helpers.scheduled_runs import Scheduled, loaders

pytestmark = quiet


def fit_scheduled(folder, devices):
    """One process has seven of the forty validation samples, and the only training sample of a class."""
    diagnostics = CalibrationDiagnostics()
    train, data, arguments = loaders("inferred", int(os.environ.get("LOCAL_RANK", 0)), devices)
    strategy = "ddp" if devices > 1 else "auto"
    options = {"max_epochs": -1, "max_steps": 8, "val_check_interval": 2, "check_val_every_n_epoch": None}
    trainer = trainer_of(folder, diagnostics, devices=devices, strategy=strategy, **options, **arguments)
    trainer.fit(Scheduled(), train, data)
    return [each.as_dict() for each in diagnostics.snapshots]


def _fit_process(rank, folder, port):
    torch.set_num_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    written = []
    replace = os.replace
    os.replace = lambda source, target: (written.append(str(target)), replace(source, target))
    hand_over((fit_scheduled(folder, 2), [path for path in written if path.endswith(".md")]), folder, rank)


def test_two_processes_tell_what_one_does(tmp_path):
    mp.spawn(_fit_process, args=(tmp_path, free_port()), nprocs=2)
    (first, written), (second, others) = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert first == second
    assert [path.rpartition("/")[2] for path in written] == ["calibration_report.md"]
    assert others == []
    of_one = fit_scheduled(tmp_path / "one", 1)
    first, of_one = (
        [each for each in outcome if each["evaluation"]] for outcome in (first, of_one)
    )  # not epochs' ends
    assert [each["step"] for each in first] == [2, 4, 6, 8]
    for one, two in zip(of_one, first, strict=True):
        one["epoch"] = two["epoch"]
        assert flat(two) == pytest.approx(flat(one), rel=1e-9, nan_ok=True)


def flat(values, prefix=""):
    if not isinstance(values, dict):
        return {prefix: float("nan") if values is None else values}
    return {key: number for name, value in values.items() for key, number in flat(value, f"{prefix}.{name}").items()}
