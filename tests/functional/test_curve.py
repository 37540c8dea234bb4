from __future__ import annotations

import math
import warnings

import pytest
import torch

from lightning_calibft.functional import ausuc, best_gamma, seen_unseen_curve
from tests.golden import EXPECTED, load
from tests.helpers.references import _reference_at_gamma, _reference_ausuc, random_case

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("average", ["micro", "macro"])
def test_ausuc_of_real_runs(name, average):
    data, expected = load(name), EXPECTED[name]
    value = ausuc(data["test_logits"], data["test_target"], data["seen_classes"], average=average)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected[f"ausuc_{average}"], rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_curve_equals_brute_force(seed, average, dtype):
    logits, target, seen, absent = random_case(seed)
    args = logits.to(dtype), target, seen, absent
    seen_accuracy, absent_accuracy, gamma = seen_unseen_curve(*args, average=average)
    assert seen_accuracy.shape == absent_accuracy.shape == (len(gamma) + 1,)
    assert (gamma[1:] > gamma[:-1]).all()
    points = torch.stack([seen_accuracy, absent_accuracy], 1)
    assert (points[1:] != points[:-1]).any(1).all(), "each margin changes something"
    inside = torch.cat([gamma[:1] - 1, (gamma[1:] + gamma[:-1]) / 2, gamma[-1:] + 1])
    for k, value in enumerate(inside.tolist()):
        reference = _reference_at_gamma(logits, target, seen, absent, value, average)
        assert points[k].tolist() == pytest.approx(reference[:2], abs=1e-12)
    assert points[0, 1] == points[-1, 0] == 0
    assert ausuc(*args, average=average).item() == pytest.approx(
        _reference_ausuc(logits, target, seen, absent, average), abs=1e-12
    )


def test_equal_margins_are_one_step():
    logits = torch.tensor([[1.0, -9.0, 0.0], [-9.0, 1.0, 0.0], [1.0, -9.0, 0.0], [-9.0, 1.0, 0.0]])
    curve = seen_unseen_curve(logits, torch.tensor([0, 2, 2, 1]), [0, 1])
    assert [value.tolist() for value in curve] == [[1.0, 0.0], [0.0, 1.0], [1.0]]
    assert ausuc(logits, torch.tensor([0, 2, 2, 1]), [0, 1]) == 0.5


def test_margins_of_wrong_samples_are_no_step():
    logits = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])
    assert seen_unseen_curve(logits, torch.tensor([0, 2]), [0, 1])[2].tolist() == [3.0]


@pytest.mark.parametrize("row", [[NAN, 0.0, 0.0], [9.0, NAN, 0.0], [9.0, 0.0, NAN], [-INF, -INF, 1.0], [INF, 0.0, INF]])
def test_rows_that_name_no_class_are_wrong_at_every_gamma(row):
    logits = torch.tensor([row, [2.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    seen_accuracy, absent_accuracy, gamma = seen_unseen_curve(logits, torch.tensor([0, 0, 2]), [0, 1])
    assert seen_accuracy.tolist() == [0.5, 0.5, 0.0]
    assert absent_accuracy.tolist() == [0.0, 1.0, 1.0]
    assert gamma.tolist() == [-2.0, 2.0]


@pytest.mark.parametrize("target", [[], [0, 1], [2, 2], [3, 3]])
def test_groups_without_samples_are_nan_with_one_warning(target):
    logits, target = torch.randn(len(target), 4), torch.tensor(target, dtype=torch.long)
    for function in (ausuc, best_gamma):
        with pytest.warns(UserWarning, match="received no .*samples") as caught:
            value = function(logits, target, [0, 1], [2])
        assert len(caught) == 1
        assert value.isnan()
    with pytest.warns(UserWarning, match="received no"):
        seen, absent, _ = seen_unseen_curve(logits, target, [0, 1], [2])
    assert seen.isnan().all() == (not (target < 2).any())
    assert absent.isnan().all() == (not (target == 2).any())


def test_nan_of_an_empty_group_survives_when_nothing_is_right():
    with pytest.warns(UserWarning, match="no absent samples"):
        assert ausuc(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([1]), [0, 1]).isnan()


def test_ignored_and_unknown_labels_do_not_count():
    logits, target, seen, absent = random_case(3)
    expected = seen_unseen_curve(logits, target, seen, absent)
    more = torch.cat([logits, torch.randn(5, 9) * 9]), torch.cat([target, torch.full((5,), -100)])
    for kwargs in ({"ignore_index": -100}, {"validate_args": False}):
        for a, b in zip(expected, seen_unseen_curve(*more, seen, absent, **kwargs), strict=True):
            assert torch.equal(a, b)
    without = target != seen[0]
    a = ausuc(logits, target, seen, absent, ignore_index=seen[0])
    assert a == ausuc(logits[without], target[without], seen, absent)


def test_row_chunks_do_not_change_the_curve():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(15_000, 300, generator=generator)  # two chunks of 2**22 elements
    target = torch.randint(300, (15_000,), generator=generator)
    logits[torch.arange(15_000), target] += 3
    seen = list(range(0, 300, 2))
    curve = seen_unseen_curve(logits, target, seen)
    margin = logits[:, 0::2].amax(1).double() - logits[:, 1::2].amax(1).double()
    right = torch.where(target % 2 == 0, logits[:, 0::2].argmax(1) * 2, logits[:, 1::2].argmax(1) * 2 + 1) == target
    assert torch.equal(curve[2], margin[right].unique())
    at = len(curve[2]) // 2
    middle = (curve[2][at - 1] + curve[2][at]) / 2
    assert curve[0][at] == ((margin > middle) & right & (target % 2 == 0)).sum() / (target % 2 == 0).sum().double()
    assert curve[1][at] == ((margin < middle) & right & (target % 2 == 1)).sum() / (target % 2 == 1).sum().double()


def test_float64_logits_are_subtracted_in_float64():
    logits = torch.tensor([[1e8 + 0.5, 0.0, 1e8], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert seen_unseen_curve(logits, torch.tensor([0, 2]), [0, 1])[2].tolist() == [-1.0, 0.5]


def test_probabilities_are_warned_about_and_logits_are_not():
    logits, target, seen, absent = random_case(0)
    with pytest.warns(UserWarning, match="from before the softmax"):
        ausuc(logits.softmax(1), target, seen, absent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ausuc(logits, target, seen, absent)
        ausuc(logits.log_softmax(1), target, seen, absent)
        ausuc(logits.softmax(1), target, seen, absent, validate_args=False)


def test_arguments_are_validated():
    logits, target, seen, absent = random_case(0)
    with pytest.raises(ValueError, match=r"`average` to be one of 'micro', 'macro', but got 'weighted'"):
        ausuc(logits, target, seen, absent, average="weighted")
    with pytest.raises(ValueError, match="`criterion` to be one of"):
        best_gamma(logits, target, seen, absent, criterion="f1")
