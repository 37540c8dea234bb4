"""Whether gamma helps: one verdict from what a calibration knows."""

from __future__ import annotations

import pytest

from lightning_calibft import CalibrationResult, ClassSplit
from lightning_calibft._format import expectations, expected_change, verdict, warning_of_harm

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
