"""What every estimator promises."""

from __future__ import annotations

import itertools
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lightning_calibft import ClassSplit
from lightning_calibft.estimators import ESTIMATORS, make_estimator, needs_absent_samples, needs_pretrained_logits
from tests.estimators.cases import CASES, inputs, make, reference, statistics, whole
from tests.helpers.estimator_references import pretrained_logits
from tests.helpers.references import random_case

_, _, SEEN, ABSENT = random_case(0)
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def test_all_of_them_are_here():
    # Those that are not have tests of their own.
    assert {name for name, *_ in CASES.values()} == ESTIMATORS.keys() - {"pseudo_absent", "operating_point"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equals_the_reference(case, seed, dtype):
    *_, seen, absent = random_case(seed)
    batch = inputs(case, seed)
    gamma, error = reference(case, batch, seen, absent)
    metric = make(case, 9, seen, absent)
    metric.update(*(part.to(dtype) if part.is_floating_point() else part for part in batch))
    assert metric.compute().item() == pytest.approx(gamma, rel=1e-9)
    assert metric.compute().dtype == torch.float64
    assert metric.num_samples == int(torch.isin(batch[1], torch.tensor(seen)).sum())
    if error is not None:
        assert metric.standard_error.item() == pytest.approx(error, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_an_update_never_waits_for_the_device(name):
    """On the device without values whatever reads one fails, as does copying to the host."""
    logits, target, *_ = random_case(0)
    before = (pretrained_logits(logits).to("meta"),) if needs_pretrained_logits(name) else ()
    options = {"gamma": 1.0} if name == "fixed" else {}
    metric = make_estimator(name, ClassSplit(9, SEEN, ABSENT), options).to("meta")
    metric.update(logits.to("meta"), target.to("meta"), *before)


@pytest.mark.parametrize(
    ("seen", "absent"),
    [([0, 1], [2]), ([0, 1], list(range(2, 9))), (list(range(8)), [8]), ([0, 1], [8]), ([2, 5, 7], [0, 1, 3, 8])],
)
def test_extreme_splits(case, seen, absent):
    """Two seen classes; one absent class; all but one are seen."""
    batch = inputs(case, 3)
    gamma, _ = reference(case, batch, seen, absent)
    metric = make(case, 9, seen, absent)
    metric.update(*batch)
    assert metric.compute().item() == pytest.approx(gamma, rel=1e-6, abs=1e-9)


def test_one_sample_of_each_class(case):
    logits, _, *before = inputs(case, 1, 9)
    batch = (logits, torch.arange(9), *before)
    metric = make(case, 9, SEEN, ABSENT)
    metric.update(*batch)
    assert metric.compute().item() == pytest.approx(reference(case, batch, SEEN, ABSENT)[0], rel=1e-6)
    assert metric.num_samples == 4
    metric.reset()
    metric.update(*(part[SEEN[:1]] for part in batch))
    assert metric.compute().isfinite()
    assert metric.num_samples == 1
    assert metric.standard_error.item() == 0 if case == "fixed" else metric.standard_error.isnan()


def test_constant_logits_need_no_gamma(case):
    if case == "fixed":
        return
    _, target, *before = inputs(case)
    metric = make(case, 9, SEEN, ABSENT)
    metric.update(torch.full((60, 9), 3.25), target, *(torch.zeros_like(part) for part in before))
    shift = math.log(0.1 / len(ABSENT)) - math.log(0.9 / len(SEEN)) if case == "alg_told" else 0
    assert metric.compute().item() == pytest.approx(shift, abs=1e-12)
    assert metric.standard_error.item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [SEEN[1], ABSENT[0]])
def test_no_number_comes_of_what_is_none(case, value, where):
    if case == "fixed":
        return
    logits, target, *before = inputs(case)
    expected = whole(case)[0]
    sample = int((target == SEEN[0]).nonzero()[0])
    logits[sample, where] = value
    metric = make(case, 9, SEEN, ABSENT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric.update(logits, target, *before)
        gamma = metric.compute().item()
        error = metric.standard_error.item()
    # Of minus infinity a maximum or a soft maximum may know nothing; else there is no gamma.
    if math.isfinite(gamma):
        assert value == -math.inf
        assert gamma == pytest.approx(expected, abs=2)
    else:
        assert not math.isfinite(error)


def test_nothing_to_count(case):
    metric = make(case, 9, SEEN, ABSENT, ignore_index=-100)
    logits, target, *before = inputs(case)
    metric.update(logits, torch.full_like(target, -100), *before)
    with pytest.warns(UserWarning, match="received no samples of seen classes, so gamma is NaN"):
        gamma = metric.compute()
    assert gamma == 2.1 if case == "fixed" else gamma.isnan()
    assert metric.num_samples == 0


@pytest.mark.parametrize("sizes", [[60], [1, 30, 0, 29], [7] * 8 + [4]])
def test_however_the_data_is_cut(case, sizes):
    metric = make(case, 9, SEEN, ABSENT)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for parts in zip(*(part[order].split(sizes) for part in inputs(case)), strict=True):
        metric.update(*parts)
    assert statistics(metric) == pytest.approx(whole(case), rel=1e-9, abs=1e-9)


def test_samples_of_other_classes_do_not_count(case):
    logits, target, *before = inputs(case)
    expected = whole(case)
    for part in (logits, *before):
        part[~torch.isin(target, torch.tensor(SEEN))] = torch.nan
    metric = make(case, 9, SEEN, ABSENT, ignore_index=-100)
    metric.update(logits, torch.where(torch.isin(target, torch.tensor(SEEN)), target, -100), *before)
    assert statistics(metric) == expected


def test_copies_reset_casts_and_no_state_dict(case):
    first, second = ([part[rows] for part in inputs(case)] for rows in (slice(0, 30), slice(30, None)))
    metric = make(case, 9, SEEN, ABSENT)
    metric.update(*first)
    metric.compute()
    twins = [metric.clone(), pickle.loads(pickle.dumps(metric)), nn.ModuleList([metric.clone()]).half()[0]]
    for twin in twins:
        twin.update(*second)
        assert statistics(twin) == pytest.approx(whole(case), rel=1e-9, abs=1e-9)
        assert twin.state_dict() == {}
    metric.reset()
    metric.update(*inputs(case))
    assert statistics(metric) == whole(case)


def test_targets_that_are_mapped(case):
    logits, target, *before = inputs(case)
    metric = make(case, 9, SEEN, ABSENT, class_map=list(range(8, -1, -1)))
    metric.update(logits, 8 - target, *before)
    assert statistics(metric) == whole(case)


def test_state(case):
    metric = make(case, 9, SEEN, ABSENT)
    metric.update(*inputs(case))
    states = [state for key, state in metric.metric_state.items() if key != "configuration"]
    state = [part for value in states for part in (value if isinstance(value, list) else [value])]
    assert sum(part.nbytes for part in state) <= 8 * 60


def test_configurations_do_not_share_states():
    """MetricCollection merges metrics whose states have the same names and values."""
    metrics = [make(case, 9, SEEN, ABSENT) for case in CASES if case != "alg_told"]  # that sums the same as "alg"
    for one, other in itertools.combinations(metrics, 2):
        assert not MetricCollection._equal_metric_states(one, other)


def test_the_random_state_is_left_alone(case):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    whole(case)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_seen_class_is_refused(case):
    with pytest.raises(ValueError, match="at least 2 classes, but got 1"):
        make(case, 9, [0])


@pytest.mark.parametrize("name", ["alg", "pseudo_absent", "operating_point"])
@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, math.nan])
def test_shares_out_of_range(name, share):
    with pytest.raises(ValueError, match=r"`absent_share` to be None or a number in .0, 1., but got"):
        ESTIMATORS[name](9, SEEN, absent_share=share)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("fixed", {"gamma": math.inf}, ValueError, "`gamma` to be finite, but got inf"),
        ("alg", {"absent_share": "0.5"}, TypeError, "`absent_share` to be a number, but got '0.5'"),
        ("pseudo_absent", {"absent_share": True}, TypeError, "`absent_share` to be a number, but got True"),
    ],
)
def test_options_out_of_range(name, options, error, message):
    with pytest.raises(error, match=message):
        ESTIMATORS[name](9, SEEN, **options)


def test_none_of_these_needs_labels_of_absent_classes():
    assert not any(needs_absent_samples(name) for name, *_ in CASES.values())
