from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy

from lightning_calibft.functional import calibrate_logits, harmonic_mean_accuracy, split_accuracy
from tests.golden import EXPECTED, load
from tests.helpers.references import _reference_at_gamma, _reference_split_accuracy, random_case

GROUPS = ["all", "seen", "absent"]


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("when", ["uncalibrated", "alg"])
def test_accuracies_of_real_runs(name, when):
    data, expected = load(name), EXPECTED[name]
    # In float64, as the expected values: gamma added in float32 may round a nearly tied pair the other way.
    logits = calibrate_logits(
        data["test_logits"].double(), expected["alg"] if when == "alg" else 0.0, data["seen_classes"]
    )
    args = logits, data["test_target"], data["seen_classes"]
    for key in ("all_to_all", "seen_to_all", "absent_to_all", "seen_to_seen", "absent_to_absent"):
        samples, candidates = key.split("_to_")
        value = split_accuracy(*args, samples=samples, candidates=candidates).item()
        assert value == pytest.approx(expected[f"{when}/{key}"], rel=1e-12)
    assert harmonic_mean_accuracy(*args).item() == pytest.approx(expected[f"{when}/harmonic"], rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("samples", GROUPS)
@pytest.mark.parametrize("candidates", GROUPS)
@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_brute_force(seed, samples, candidates, average, dtype):
    logits, target, seen, absent = random_case(seed)
    groups = {"all": sorted(seen + absent), "seen": seen, "absent": absent}
    value = split_accuracy(
        logits.to(dtype), target, seen, absent, samples=samples, candidates=candidates, average=average
    )
    expected = _reference_split_accuracy(logits, target, groups[samples], groups[candidates], average)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    assert value.dtype == torch.float64


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("candidates", GROUPS)
def test_top_k(top_k, candidates):
    _, target, seen, absent = random_case(0)
    logits = torch.randn(60, 9, generator=torch.Generator().manual_seed(0))  # no ties: topk has no rule for them
    groups = {"all": sorted(seen + absent), "seen": seen, "absent": absent}
    value = split_accuracy(logits, target, seen, absent, candidates=candidates, top_k=top_k)
    expected = _reference_split_accuracy(logits, target, groups["all"], groups[candidates], top_k=top_k)
    assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("average", ["micro", "macro"])
def test_without_other_classes_it_is_multiclass_accuracy(top_k, average):
    logits, target, *_ = random_case(1, num_samples=300)  # ties as well, for the argmax
    if top_k > 1:
        logits = logits + torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)) / 8
    value = split_accuracy(logits, target, [0, 3, 5], top_k=top_k, average=average)
    expected = multiclass_accuracy(logits, target, num_classes=9, top_k=top_k, average=average)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)  # torchmetrics divides in float32


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("average", ["micro", "macro"])
def test_harmonic_mean(seed, average):
    _, target, seen, absent = random_case(seed)
    logits = torch.randn(60, 9, generator=torch.Generator().manual_seed(seed))
    s, u, _ = _reference_at_gamma(logits, target, seen, absent, 0.0, average)
    expected = 2 * s * u / (s + u) if s + u else 0.0
    assert harmonic_mean_accuracy(logits, target, seen, absent, average=average).item() == pytest.approx(expected)


def test_harmonic_mean_of_two_zeros_is_zero():
    logits = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    assert harmonic_mean_accuracy(logits, torch.tensor([0, 2]), [0, 1]) == 0.0


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_groups_without_samples_are_nan_with_one_warning(average):
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 0])
    for function, kwargs in ((split_accuracy, {"samples": "absent"}), (harmonic_mean_accuracy, {})):
        with pytest.warns(UserWarning, match="received no absent samples") as caught:
            assert function(logits, target, [0, 1], average=average, **kwargs).isnan()
        assert len(caught) == 1
    with pytest.warns(UserWarning, match="received no seen and no absent samples") as caught:
        assert split_accuracy(logits[:0], target[:0], [0, 1], average=average).isnan()
    assert len(caught) == 1
    assert not split_accuracy(logits, target, [0, 1], average=average).isnan()


@pytest.mark.parametrize("top_k", [1, 2])
def test_nan_and_minus_infinity_are_never_right(top_k):
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[nan, 0.0, 0.0], [5.0, nan, 0.0], [-inf, -inf, -inf], [1.0, 0.0, 0.0]])
    assert split_accuracy(logits, torch.tensor([0, 0, 0, 0]), [0, 1], top_k=top_k) == 0.25


def test_labels_out_of_range_are_left_out_without_validation():
    logits, target, seen, absent = random_case(2)
    expected = split_accuracy(logits, target, seen, absent, average="macro")
    logits, target = torch.cat([logits, logits[:3]]), torch.cat([target, torch.tensor([-1, 9, 10**6])])
    assert split_accuracy(logits, target, seen, absent, average="macro", validate_args=False) == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"samples": "unseen"}, "`samples` to be one of 'all', 'seen', 'absent', but got 'unseen'"),
        ({"candidates": "none"}, "`candidates` to be one of"),
        ({"average": None}, "`average` to be one of"),
        ({"top_k": 0}, r"`top_k` to be an integer in \[1, 3\], .* but got 0"),
        ({"top_k": 2, "candidates": "absent"}, r"`top_k` to be an integer in \[1, 1\]"),
        ({"top_k": True}, "`top_k`"),
    ],
)
def test_arguments_are_validated(kwargs, message):
    with pytest.raises(ValueError, match=message):
        split_accuracy(torch.randn(2, 3), torch.tensor([0, 1]), [0, 1], **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [1.2345678, torch.tensor(1.2345678, dtype=torch.float64), math.inf])
def test_calibrated_logits(dtype, gamma):
    logits = torch.randn(2, 3, 5).to(dtype)
    moved = calibrate_logits(logits, gamma, [0, 1], [3])
    assert moved.dtype == dtype
    assert torch.equal(moved[..., [0, 1, 2, 4]], logits[..., [0, 1, 2, 4]])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(moved[..., 3], (logits[..., 3].to(wide) + gamma).to(dtype))


def test_calibrated_logits_keep_the_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    calibrate_logits(logits, 2.0, [0, 1]).sum().backward()
    assert torch.equal(logits.grad, torch.ones(2, 3))
