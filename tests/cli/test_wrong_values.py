"""Values that no option of the command takes: one line says which option it is, and nothing is written."""

from __future__ import annotations

import pytest

from tests.cli.running import READ, run

HUGE = str(10**30)
WRONG = {
    "--batch-size": ["0", "-1", "x", "2.5", HUGE],
    "--num-workers": ["-1", "x", HUGE],
    "--img-size": ["0", "-5", "x", HUGE],
    "--num-classes": ["0", "-1", "1", "x", HUGE],
    "--max-samples": ["0", "-1", "x", HUGE],
    "--tolerance": ["0", "-1", "nan", "inf", "x"],
    "--crop-pct": ["0", "-1", "nan", "x"],
    "--mean": ["nan", "inf", "x"],
    "--std": ["0", "-1", "nan", "x"],
    "--interpolation": ["x"],
    "--estimator": ["x", "operating_point"],
    "--estimator-kwargs": ["x", "gamma=1"],
    "--model-kwargs": ["x"],
    "--class-map": ["x"],
    "--label-names": ["x"],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in WRONG.items() for value in values])
def test_wrong_values(option, value, raw, photos, tmp_path, capsys):
    words = ["calibrate", "test_resnet", raw, photos, tmp_path / "out.pth", *READ, f"{option}={value}"]
    try:
        status = run(*words)
    except SystemExit as error:
        status = error.code
    *usage, line = capsys.readouterr().err.splitlines()
    assert status == (2 if usage else 1)
    assert "error: " in line
    assert option in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["nan", "x", "1e400", "None"])
def test_wrong_values_of_an_estimator(value, raw, photos, tmp_path, capsys):
    words = ["calibrate", "test_resnet", raw, photos, tmp_path / "out.pth", *READ]
    assert run(*words, "--estimator", "fixed", "--estimator-kwargs", f"gamma={value}") == 1
    assert capsys.readouterr().err.startswith("calibft: error: Expected argument `gamma` to be ")
    assert not list(tmp_path.iterdir())
