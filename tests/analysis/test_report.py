"""Snapshots, what is said about them, and the page."""

from __future__ import annotations

import base64
import html
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.metadata import version
from xml.etree import ElementTree

import pytest
import torch
from matplotlib import pyplot as plt

from lightning_calibft import ClassSplit
from lightning_calibft.analysis import calibration_report, compare_curves
from lightning_calibft.analysis.accuracy_gain import GroupAccuracies
from lightning_calibft.analysis.history import Evaluation, History, Snapshot, evaluation_of
from lightning_calibft.analysis.logit_levels import GroupLevels, LogitLevels
from lightning_calibft.analysis.verdict import degraded, verdict
from lightning_calibft.analysis.weights import MeanSimilarity, RowNorms
from lightning_calibft.calibration.result import CalibrationResult
from lightning_calibft.metrics import AUSUC
from tests.helpers.analysis_references import _reference_norms, _reference_similarity
from tests.helpers.references import (
    _reference_at_gamma,
    _reference_ausuc,
    _reference_gammas,
    _reference_split_accuracy,
    random_case,
)


def snapshot(step, ausuc=0.8, own=0.9, overall=0.5, best=0.75, count=400, within_absent=0.9):
    evaluation = Evaluation(overall, GroupAccuracies(0.96, 0.04, 0.97, own), ausuc, 3.25, best, 0.71, 0.79)
    group = GroupLevels(1.5, 2.25, 0.5, count)
    norms, updates = RowNorms(1.0, 0.1, 2.0, 0.2), MeanSimilarity(0.1, within_absent, -0.5)
    return Snapshot(step // 10, step, norms, updates, LogitLevels(group, group), evaluation)


def test_snapshots_become_plain_numbers_and_back():
    for original in (snapshot(10), Snapshot(0, 0)):
        assert Snapshot.from_dict(json.loads(json.dumps(original.as_dict()))) == original


@pytest.mark.parametrize("seed", range(3))
def test_an_evaluation_is_what_the_definitions_say(seed):
    logits, target, seen, absent = random_case(seed)
    metric = AUSUC(logits.shape[1], seen, absent)
    metric.update(logits, target)
    found = evaluation_of(metric)
    of_seen, of_absent, overall = _reference_at_gamma(logits, target, seen, absent, 0.0)
    assert (found.groups.seen_among_all, found.groups.absent_among_all) == pytest.approx((of_seen, of_absent))
    assert found.overall == pytest.approx(overall)
    assert found.groups.seen_among_seen == pytest.approx(_reference_split_accuracy(logits, target, seen, seen))
    assert found.groups.absent_among_absent == pytest.approx(_reference_split_accuracy(logits, target, absent, absent))
    assert found.ausuc == pytest.approx(_reference_ausuc(logits, target, seen, absent))
    at_best = _reference_at_gamma(logits, target, seen, absent, found.best_gamma)
    assert (found.best_seen, found.best_absent, found.best_overall) == pytest.approx(at_best)
    others = [_reference_at_gamma(logits, target, seen, absent, g)[2] for g in _reference_gammas(logits, seen, absent)]
    assert found.best_overall == pytest.approx(max(others))


def test_a_history():
    first, second, third = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 4)
    seen, absent, split = [0, 3], [1, 2], ClassSplit(5, [0, 3], [1, 2])
    history = History(1, 10, first)
    history.add(split, 2, 20, second)
    history.add(split, 3, 30, third)
    history.add(split, 3, 30, second)  # in place of the last
    begun, *rest = history.snapshots
    assert (begun.epoch, begun.step, begun.updates) == (1, 10, None)
    assert (begun.norms.seen_mean, begun.norms.seen_std) == pytest.approx(_reference_norms(first, seen))
    assert [(each.epoch, each.step) for each in rest] == [(2, 20), (3, 30)]
    for each in rest:
        assert each.norms.absent_mean == pytest.approx(_reference_norms(second, absent)[0])
        found = (each.updates.within_seen, each.updates.within_absent, each.updates.between)
        assert found == pytest.approx(_reference_similarity(first, second, seen, absent))

    again = History.from_state_dict(history.state_dict())
    assert again.snapshots == history.snapshots
    assert again.split == split
    assert again.begins_with(first)
    assert not again.begins_with(second)
    again.add(ClassSplit(5, [0, 3, 4], [1, 2]), 4, 40, third)  # other classes: what was before does not compare
    assert [each.step for each in again.snapshots] == [10, 40]
    assert again.snapshots[0].norms.seen_mean == pytest.approx(_reference_norms(first, [0, 3, 4])[0])


def test_features_that_held_and_gamma_that_helps():
    features, gamma, *_, updates = verdict([snapshot(0), snapshot(10, ausuc=0.82)])
    assert features.startswith("The features of absent classes have held up.")
    assert "AUSUC went from 0.800 to 0.820" in features
    assert "from 90.0% to 90.0%" in features
    assert "trainer.validate" not in features
    assert gamma.startswith("Gamma helps: without it, 50.0% of the samples are classified correctly")
    assert "(96.0% of seen and 4.0% of absent ones)." in gamma
    assert "gamma = 3.25, the same weights reach 75.0% (71.0% and 79.0%)" in gamma
    assert "the logits of absent classes are too low" in gamma
    assert "mean cosine between their updates: 0.90" in updates
    assert "pushed in much the same direction" in updates


