"""Whether gamma helps: one verdict from what a calibration knows."""

from __future__ import annotations

import pytest
import torch

from lightning_calibft import CalibrationResult, ClassSplit, calibrate
from lightning_calibft._format import expectations, expected_change, verdict, warning_of_harm
from lightning_calibft.analysis import Snapshot, calibration_report

KNOWN = {"gamma": 2.0, "seen_change": -0.02, "absent_change": 0.3, "break_even_share": 0.1, "seen_accuracy": 0.9}
NEGATIVE = {"gamma": -2.0, "seen_change": 0.1, "absent_change": -0.2, "break_even_share": 0.4}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"absent_share": 0.25}, "helps"),
        ({"absent_share": 0.12}, "cannot be told"),  # 0.7 points
        ({"absent_share": 0.101}, "does not matter"),
        ({"absent_share": 0.05}, "hurts"),
        ({}, "cannot be told"),
        ({"break_even_share": 1e-6, "absent_change": 0.9}, "helps"),  # at every share from 2 to 90 %
        ({"absent_change": 0.002, "seen_change": -0.001}, "does not matter"),  # at every share
        ({"gamma": 0.0}, "does not matter"),
        ({**NEGATIVE, "absent_share": 0.1}, "helps"),
        ({**NEGATIVE, "absent_share": 0.6}, "hurts"),
        ({"absent_share": 0.25, "seen_accuracy": 0.995}, "cannot be told"),  # learned by heart
        ({"absent_share": 0.25, "seen_accuracy": 0.995, "held_out": True}, "helps"),
        ({"absent_share": 0.6, "seen_accuracy": 0.995}, "helps"),  # so much that even such samples do not pretend it
        ({"absent_share": 0.05, "seen_accuracy": 0.995}, "hurts"),  # even on these
        ({"absent_share": 0.3, "absent_change": 0.0}, "hurts"),  # nothing to win
        ({"absent_share": 0.3, "break_even_share": 1.0}, "helps"),
        ({"absent_share": 0.3, "break_even_share": 0.0}, "helps"),
    ],
)
def test_the_verdict(more, told):
    found, reason = verdict({**KNOWN, **more})
    assert found == told
    assert bool(warning_of_harm({**KNOWN, **more})) == (told == "hurts")
    assert reason in expectations({**KNOWN, **more})[0]


def test_what_is_missing():
    told, reason = verdict({"gamma": 2.0, "absent_share": 0.25})
    assert told == "cannot be told"
    assert "try it on labeled samples of all classes" in reason
    assert "pass it as `absent_share`" in verdict(KNOWN)[1]
    assert "use samples that were not trained on" in verdict({**KNOWN, "absent_share": 0.25, "seen_accuracy": 1.0})[1]


def test_the_expected_change_is_none_at_the_break_even_share():
    """Above it, gamma wins what the side that gains makes of it."""
    assert expected_change(KNOWN, 0.1) == pytest.approx(0)
    assert expected_change(KNOWN, 0.9999) == pytest.approx(0.3, abs=1e-4)
    negative = {**KNOWN, "gamma": -1.0, "seen_change": 0.05, "absent_change": -0.3, "break_even_share": 0.2}
    assert expected_change(negative, 0.2) == pytest.approx(0)
    assert expected_change(negative, 0.0001) == pytest.approx(0.05, abs=1e-4)


def test_of_a_result():
    split = ClassSplit(3, [0, 1])
    plain = CalibrationResult(1.5, 0.1, 64, split, "alg")
    assert plain.verdict == plain.as_dict()["verdict"] == "cannot be told"
    told = CalibrationResult(2.0, 0.1, 64, split, "pseudo_absent", 0.25, 0.9, -0.02, 0.3, 0.1)
    assert told.verdict == told.as_dict()["verdict"] == "helps"
    assert told.reason.startswith("at the share of absent samples that was told, 25.0%, +5.0 points of accuracy are")


def test_samples_that_are_known_to_be_held_out():
    """The model is right on all of them, as on samples that it has learned by heart."""
    net, before = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
    with torch.no_grad():
        for layer in (net, before):
            layer.weight.copy_(torch.eye(6))
            layer.bias.zero_()
        net.bias[4:] = -4.0
    target = torch.arange(200) % 4
    x = 5 * torch.eye(6)[target] + torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    options = {"estimator": "pseudo_absent", "pretrained": before, "absent_share": 0.05, "progress": False}
    plain, told = (calibrate(net, [(x, target)], held_out=held_out, **options) for held_out in (False, True))
    assert (plain.held_out, told.held_out, told.gamma) == (False, True, plain.gamma)
    assert plain.verdict == "cannot be told"
    assert "`calibrate` takes your word for it, with `held_out=True`" in plain.reason
    assert told.verdict == "helps"
    assert "held_out" not in plain.as_dict()
    assert told.as_dict()["held_out"] is True


@pytest.mark.parametrize("more", [{}, {"gamma": 0.0}, {"break_even_share": None, "seen_change": None}])
def test_the_interval_of_an_estimated_share_is_said(more):
    known = {"gamma": 2.0, "seen_change": -0.02, "absent_change": 0.3, "break_even_share": 0.1, **more}
    result = CalibrationResult(
        standard_error=0.1,
        num_samples=64,
        split=ClassSplit(3, [0, 1]),
        estimator="pseudo_absent",
        absent_share=0.25,
        absent_share_interval=(0.2, 0.31),
        **known,
    )
    said = "25.0%, estimated from unlabeled samples; 90 % interval 20.0% to 31.0%"
    assert sum(said in sentence for sentence in expectations(result.as_dict())) == 1
    assert said in calibration_report([Snapshot(epoch=0, step=0)], result.split, model="net", result=result)
