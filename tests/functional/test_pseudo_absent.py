from __future__ import annotations

import pytest
import torch

from lightning_calibft.functional import pseudo_absent_gamma
from tests.helpers.estimator_references import _reference_pseudo_absent
from tests.helpers.references import random_case


def case(seed, num_samples=60):
    logits, target, seen, absent = random_case(seed, num_samples)
    before = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed)).mul(4).round() / 4
    return logits, target, before, seen, absent


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_the_reference(seed, dtype):
    logits, target, before, seen, absent = case(seed)
    for share in (0.02, 0.3, 0.9):
        gamma = pseudo_absent_gamma(logits.to(dtype), target, before.to(dtype), seen, absent, absent_share=share).gamma
        assert gamma.dtype == torch.float64
        assert gamma.item() == pytest.approx(_reference_pseudo_absent(logits, target, seen, absent, before, share)[0])


def test_half_of_the_samples_are_absent_if_nothing_is_said():
    logits, target, before, seen, absent = case(0)
    told = pseudo_absent_gamma(logits, target, before, seen, absent, absent_share=0.5)
    assert pseudo_absent_gamma(logits, target, before, seen, absent) == told


def test_standard_error_is_that_of_the_bootstrap():
    logits, target, before, seen, absent = case(0, 2000)
    gamma, error = pseudo_absent_gamma(logits, target, before, seen, absent)
    generator = torch.Generator().manual_seed(0)
    gammas = []
    for _ in range(300):
        drawn = torch.randint(len(target), (len(target),), generator=generator)
        gammas.append(pseudo_absent_gamma(logits[drawn], target[drawn], before[drawn], seen, absent).gamma)
    assert torch.stack(gammas).std().item() == pytest.approx(error.item(), rel=0.2)
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
    assert gamma.item() == pytest.approx(_reference_pseudo_absent(logits, target, seen, absent, before)[0])


def test_constant_logits():
    zeros, target = torch.zeros(4, 5), torch.tensor([0, 1, 0, 1])
    gamma, error = pseudo_absent_gamma(zeros, target, zeros, [0, 1], [2, 3, 4])
    assert gamma.isfinite()
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


def test_a_model_that_is_right_on_no_sample():
    logits, target, before = (
        torch.tensor([[0.0, 9.0, -3.0, -4.0]] * 8),
        torch.zeros(8, dtype=torch.long),
        torch.zeros(8, 4),
    )
    assert pseudo_absent_gamma(logits, target, before, [0, 1]).gamma.isfinite()


def test_features_that_have_not_changed_have_not_gained():
    """With a head alone fine-tuned, absent logits of before and after differ by a number, and nothing is gained."""
    logits, target, before, seen, absent = case(1, 400)
    logits[:, absent] = before[:, absent].float() - 2
    worse = before.clone()
    worse[torch.arange(400), target] -= 1.5  # less accurate before, and by as much for the copies
    changed = logits.clone()
    changed[:, absent] = changed[:, absent].flip(1)
    same = pseudo_absent_gamma(logits, target, worse, seen, absent).gamma
    assert same < pseudo_absent_gamma(changed, target, worse, seen, absent).gamma


def test_wrong_arguments():
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match="at least 2 classes"):
        pseudo_absent_gamma(logits, torch.tensor([0, 0, 0]), logits, [0])
    with pytest.raises(ValueError, match="4 columns, one per class, but got 3"):
        pseudo_absent_gamma(logits, target, logits[:, :3], [0, 1])
    with pytest.raises(ValueError, match=r"`absent_share` to be None or a number in .0, 1., but got 1"):
        pseudo_absent_gamma(logits, target, logits, [0, 1], absent_share=1)
    with pytest.warns(UserWarning, match="from before the softmax"):
        pseudo_absent_gamma(logits, target, logits.softmax(1), [0, 1])
