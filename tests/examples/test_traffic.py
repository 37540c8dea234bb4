"""The benchmark of unlabeled traffic, on a few of its runs."""

from __future__ import annotations

import re
import statistics
import warnings
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def traffic():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import traffic

        yield traffic


@pytest.fixture(scope="module")
def parts(traffic):
    small, pictures = traffic.read_small_runs(), traffic.read_picture_runs()
    return traffic.deployed([run.on("heldout") for run in (small[0], small[12], small[-1], *pictures[4:8])])


def test_the_estimate_and_its_variants_are_the_same(traffic, parts):
    for part in (each[0] for each in parts):
        for share in (0.05, 0.5):
            margin = part.traffic(np.full(200, share), np.random.default_rng(0))
            found = traffic.estimated(part, margin)
            if found.misfit <= 1:
                assert traffic.Mixture()(part, margin) == pytest.approx(found.share, rel=1e-6)


def test_an_estimated_share_loses_less_than_the_default(traffic, parts):
    losses, default, held = [], [], []
    for share in (0.02, 0.25, 0.9):
        for each in parts:
            found = traffic.tried(each, share, 500, draws=2)
            losses.append(found.loss)
            held.append(found.held)
            default.append(traffic.fixed(lambda part: part.gamma(0.5), share)(each))
    assert statistics.mean(losses) < 0.5 * statistics.mean(default)
    assert statistics.mean(held) > 0.8


def test_a_third_group_does_not_go_unnoticed(traffic, parts):
    name = "an unseen third group"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        streams = [traffic.followed(each[0], name, traffic.streams()[name]) for each in parts]
    widths = []
    for found in streams:
        before, during = found[: traffic.THIRD.start // traffic.EVERY], found[24:32]
        assert max(each.misfit for each in during) > 3
        assert all(each.share < 0.99 for each in during)
        widths.append([statistics.median(each.high - each.low for each in some) for some in (before, during)])
    before, during = map(statistics.mean, zip(*widths, strict=True))
    assert during > 1.5 * before


def test_the_page_has_every_table(traffic):
    page = (FOLDER / "traffic.md").read_text()
    assert (FOLDER / "figures" / "traffic.png").exists()
    for name in (*traffic.IDEAS, *traffic.GAMMA_IDEAS, *traffic.streams()):
        assert f"\n| {name} |" in page
    assert len(re.findall(r"^\| estimated from", page, re.MULTILINE)) == 20