@pytest.mark.parametrize(
    ("change", "fallen"),
    [({"ausuc": 0.7}, ["AUSUC"]), ({"own": 0.8}, ["Acc_U/U"]), ({"ausuc": 0.7, "own": 0.8}, ["AUSUC", "Acc_U/U"])],
)
def test_calibration_cannot_help_where_features_are_degraded(change, fallen):
    first, middle, last = snapshot(10), snapshot(20, ausuc=0.83), snapshot(30, **change)
    assert degraded(first, last) == fallen
    text = verdict([first, middle, last])[0]
    assert text.startswith("CALIBRATION CANNOT HELP")
    assert f"({' and '.join(fallen)} fell)" in text
    assert "AUSUC was best, 0.830, at step 20 (epoch 2)" in text


def test_what_chance_explains_is_no_degradation():
    # 0.9 of 400: a standard error of 0.015.
    for own, count, fallen in ((0.875, 400, []), (0.86, 400, ["Acc_U/U"]), (0.86, 40, []), (0.5, 40, ["Acc_U/U"])):
        assert degraded(snapshot(0, count=count), snapshot(10, own=own, count=count)) == fallen
    assert degraded(snapshot(0, own=1.0), snapshot(10, own=0.9975)) == []  # one sample of 400


def test_gamma_with_little_to_win():
    gamma = verdict([snapshot(0), snapshot(10, overall=0.74)])[1]
    assert gamma.startswith("Gamma has little to gain here: without it, 74.0% of the samples")


def test_one_validation_and_none():
    (features, _, *_) = verdict([snapshot(10)])
    assert "A single validation (AUSUC 0.800, Acc_U/U 90.0%) cannot show" in features
    assert "`trainer.validate` before `trainer.fit`" in features
    nothing, updates = verdict([Snapshot(0, 0), replace(snapshot(10, within_absent=0.2), evaluation=None)])
    assert nothing.startswith("No validation had labeled samples of both")
    assert "pushed in different directions" in updates
    assert len(verdict([Snapshot(0, 0)])) == 1


