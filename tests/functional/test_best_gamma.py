from __future__ import annotations

import itertools
import math
import re
import warnings

import pytest
import torch

from lightning_calibft.functional import ausuc, best_gamma
from tests.golden import EXPECTED, load
from tests.helpers.references import _reference_at_gamma, _reference_gammas, _reference_margins, random_case

INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _harmonic(a, b):
    return 2 * a * b / (a + b) if a + b else 0.0


@pytest.mark.parametrize("name", EXPECTED)
def test_best_gamma_of_real_runs(name):
    data, expected = load(name), EXPECTED[name]
    args = data["test_logits"], data["test_target"], data["seen_classes"]
    gamma = best_gamma(*args).item()
    assert gamma == pytest.approx(sum(expected["best_gamma_interval_first"]) / 2, rel=1e-12)
    classes = data["seen_classes"].tolist(), data["absent_classes"].tolist()
    assert _reference_at_gamma(*args[:2], *classes, gamma)[2] == pytest.approx(expected["best_accuracy"], rel=1e-12)


def _reference_best_gamma(
    case, criterion="accuracy", average="micro", min_seen_accuracy=None, min_absent_accuracy=None, absent_share=None
) -> tuple[float, str]:
    """Gamma, or NaN and what the error must say: try one gamma inside each interval between all finite margins."""
    margins = sorted(margin for margin in _reference_margins(case[0], *case[2:]) if math.isfinite(margin))
    inside = [margins[0] - 1, *((a + b) / 2 for a, b in itertools.pairwise(margins)), margins[-1] + 1]
    points = [_reference_at_gamma(*case, gamma, average) for gamma in inside]
    allowed = list(range(len(points)))
    for group, (name, least) in enumerate(
        {"min_seen_accuracy": min_seen_accuracy, "min_absent_accuracy": min_absent_accuracy}.items()
    ):
        best = max(points[k][group] for k in allowed)
        allowed = [k for k in allowed if least is None or points[k][group] > least - 1e-12]
        if not allowed:
            condition = (
                f" with `min_seen_accuracy` {min_seen_accuracy}" if group and min_seen_accuracy is not None else ""
            )
            return NAN, f"`{name}` to be .* but got {least}, and the best{condition} is {best:.9f}. Ask for less."
    score = {
        "accuracy": lambda seen, absent, overall: (
            overall if absent_share is None else (1 - absent_share) * seen + absent_share * absent
        ),
        "harmonic_mean": lambda seen, absent, overall: _harmonic(seen, absent),
        "equal_accuracies": lambda seen, absent, overall: -abs(seen - absent),
    }[criterion]
    best = max(score(*points[k]) for k in allowed)
    first = last = next(k for k in allowed if score(*points[k]) > best - 1e-12)
    while last + 1 < len(points) and points[last + 1] == points[first]:
        last += 1
    low, high = (margins[first - 1] if first else -INF), (margins[last] if last < len(margins) else INF)
    if math.isfinite(low) and math.isfinite(high):
        return (low + high) / 2, ""
    return (0.0 if low < 0 < high else high - 1 if math.isfinite(high) else low + 1), ""


CONSTRAINTS = [
    {},
    {"min_seen_accuracy": 0.3},
    {"min_absent_accuracy": 0.3},
    {"min_seen_accuracy": 0.15, "min_absent_accuracy": 0.25},
    {"min_seen_accuracy": 0.4, "min_absent_accuracy": 0.4},
    {"min_seen_accuracy": 0, "min_absent_accuracy": 1.0},
    {"min_seen_accuracy": 0.9},
]
SHARES = [0.01, 0.2, 0.5, 0.95]
CRITERIA = ["accuracy", "harmonic_mean", "equal_accuracies"]


def _with_infinities(case, seed):
    generator = torch.Generator().manual_seed(seed)
    at = torch.rand(case[0].shape, generator=generator)
    return (case[0].masked_fill(at < 0.03, INF).masked_fill(at > 0.95, -INF), *case[1:])


