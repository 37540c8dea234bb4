from __future__ import annotations

import math
import warnings

import pytest
import torch

from lightning_calibft.functional import best_gamma, calibrate_logits, harmonic_mean_accuracy, split_accuracy
from lightning_calibft.metrics import AUSUC, SeenUnseenCurve
from tests.golden import EXPECTED, load
from tests.helpers.references import _reference_at_gamma, random_case


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("average", ["micro", "macro"])
def test_ausuc_of_real_runs(name, average):
    data, expected = load(name), EXPECTED[name]
    metric = AUSUC(data["test_logits"].shape[1], data["seen_classes"], average=average)
    metric.update(data["test_logits"], data["test_target"])
    # The state keeps margins in float32. In one run this makes one step of a seen and an absent sample whose margins
    # differ by 1e-7, which moves the area by half the product of their weights.
    rows = data["test_logits"].double()
    margin = rows[:, data["seen_classes"]].amax(1) - rows[:, data["absent_classes"]].amax(1)
    merged = len(margin.unique()) - len(margin.float().unique())
    assert merged == (name == "digits_sgd")
    assert metric.compute().item() == pytest.approx(expected[f"ausuc_{average}"], rel=1e-12, abs=merged * 1.2e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_accuracies_of_real_runs_before_and_after(name):
    data, expected = load(name), EXPECTED[name]
    metric = SeenUnseenCurve(data["test_logits"].shape[1], data["seen_classes"])
    metric.update(data["test_logits"], data["test_target"])
    for when, gamma in (("uncalibrated", 0.0), ("alg", expected["alg"])):
        values = {key: value.item() for key, value in metric.accuracies(gamma).items()}
        assert values == pytest.approx(
            {
                "seen": expected[f"{when}/seen_to_all"],
                "absent": expected[f"{when}/absent_to_all"],
                "all": expected[f"{when}/all_to_all"],
                "harmonic": expected[f"{when}/harmonic"],
            },
            rel=1e-12,
        )


@pytest.mark.parametrize("cls", [AUSUC, SeenUnseenCurve])
@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("seed", range(3))
def test_accuracies_at_any_gamma(cls, average, seed):
    logits, target, seen, absent = random_case(seed)
    metric = cls(9, seen, absent, average=average)
    metric(logits[:20], target[:20])
    metric.update(logits[20:], target[20:])
    for gamma in (-100.0, -0.75, -0.1, 0.0, 0.25, 0.3, 2.0, 100.0, math.inf, -math.inf):  # quarters hit margins
        values = metric.accuracies(gamma)
        reference = _reference_at_gamma(logits, target, seen, absent, max(-1e9, min(gamma, 1e9)), average)
        assert [values[key].item() for key in ("seen", "absent", "all")] == pytest.approx(reference, abs=1e-12)
    for criterion in ("accuracy", "harmonic_mean", "equal_accuracies"):
        for asked in ({}, {"min_seen_accuracy": 0.3}, {"min_absent_accuracy": 0.3}):
            expected = best_gamma(logits, target, seen, absent, average=average, criterion=criterion, **asked)
            assert metric.best_gamma(criterion, **asked) == expected


def test_accuracies_agree_with_calibrated_logits():
    _, target, seen, absent = random_case(0)
    logits = torch.randn(60, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    metric = AUSUC(9, seen, absent)
    metric.update(logits, target)
    args = calibrate_logits(logits, 0.6, seen, absent), target, seen, absent
    values = metric.accuracies(0.6)
    assert values["all"] == split_accuracy(*args)
    assert values["seen"] == split_accuracy(*args, samples="seen")
    assert values["absent"] == split_accuracy(*args, samples="absent")
    assert values["harmonic"] == harmonic_mean_accuracy(*args)


def test_accuracies_follow_new_samples():
    logits, target, seen, absent = random_case(0)
    metric = AUSUC(9, seen, absent)
    metric.update(logits[:20], target[:20])
    metric.accuracies(0.0)
    metric.update(logits[20:], target[20:])
    reference = _reference_at_gamma(logits, target, seen, absent, 0.0)
    assert metric.accuracies(0.0)["all"].item() == pytest.approx(reference[2])
    metric.reset()
    assert metric._curve is None


def test_accuracies_that_no_gamma_reaches():
    logits, target, seen, absent = random_case(0)
    metric = AUSUC(9, seen, absent)
    with pytest.raises(ValueError, match="`min_seen_accuracy` to be a number in"):
        metric.best_gamma(min_seen_accuracy=80)
    metric.update(logits, target)
    best = metric.accuracies(-math.inf)["seen"].item()
    with pytest.raises(ValueError, match=rf"`min_seen_accuracy` .* the best is {best}\."):
        metric.best_gamma(min_seen_accuracy=1.0)
    assert metric.best_gamma(min_seen_accuracy=best).isfinite()


def test_only_one_group():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    metric = SeenUnseenCurve(3, [0, 1])
    metric.update(logits, torch.tensor([0, 0]))
    with pytest.warns(UserWarning, match="no absent samples"):
        values = metric.accuracies(0.0)
    assert (values["seen"], values["all"]) == (0.5, 0.5)
    assert values["absent"].isnan()
    assert values["harmonic"].isnan()
    assert metric.best_gamma().isnan()


def test_probabilities_are_looked_for_once():
    logits, target, seen, absent = random_case(0)
    metric = AUSUC(9, seen, absent)
    metric.update(logits[:0], target[:0])
    with pytest.warns(UserWarning, match="from before the softmax"):
        metric.update(logits.softmax(1), target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric.update(logits.softmax(1), target)
        AUSUC(9, seen, absent, validate_args=False).update(logits.softmax(1), target)


def test_plot_marks_operating_points():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    logits, target, seen, absent = random_case(0)
    metric = SeenUnseenCurve(9, seen, absent)
    metric.update(logits, target)
    figure, ax = metric.plot(score=True, gamma=0.7)
    (line, *marks) = ax.get_lines()
    curve = metric.compute()
    assert line.get_xdata().tolist() == curve[0].tolist()
    assert line.get_ydata().tolist() == curve[1].tolist()
    for mark, gamma in zip(marks, (0.0, metric.best_gamma(), 0.7), strict=True):
        values = metric.accuracies(gamma)
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (values["seen"], values["absent"])
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend[0].startswith("AUC=")
    assert [text.split()[0] for text in legend[1:]] == ["uncalibrated", "best", "calibrated"]
    _, same_ax = metric.plot(metric.compute(), ax=ax)
    assert same_ax is ax
    pyplot.close(figure)


@pytest.mark.parametrize("target", [[0], [1], [0, 0]])
def test_plot_of_almost_nothing(target):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    metric = SeenUnseenCurve(3, [0, 1])
    metric.update(torch.tensor([[5.0, 0.0, 1.0]] * len(target)), torch.tensor(target))
    with pytest.warns(UserWarning, match="received no absent"):
        figure, _ = metric.plot(score=True)
    pyplot.close(figure)


def test_many_small_batches_make_no_long_list():
    metric, whole = AUSUC(9, [0, 1, 2]), AUSUC(9, [0, 1, 2])
    generator = torch.Generator().manual_seed(0)
    preds, target = torch.randn(2000, 9, generator=generator), torch.randint(9, (2000,), generator=generator)
    for part in zip(preds.split(2), target.split(2), strict=True):
        metric.update(*part)
    whole.update(preds, target)
    assert len(metric.margin) < 64
    assert torch.equal(torch.cat(metric.margin), whole.margin[0])
    assert torch.equal(torch.cat(metric.code), whole.code[0])
