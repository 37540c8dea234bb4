"""What must not matter does not, and what gamma undoes is undone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, strategies as st

from lightning_calibft.estimators import ESTIMATORS, needs_pretrained_logits
from lightning_calibft.functional import (
    ausuc,
    average_logit_gap,
    best_gamma,
    calibrate_logits,
    harmonic_mean_accuracy,
    pseudo_absent_gamma,
    seen_unseen_curve,
    split_accuracy,
)
from lightning_calibft.metrics import SeenUnseenCurve
from tests.helpers.nonfinite_references import _reference_point, close, plain
from tests.properties.strategies import FLOATS, QUARTERS, SEEDS, Case, cases, cases_without_ties, generator

FUNCTIONS = {
    "accuracy": split_accuracy,
    "accuracy_of_absent": lambda *case: split_accuracy(*case, samples="absent", candidates="absent", average="macro"),
    "harmonic": harmonic_mean_accuracy,
    "curve": seen_unseen_curve,
    "ausuc": ausuc,
    "ausuc_macro": lambda *case: ausuc(*case, average="macro"),
    "best_gamma": best_gamma,
    "gap": lambda *args: average_logit_gap(*args).gamma,
    "pseudo_absent": lambda logits, target, *split: pseudo_absent_gamma(logits, target, logits.flip(0), *split).gamma,
}


each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@each_function
@given(data=st.data())
def test_ids_of_classes(function, data):
    """Equal logits are decided by their ids, so there are none."""
    case = data.draw(cases_without_ties(min_seen=2))
    new = torch.tensor(data.draw(st.permutations(range(case.num_classes))))
    renamed = Case(
        case.logits[:, new.argsort()], new[case.target], new[case.seen].tolist(), new[case.absent].flip(0).tolist()
    )
    assert plain(function(*renamed)) == close(plain(function(*case)))


@each_function
@given(data=st.data())
def test_a_constant_added_to_the_logits_of_a_sample(function, data):
    case = data.draw(cases(min_seen=2))
    constants = data.draw(st.lists(QUARTERS, min_size=len(case.target), max_size=len(case.target)))
    moved = case._replace(logits=case.logits + torch.tensor(constants).reshape(-1, 1))
    assert plain(function(*moved)) == close(plain(function(*case)))


@each_function
@given(data=st.data())
def test_other_classes(function, data):
    """Neither their logits nor their samples count, and the columns that they have may be missing."""
    case = data.draw(cases(min_seen=2))
    classes = sorted(case.seen + case.absent)
    column = {c: k for k, c in enumerate(classes)}
    rows = torch.isin(case.target, torch.tensor(classes))
    small = Case(
        case.logits[rows][:, classes],
        torch.tensor([column[c] for c in case.target[rows].tolist()], dtype=torch.long),
        [column[c] for c in case.seen],
        [column[c] for c in case.absent],
    )
    if function is FUNCTIONS["pseudo_absent"]:
        assume(rows.all())  # its second argument depends on the other rows
    assert plain(function(*case)) == close(plain(function(*small)))


@each_function
@given(data=st.data())
def test_memory_layout(function, data):
    case = data.draw(cases(min_seen=2))
    strided = torch.stack([case.logits, -case.logits], 2)[..., 0].T.contiguous().T
    assert plain(function(strided, *case[1:])) == close(plain(function(*case)))


@given(cases(), QUARTERS)
def test_calibrated_logits_are_a_point_of_the_curve(case, gamma):
    calibrated = case._replace(logits=calibrate_logits(case.logits, gamma, case.seen, case.absent))
    seen, absent, gammas = seen_unseen_curve(*case)
    assert plain(seen_unseen_curve(*calibrated)) == close(plain((seen, absent, gammas - gamma)))
    assert ausuc(*calibrated).item() == close(ausuc(*case).item())
    metric = SeenUnseenCurve(case.num_classes, case.seen, case.absent)
    metric.update(case.logits, case.target)
    accuracies = {name: value.item() for name, value in metric.accuracies(gamma).items()}
    assert [accuracies[name] for name in ("seen", "absent")] == close(list(_reference_point(case, gamma)[:2]))
    margins = case.logits[:, case.seen].amax(1) - case.logits[:, case.absent].amax(1)
    if not (margins == gamma).any():  # there an argmax decides by ids
        for name in ("seen", "absent"):
            assert accuracies[name] == close(split_accuracy(*calibrated, samples=name).item())
        assert accuracies["harmonic"] == close(harmonic_mean_accuracy(*calibrated).item())


@given(cases(), QUARTERS, st.sampled_from(FLOATS))
def test_calibrate_logits(case, gamma, dtype):
    logits = case.logits.to(dtype)
    result = calibrate_logits(logits, gamma, case.seen, case.absent)
    assert result.dtype == dtype
    for row, column in itertools.product(range(len(logits)), range(case.num_classes)):
        expected = case.logits[row, column] + gamma * (column in case.absent)
        assert result[row, column] == expected
    assert torch.equal(logits, case.logits.to(dtype))


EQUIVARIANT = sorted(ESTIMATORS.keys() - {"fixed", "operating_point"})


@pytest.mark.parametrize("name", EQUIVARIANT)
@given(cases(min_seen=2, min_samples=1), QUARTERS, SEEDS)
def test_gamma_grows_by_what_the_absent_logits_lose(name, case, fall, seed):
    lower = case._replace(logits=calibrate_logits(case.logits, -fall, case.seen, case.absent))
    before = [torch.randn(case.logits.shape, generator=generator(seed))] if needs_pretrained_logits(name) else []
    gammas = []
    for logits, target, *split in (case, lower):
        metric = ESTIMATORS[name](case.num_classes, *split)
        metric.update(logits, target, *before)
        gammas.append(metric.compute().item())
    assert gammas[1] == close(gammas[0] + fall, 1e-5)


@given(cases(), QUARTERS)
def test_so_does_the_gamma_of_an_operating_point_between_two_margins(case, fall):
    """Outside of all margins it keeps to 0, or to one logit beyond, as far as it can."""
    lower = case._replace(logits=calibrate_logits(case.logits, -fall, case.seen, case.absent))
    gammas = seen_unseen_curve(*case)[2]
    best, moved = best_gamma(*case).item(), best_gamma(*lower).item()
    if len(gammas) and gammas[0] < best < gammas[-1]:
        assert moved == close(best + fall)