def _assert_best_gamma(case, dtype=torch.float32, **kwargs):
    expected, message = _reference_best_gamma(case, **kwargs)
    args = case[0].to(dtype), *case[1:]
    if not message:
        assert best_gamma(*args, **kwargs) == expected
        return
    with pytest.raises(ValueError, match="to be an accuracy that some gamma reaches") as error:
        best_gamma(*args, **kwargs)
    said = re.sub(r" is ([0-9.]+)\. Ask", lambda match: f" is {float(match[1]):.9f}. Ask", str(error.value))
    assert re.search(message, said)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("average", ["micro", "macro"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=str)
def test_best_gamma_equals_brute_force(seed, average, criterion, constraints):
    kwargs = {"criterion": criterion, "average": average, **constraints}
    _assert_best_gamma(random_case(seed), dtype=DTYPES[seed % 4], **kwargs)
    _assert_best_gamma(_with_infinities(random_case(seed + 6), seed), dtype=DTYPES[seed % 4], **kwargs)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("average", ["micro", "macro"])
def test_a_told_share_weights_the_accuracies(share, average):
    for seed in range(4):
        _assert_best_gamma(random_case(seed), average=average, absent_share=share)


def test_a_share_means_nothing_to_other_criteria():
    with pytest.raises(ValueError, match="`absent_share` to be None with the criterion 'harmonic_mean', which"):
        best_gamma(*random_case(0), criterion="harmonic_mean", absent_share=0.5)


@pytest.mark.parametrize("seed", range(6))
def test_an_accuracy_that_is_just_reached_is_enough(seed):
    """Also where sums of macro weights differ in the last bits."""
    case = random_case(seed)
    for gamma in _reference_gammas(case[0], *case[2:]):
        seen, absent, _ = _reference_at_gamma(*case, gamma, "macro")
        found = best_gamma(*case, average="macro", min_seen_accuracy=seen, min_absent_accuracy=absent).item()
        reached = _reference_at_gamma(*case, found, "macro")
        assert reached[:2] >= (seen - 1e-12, absent - 1e-12)
        with pytest.raises(ValueError, match=r"`min_absent_accuracy` .* with `min_seen_accuracy`"):
            best_gamma(*case, average="macro", min_seen_accuracy=seen, min_absent_accuracy=1.0)


def test_infinite_margins_bound_what_can_be_asked():
    logits = torch.tensor([[2.0, 0.0, INF, 0.0], [0.0, 0.0, 1.0, 3.0], [0.0, 0.0, INF, 1.0], [0.0, 0.0, 1.0, INF]])
    args = logits, torch.tensor([0, 3, 2, 2]), [0, 1]  # the seen sample and the last one are wrong at every gamma
    assert best_gamma(*args, min_absent_accuracy=0.6) == 0.0
    for kwargs in ({"min_absent_accuracy": 0.7}, {"min_seen_accuracy": 0.1}):
        with pytest.raises(ValueError, match=r"but got 0\.[71], and the best"):
            best_gamma(*args, **kwargs)


@pytest.mark.parametrize("name", ["min_seen_accuracy", "min_absent_accuracy"])
@pytest.mark.parametrize("value", [-0.1, 1.1, 80, NAN, "high"])
def test_accuracies_asked_for_are_fractions(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` to be a number in \[0, 1\], but got {value!r}"):
        best_gamma(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), [0, 1], **{name: value})


def test_nothing_is_asked_of_an_empty_group():
    with pytest.warns(UserWarning, match="no absent samples"):
        assert best_gamma(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([0]), [0, 1], min_seen_accuracy=1.0).isnan()


@pytest.mark.parametrize(
    ("logits", "target", "expected"),
    [
        ([[3.0, -9.0, 0.0], [-9.0, 5.0, 0.0], [0.0, 0.0, 2.0]], [0, 1, 2], 0.5),  # (-2, 3)
        ([[3.0, 0.0, 0.0], [-9.0, 5.0, 0.0], [5.0, 0.0, 5.0]], [1, 1, 2], 2.5),  # (0, 5)
        ([[0.0, -9.0, 2.0], [3.0, 0.0, 0.0]], [0, 1], NAN),  # no absent sample
        ([[1.0, 2.0, 0.0], [0.0, 2.0, 0.0]], [0, 2], 3.0),  # (2, inf): one logit beyond
        ([[1.0, 2.0, 0.0], [0.0, 0.0, 2.0]], [0, 2], 0.0),  # (-2, inf) holds 0
        ([[9.0, 0.0, 0.0], [0.0, 0.0, 4.0]], [1, 0], NAN),
    ],
)
def test_middle_of_the_best_interval(logits, target, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gamma = best_gamma(torch.tensor(logits), torch.tensor(target), [0, 1])
    assert gamma.item() == pytest.approx(expected, nan_ok=True)


def test_unbounded_below_and_nothing_right():
    logits = torch.tensor([[0.0, -9.0, -9.0, 4.0], [0.0, 0.0, 1.0, 3.0]])
    assert best_gamma(logits, torch.tensor([0, 2]), [0, 1]) == -5.0  # (-inf, -4): one logit beyond
    logits = torch.tensor([[4.0, -9.0, -9.0, 0.0], [0.0, 0.0, 1.0, 3.0]])
    assert best_gamma(logits, torch.tensor([0, 2]), [0, 1]) == 0.0  # (-inf, 4)
    assert best_gamma(logits, torch.tensor([1, 2]), [0, 1]) == 0.0  # no margin at all
    assert ausuc(logits, torch.tensor([1, 2]), [0, 1]) == 0.0


def test_best_interval_is_never_empty_between_infinite_margins():
    logits = torch.tensor([[INF, 0.0, 1.0, 0.0], [2.0, 0.0, 1.0, 0.0], [0.0, 0.0, -INF, 3.0]])
    assert best_gamma(logits, torch.tensor([0, 0, 3]), [0, 1]).isfinite()
    logits = torch.tensor([[0.0, 0.0, INF], [3.0, 0.0, 1.0]])
    assert best_gamma(logits, torch.tensor([2, 0]), [0, 1]) == 0.0  # (-inf, 2)
    logits = torch.tensor([[2.0, 0.0, INF, 0.0], [0.0, 0.0, 1.0, 3.0]])
    assert best_gamma(logits, torch.tensor([0, 2]), [0, 1]) == 0.0  # right below -inf only: no gamma is better
