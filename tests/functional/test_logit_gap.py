from __future__ import annotations

import pytest
import torch

from lightning_calibft.functional import average_logit_gap
from tests.golden import EXPECTED, load
from tests.helpers.references import _reference_gap, random_case


@pytest.mark.parametrize("name", EXPECTED)
def test_real_runs(name):
    data, expected = load(name), EXPECTED[name]
    gamma, error = average_logit_gap(data["train_logits"], data["train_target"], data["seen_classes"])
    assert gamma.item() == pytest.approx(expected["alg"], rel=1e-12)
    assert error.item() == pytest.approx(expected["alg_standard_error"], rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_brute_force(seed, dtype):
    logits, target, seen, absent = random_case(seed)
    gamma, error = average_logit_gap(logits.to(dtype), target, seen, absent)
    expected = _reference_gap(logits, target, seen, absent)
    assert (gamma.dtype, error.dtype) == (torch.float64, torch.float64)
    assert (gamma.item(), error.item()) == pytest.approx(expected[:2], rel=1e-12)
    assert average_logit_gap(logits, target, seen, absent).gamma.item() == pytest.approx(expected[0], rel=1e-12)


def test_row_chunks_are_summed():
    logits = torch.randn(5000, 1000, generator=torch.Generator().manual_seed(0))  # two chunks of 2**22 elements
    target = torch.arange(5000) % 1000
    gamma = average_logit_gap(logits, target, range(500)).gamma.item()
    seen, absent = logits[:, :500].double(), logits[:, 500:].double()
    mine = target < 500
    own = logits.double().gather(1, target[:, None])[:, 0]
    expected = ((seen.sum(1) - own) / 499 - absent.mean(1))[mine].mean().item()
    assert gamma == pytest.approx(expected, rel=1e-10)


def test_labels_that_are_not_seen_do_not_count():
    logits, target, seen, absent = random_case(0)
    mine = torch.isin(target, torch.tensor(seen))
    expected = average_logit_gap(logits[mine], target[mine], seen, absent).gamma
    broken = logits.clone()
    broken[~mine] = torch.nan
    assert average_logit_gap(broken, target, seen, absent).gamma.item() == pytest.approx(expected.item(), rel=1e-12)
    target = target.where(mine, -100)
    for kwargs in ({"ignore_index": -100}, {"validate_args": False}):
        gamma = average_logit_gap(logits, target, seen, absent, **kwargs).gamma
        assert gamma.item() == pytest.approx(expected.item(), rel=1e-12)


def test_nan_logits_are_not_hidden():
    logits = torch.tensor([[0.0, 1.0, torch.nan], [0.0, 1.0, 2.0]])
    assert average_logit_gap(logits, torch.tensor([0, 1]), [0, 1]).gamma.isnan()


@pytest.mark.parametrize("target", [[], [2, 2]])
def test_without_samples_it_is_nan_with_one_warning(target):
    with pytest.warns(UserWarning, match="received no samples of seen classes") as caught:
        values = average_logit_gap(torch.randn(len(target), 3), torch.tensor(target).long(), [0, 1])
    assert len(caught) == 1
    assert all(value.isnan() for value in values)


def test_one_sample_has_no_standard_error():
    gamma, error = average_logit_gap(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([0]), [0, 1])
    assert gamma == 3.0
    assert error.isnan()


def test_one_seen_class_is_refused():
    with pytest.raises(ValueError, match="`seen_classes` to hold at least 2 classes, but got 1"):
        average_logit_gap(torch.randn(2, 3), torch.tensor([0, 0]), [0])


def test_probabilities_are_warned_about():
    logits, target, seen, absent = random_case(0)
    with pytest.warns(UserWarning, match="from before the softmax"):
        average_logit_gap(logits.softmax(1).bfloat16(), target, seen, absent)
