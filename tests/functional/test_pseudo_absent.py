from __future__ import annotations

import math

import pytest
import torch

from lightning_calibft.functional import pseudo_absent_gamma
from tests.helpers.estimator_references import _reference_margins
from tests.helpers.references import random_case


def _surplus(gamma, margins, num_seen, num_absent):
    seen = sum(1 / (1 + math.exp(m - gamma)) for m, _ in margins) / len(margins)
    pseudo = sum(1 / (1 + math.exp(gamma - m)) for _, m in margins) / len(margins)
    return num_seen * seen - num_absent * pseudo


def case(seed, num_samples=60):
    logits, target, seen, absent = random_case(seed, num_samples)
    before = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).mul(4).round() / 4
    return logits, target, before, seen, absent


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_solves_its_equation(seed, dtype):
    logits, target, before, seen, absent = case(seed)
    gamma = pseudo_absent_gamma(logits.to(dtype), target, before.to(dtype), seen, absent).gamma
    margins = _reference_margins(logits, target, before, seen, absent)
    assert gamma.dtype == torch.float64
    assert _surplus(gamma.item(), margins, len(seen), len(absent)) == pytest.approx(0, abs=1e-12)


def test_standard_error_is_that_of_the_bootstrap():
    logits, target, before, seen, absent = case(0, 2000)
    gamma, error = pseudo_absent_gamma(logits, target, before, seen, absent)
    generator = torch.Generator().manual_seed(0)
    gammas = []
    for _ in range(300):
        drawn = torch.randint(len(target), (len(target),), generator=generator)
        gammas.append(pseudo_absent_gamma(logits[drawn], target[drawn], before[drawn], seen, absent).gamma)
    assert torch.stack(gammas).std().item() == pytest.approx(error.item(), rel=0.15)
    assert abs(torch.stack(gammas).mean() - gamma) < error / 2


def test_a_shift_of_the_absent_logits_is_undone():
    """Gamma follows what fine-tuning did to the absent logits, however far."""
    logits, target, before, seen, absent = case(1)
    gamma = pseudo_absent_gamma(logits, target, before, seen, absent).gamma
    shifted = logits.clone()
    shifted[:, absent] -= 1000.0
    moved = pseudo_absent_gamma(shifted, target, before, seen, absent).gamma
    assert (moved - gamma).item() == pytest.approx(1000, rel=1e-9)


def test_other_and_ignored_samples_do_not_count():
    logits, target, before, seen, absent = case(2)
    mine = torch.isin(target, torch.tensor(seen))
    expected = pseudo_absent_gamma(logits[mine], target[mine], before[mine], seen, absent).gamma
    logits[~mine] = torch.nan
    assert pseudo_absent_gamma(logits, target, before, seen, absent).gamma == expected
    ignored = torch.where(mine, target, -100)
    assert pseudo_absent_gamma(logits, ignored, before, seen, absent, ignore_index=-100).gamma == expected


@pytest.mark.parametrize(
    ("seen", "absent"), [([0, 1], [2]), ([0, 1], [2, 3, 4, 5, 6, 7, 8]), ([0, 1, 2, 3, 4, 5, 6, 7], [8])]
)
def test_extreme_splits(seen, absent):
    """Two seen classes, one absent class: the equation holds all the same; one absent class has no spread."""
    logits, target, before, _, _ = case(3)
    gamma = pseudo_absent_gamma(logits, target, before, seen, absent).gamma
    margins = _reference_margins(logits, target, before, seen, absent)
    assert _surplus(gamma.item(), margins, len(seen), len(absent)) == pytest.approx(0, abs=1e-12)


def test_constant_logits():
    zeros, target = torch.zeros(4, 5), torch.tensor([0, 1, 0, 1])
    gamma, error = pseudo_absent_gamma(zeros, target, zeros, [0, 1], [2, 3, 4])
    assert gamma.item() == pytest.approx(math.log(3 / 2))  # nothing but the number of classes tells them apart
    assert error == 0


def test_one_sample_has_no_standard_error():
    logits, before = torch.tensor([[3.0, 1.0, 0.0, -1.0]]), torch.zeros(1, 4)
    gamma, error = pseudo_absent_gamma(logits, torch.tensor([0]), before, [0, 1])
    assert gamma.isfinite()
    assert error.isnan()


def test_no_samples():
    with pytest.warns(UserWarning, match="no samples of seen classes, so gamma is NaN"):
        gamma = pseudo_absent_gamma(torch.zeros(1, 4), torch.tensor([3]), torch.zeros(1, 4), [0, 1]).gamma
    assert gamma.isnan()


def test_wrong_arguments():
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match="at least 2 classes"):
        pseudo_absent_gamma(logits, torch.tensor([0, 0, 0]), logits, [0])
    with pytest.raises(ValueError, match="4 columns, one per class, but got 3"):
        pseudo_absent_gamma(logits, target, logits[:, :3], [0, 1])
    with pytest.warns(UserWarning, match="from before the softmax"):
        pseudo_absent_gamma(logits, target, logits.softmax(1), [0, 1])