def pictures(text):
    """How many pictures a page has. They are vectors, and something is drawn."""
    found = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    found += [base64.b64decode(code).decode() for code in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", text)]
    for picture in found:
        assert len(ElementTree.fromstring(picture.replace("xlink:", "")).findall(".//{*}path")) > 20
    return len(found)


class Outline(HTMLParser):
    """The elements of a page by name, and whether each is closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize("format", ["markdown", "html"])
def test_the_page(format):
    before, after = torch.randn(6, 4), torch.randn(6, 4)
    split, snapshots = ClassSplit(6, [0, 2, 3], [1, 4]), [snapshot(0), snapshot(10), snapshot(20, ausuc=0.4)]
    text = calibration_report(snapshots, split, (before, after), format=format)
    assert pictures(text) == 6
    assert "http" not in text  # nothing is loaded from elsewhere
    assert "CALIBRATION CANNOT HELP" in text
    assert "3 seen and 2 absent of 6 classes" in text
    numbers = ["2", "20", "0.500", "0.960", "0.040", "0.970", "0.900", "0.400", "3.250", "0.750", "0.710", "0.790"]
    if format == "markdown":
        assert f"| {' | '.join(numbers)} |" in text
        assert text.startswith("# Calibration report\n")
    else:
        assert "".join(f"<td>{number}</td>" for number in numbers) in text
        assert text.startswith("<!DOCTYPE html>")
        outline = Outline(text)
        assert {"html", "body", "h1", "h2", "p", "ul", "li", "table", "tr", "td", "th"} <= {*outline.found}
        ids = [value for name, value in outline.attributes if name == "id"]
        assert len(ids) == len({*ids})
        # What pictures refer to is in the page.
        inside = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text)
        assert {one or other for one, other in inside} <= {*ids}
    assert plt.get_fignums() == []  # the user's figures are left alone


def test_a_page_without_validations_and_weights():
    weights_only = [replace(each, levels=None, evaluation=None) for each in (snapshot(0), snapshot(10))]
    assert pictures(calibration_report(weights_only, ClassSplit(3, [0, 1]))) == 2
    levels_only = [replace(snapshot(10), norms=None, updates=None, evaluation=None)]
    assert pictures(calibration_report(levels_only, ClassSplit(3, [0, 1]))) == 2
    nan = replace(snapshot(10), updates=MeanSimilarity(math.nan, math.nan, math.nan))
    assert pictures(calibration_report([nan], ClassSplit(3, [0, 1]))) == 5


def test_many_classes_are_thinned_out_for_the_picture():
    weights = torch.randn(1501, 3), torch.randn(1501, 3)
    text = calibration_report([Snapshot(1, 10)], ClassSplit(1501, range(500)), weights)
    assert "for 167 seen and 167 absent classes" in text
    assert pictures(text) == 1


NAMES = [
    "<script>alert(1)</script>",
    "a|b",
    "_x_ *y*",
    "[link](http://e.org)",
    "`code`",
    "tabby & cat",
    "two\nlines",
    "é",
]


def found_gamma(split, **options):
    return CalibrationResult(1.234, 0.05, 90, split, "alg", **options)


def test_the_calibration_of_the_model():
    split, logits, target = ClassSplit(6, [0, 1, 2]), torch.randn(60, 6), torch.arange(60) % 6
    curves = compare_curves({"step 10": logits, "before": -logits}, target, [0, 1, 2]).values()
    known = {"absent_share": 0.25, "seen_change": -0.021, "absent_change": 0.214, "break_even_share": 0.09}
    texts = {
        format: calibration_report(
            [snapshot(10)],
            split,
            curves=[*curves],
            result=found_gamma(split, **known),
            model="Net",
            format=format,
        )
        for format in ("markdown", "html")
    }
    seen, absent, _ = _reference_at_gamma(logits, target, [0, 1, 2], [3, 4, 5], 1.234)
    for text in texts.values():
        assert "Model: Net" in text
        assert "1.234 ± 0.050 (alg, 90 samples, for a share of 25.0% of absent samples)" in text
        assert f"lightning-calibft {version('lightning-calibft')}, torch {torch.__version__}" in text
        assert "Expected change in accuracy: -2.1 points on seen samples, +21.4 on absent ones." in text
        assert pictures(text) == 6
    assert f"| calibrated | 1.234 | {seen:.3f} | {absent:.3f} |" in texts["markdown"]
    assert f"<td>calibrated</td><td>1.234</td><td>{seen:.3f}</td><td>{absent:.3f}</td>" in texts["html"]
    labels = re.findall("<!-- (.*?) -->", texts["html"])
    assert "step 10, calibrated (gamma 1.23)" in labels
    assert "before, no calibration (gamma 0)" in labels
    assert "before, calibrated (gamma 1.23)" not in labels  # it is not for those weights


def test_names_of_users_are_escaped():
    split, model = ClassSplit(8, [0, 1, 2]), "Net</h1><img src=http://e.org>"
    curves = compare_curves(
        {"<b>": torch.randn(8, 8)}, torch.arange(8), [0, 1, 2], gammas={"<b>": {"<i>": 0.0}}
    ).values()
    options = {"class_names": dict(enumerate(NAMES)), "model": model, "curves": [*curves]}
    page = calibration_report([Snapshot(0, 0)], split, **options, format="html")
    outline = Outline(page)
    assert not {"script", "img", "b", "i", "a"} & {*outline.found}
    for row, name in enumerate(NAMES):
        assert f"{row} {name}" in outline.texts
    assert f"Model: {model}" in outline.texts
    assert "<i>" in outline.texts

    text = calibration_report([Snapshot(0, 0)], split, **options)
    (seen,) = re.findall(r"Seen classes \(3\): (.*)", text)
    assert seen == r"0 &lt;script&gt;alert(1)&lt;/script&gt;, 1 a\|b, 2 \_x\_ \*y\*"
    (absent,) = re.findall(r"Absent classes \(5\): (.*)", text)
    assert absent == r"3 \[link\](http://e.org), 4 \`code\`, 5 tabby &amp; cat, 6 two lines, 7 é"
    assert not re.search("<(script|img|b|i)\\b", text)


def test_classes_with_and_without_a_name():
    split = ClassSplit(500, range(250))
    page = html.unescape(calibration_report([Snapshot(0, 0)], split, class_names={0: "cat", 299: "dog"}, format="html"))
    for entry in ("Seen classes (250)", "<li>0 cat</li>", "<li>199</li>", "<li>and 50 more</li>", "<li>299 dog</li>"):
        assert entry in page
    assert "Classes" not in calibration_report([Snapshot(0, 0)], split)


def test_the_page_does_not_depend_on_the_style_of_the_user():
    arguments = [snapshot(0), snapshot(10)], ClassSplit(3, [0, 1])
    page = calibration_report(*arguments, format="html")
    with plt.style.context(["dark_background", {"svg.fonttype": "none", "figure.dpi": 10, "savefig.dpi": 10}]):
        assert calibration_report(*arguments, format="html") == page
        assert plt.rcParams["svg.fonttype"] == "none"
    assert "prefers-color-scheme:dark" in page
    assert "#000000" not in page  # but the color of the text
    assert not [tag for tag in Outline(page).found if tag in ("link", "script", "iframe")]
    assert "@import" not in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curves": [1]}, "`curves` to be a list of at least one MethodCurve"),
        ({"result": 1.0}, "`result` to be a CalibrationResult, but got a float"),
        ({"class_names": ["cat"]}, "`class_names` to be a Mapping, but got a list"),
        ({"model": None}, "`model` to be a str"),
    ],
)
def test_what_a_report_is_not_of(options, message):
    with pytest.raises(TypeError, match=message):
        calibration_report([Snapshot(0, 0)], ClassSplit(3, [0, 1]), **options)
