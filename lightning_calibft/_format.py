"""What calibrated files have in common: names, paths, JSON and words about gamma. Nothing here imports torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

StrPath = str | os.PathLike[str]

CHILD_NAME = "absent_class_calibration"  # the module inside the head that calibrates it
OFFSET, MASK = f"{CHILD_NAME}.offset", f"{CHILD_NAME}.mask"
RECORD_NAME = "_absent_class_calibration_record"  # an attribute of a head: what is known of the gamma folded into it
METADATA_KEY = "lightning_calibft"  # what a file says about its calibration, stored with the weights
SAFETENSORS = ".safetensors"
GRAPHS = (".onnx", ".pt2")  # files of models with their code
# Whether gamma helps: what a person who shall use it wants to know.
VERDICTS = ("helps", "does not matter", "hurts", "cannot be told")
_NEGLIGIBLE, _MATTERS = 0.0025, 0.01  # expected changes in accuracy; between both, the true one can be either
_BY_HEART, _CLEAR = 0.99, 0.1  # a seen accuracy as on training samples, and a gain that even these do not pretend
_ANY_SHARE = (0.02, 0.9)  # changes are linear in the share, so both ends tell of all shares between

LARGEST_JSON = 64 * 2**20  # bytes: the class ids of the widest heads take a few MiB


def parse_json(text: str | bytes) -> Any:
    """Parse JSON in which no name may appear twice.

    Raises:
        ValueError: If the text is not JSON, holds a name twice, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(entries := dict(pairs)) < len(pairs):
        raise ValueError("it holds a name twice")
    return entries


def check_path(name: str, value: object) -> None:
    """Raise if an argument is not a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"Expected argument `{name}` to be a path, a string or `pathlib.Path`, but got {value!r}.")


def verdict(calibration: Mapping[str, Any]) -> tuple[str, str]:
    """Return whether a gamma is expected to help, one of ``VERDICTS``, and why, given what is known of it."""
    if calibration["gamma"] == 0:
        return "does not matter", "gamma is 0"
    if not {"seen_change", "absent_change", "break_even_share"} <= calibration.keys():
        return "cannot be told", "its estimator does not say what it changes; try it on labeled samples of all classes"
    share = calibration.get("absent_share")
    met = _ANY_SHARE if share is None else (share,)
    changes = [expected_change(calibration, each) for each in met]
    told = {_of_change(change) for change in changes}
    if len(told) > 1:
        return "cannot be told", "the share of samples of absent classes is not known; pass it as `absent_share`"
    how = "estimated" if "absent_share_interval" in calibration else "told"
    at = "at shares of absent samples from" if share is None else f"at the share of absent samples that was {how},"
    points = " to ".join(f"{100 * change:+.1f}" for change in changes)
    reason = f"{at} {' to '.join(map('{:.1%}'.format, met))}, {points} points of accuracy are expected on all samples"
    accuracy = calibration.get("seen_accuracy", 0.0)
    if accuracy >= _BY_HEART and not calibration.get("held_out") and min(changes) < _CLEAR and told != {"hurts"}:
        return "cannot be told", (
            f"{reason}, but the model is right on {accuracy:.1%} of the samples behind gamma among the seen classes, as"
            " if it had learned them by heart; use samples that were not trained on (`calibrate` takes your word for"
            " it, with `held_out=True`)"
        )
    if told == {"cannot be told"}:
        reason += ", which is too little to be sure of"
    return told.pop(), reason


def expected_change(calibration: Mapping[str, Any], absent_share: float) -> float:
    """Return what a gamma is expected to change in the accuracy on all samples, at a share of absent samples.

    It follows from the side that gains accuracy and the break-even share. What the other side loses is read from few
    samples, and the break-even share from all of them.
    """
    gains, limit = ("absent_change" if calibration["gamma"] > 0 else "seen_change"), calibration["break_even_share"]
    gained = calibration[gains]
    if gained <= 0 or limit in (0, 1):
        return float((1 - absent_share) * calibration["seen_change"] + absent_share * calibration["absent_change"])
    if gains == "absent_change":
        return float(gained * (absent_share - (1 - absent_share) * limit / (1 - limit)))
    return float(gained * (1 - absent_share - absent_share * (1 - limit) / limit))


def _of_change(change: float) -> str:
    if abs(change) <= _NEGLIGIBLE:
        return "does not matter"
    return "cannot be told" if abs(change) < _MATTERS else "helps" if change > 0 else "hurts"


def expectations(calibration: Mapping[str, Any]) -> list[str]:
    """Return sentences that say what a gamma is expected to do, given what is known of its calibration."""
    gamma, (told, reason) = calibration["gamma"], verdict(calibration)
    sentences = [f"whether gamma helps {told}: {reason}" if told == VERDICTS[-1] else f"gamma {told}: {reason}"]
    if {"seen_change", "absent_change"} <= calibration.keys():
        seen, absent = (100 * calibration[key] for key in ("seen_change", "absent_change"))
        of_each = f"{seen:+.1f} points on seen samples, {absent:+.1f} on absent ones"
        sentences.append(f"expected change in accuracy: {of_each}")
    meant = f"{calibration['absent_share']:.1%}" if "absent_share" in calibration else ""
    if "absent_share_interval" in calibration:
        low, high = calibration["absent_share_interval"]
        meant += f", estimated from unlabeled samples; 90 % interval {low:.1%} to {high:.1%}"
    if "break_even_share" in calibration and gamma != 0:
        side, limit = "more" if gamma > 0 else "less", calibration["break_even_share"]
        of_gamma = f" (it is for {meant})" if meant else ""
        sentences.append(f"gamma pays if {side} than {limit:.1%} of the samples are of absent classes{of_gamma}")
    elif "absent_share_interval" in calibration:
        sentences.append(f"gamma is for a share of absent samples of {meant}")
    if gamma < 0:
        sentences.append("gamma is negative: the model predicts absent classes even less often than without it")
    return sentences


def warning_of_harm(calibration: Mapping[str, Any]) -> str:
    """Return a warning if the verdict on a gamma is that it hurts, or ``""``."""
    told, reason = verdict(calibration)
    if told != "hurts":
        return ""
    gamma = calibration["gamma"]
    pays = f"{'above' if gamma > 0 else 'below'} {calibration['break_even_share']:.1%}"
    return (
        f"Gamma ({gamma:.3f}) is expected to do harm: {reason}. It pays {pays}. It is in the model all the same. Check"
        " `absent_share`, or remove gamma with `lightning_calibft.detach(model)`."
    )
