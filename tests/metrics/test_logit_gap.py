from __future__ import annotations

import pytest
import torch

from lightning_calibft.metrics import AverageLogitGap
from tests.golden import EXPECTED, load
from tests.helpers.references import _reference_gap, random_case


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("size", [1, 32, 10**6])
def test_real_runs(name, size):
    data, expected = load(name), EXPECTED[name]
    metric = AverageLogitGap(data["train_logits"].shape[1], data["seen_classes"])
    for part in zip(data["train_logits"].split(size), data["train_target"].split(size), strict=True):
        metric.update(*part)
    assert metric.num_samples == expected["alg_samples"]
    assert metric.compute().item() == pytest.approx(expected["alg"], rel=1e-12)
    assert metric.standard_error.item() == pytest.approx(expected["alg_standard_error"], rel=1e-12)


def test_standard_error_follows_new_samples():
    logits, target, seen, absent = random_case(0)
    metric = AverageLogitGap(9, seen, absent)
    for start in (0, 20, 40):
        metric(logits[start : start + 20], target[start : start + 20])
        gamma, error, count = _reference_gap(logits[: start + 20], target[: start + 20], seen, absent)
        assert metric.num_samples == count
        assert metric.standard_error.item() == pytest.approx(error, rel=1e-12)
        assert metric.compute().item() == pytest.approx(gamma, rel=1e-12)
    metric.reset()
    metric.update(logits[:20], target[:20])
    assert metric.num_samples == _reference_gap(logits[:20], target[:20], seen, absent)[2]


def test_a_large_common_offset_does_not_spoil_the_standard_error():
    logits, target, seen, absent = random_case(0)
    metric = AverageLogitGap(9, seen, absent)
    metric.update(logits + 1024, target)
    assert metric.standard_error.item() == pytest.approx(_reference_gap(logits, target, seen, absent)[1], rel=1e-10)


def test_one_seen_class_is_refused():
    with pytest.raises(ValueError, match="at least 2 classes"):
        AverageLogitGap(3, [0])


def test_probabilities_are_warned_about():
    logits, target, seen, absent = random_case(0)
    with pytest.warns(UserWarning, match="from before the softmax"):
        AverageLogitGap(9, seen, absent).update(logits.softmax(1), target)


def test_states_are_float64():
    metric = torch.nn.ModuleList([AverageLogitGap(9, [0, 1])]).to(torch.float16)[0]
    dtypes = {name: state.dtype for name, state in metric.metric_state.items() if name != "configuration"}
    assert dtypes == {"count": torch.int64, "total": torch.float64, "squares": torch.float64}
