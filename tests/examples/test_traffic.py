"""The benchmark of unlabeled traffic, on a few of its runs."""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

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
    for name in (*traffic.BOTH_IDEAS, *(f"both models, {size} samples" for size in traffic.SIZES[:-1])):
        assert f"\n| {name} |" in page
    for sign in traffic.signs(traffic.read_small_runs()[0].on("heldout")):
        assert f"\n| and the {sign} |" in page
    assert len(re.findall(r"^\| estimated from", page, re.MULTILINE)) == 20


@pytest.fixture(scope="module")
def parts_of_both(traffic):
    runs = traffic.read_runs_of_both()
    kept = [next(run for run in runs if run.group == group) for group in traffic.GROUPS]
    return traffic.deployed(kept, splits=1)


def test_both_models_lose_less_than_one(traffic, parts_of_both):
    losses = {traffic.estimated: [], traffic.estimated_by_both: []}
    for share in (0.25, 0.75):
        for each in parts_of_both:
            for way, found in losses.items():
                of_one = way is traffic.estimated
                columns = (lambda part, margins, way=way: way(part, margins[:, 0])) if of_one else way
                found.append(traffic.tried(each, share, 500, draws=2, way=columns).loss)
    alone, both = (statistics.mean(found) for found in losses.values())
    assert both < alone - 0.1


def test_the_estimate_of_both_and_its_variants_are_the_same(traffic, parts_of_both):
    part = parts_of_both[0][0]
    for share in (0.05, 0.5):
        margins = part.traffic(np.full(300, share), np.random.default_rng(0))
        found = traffic.estimated_by_both(part, margins)
        assert found.misfit <= 1
        assert traffic.Both()(part, margins) == pytest.approx(found.share, rel=1e-6)


def test_runs_of_both_are_recorded(traffic, tmp_path):
    ((name, setting),) = itertools.islice(traffic.settings_of("digits"), 1)
    setting = dataclasses.replace(setting, epochs=1)
    traffic.record([(name, setting)], tmp_path)
    run = traffic.read_runs_of_both(tmp_path)[0]
    assert run.name == name
    assert len(run.margin) == len(run.right) == len(run.is_seen) == len(run.arrays["second"])
    assert 0 < run.is_seen.double().mean() < 1
    assert set(run.target.tolist()) == set(setting.seen) == set(run.seen)
    assert run.logits.shape == run.pretrained_logits.shape == (len(run.target), 10)
    with torch.no_grad():
        logits = setting.pretrained()(setting.data.target_test.tensors[0])
    margins = logits[:, run.seen].amax(1) - logits[:, run.absent].amax(1)
    second = run.arrays["second"]
    assert (margins - second.unsqueeze(1)).abs().min(1).values.max() < 0.01
    assert (second - run.margin).abs().mean() > 0.1


def test_other_signs_are_those_of_the_samples(traffic):
    run = traffic.read_small_runs()[0].on("heldout")
    test, held_out, copies = traffic.signs(run)["largest absent logit over the second"]
    logits = run.logits[0, run.absent].sort().values
    assert held_out[0] == logits[-1] - logits[-2]
    assert len(test) == len(run.margin)
    assert len(held_out) == len(copies) == len(run.target)
    lines = list(traffic.second_signs([run, traffic.read_small_runs()[1].on("heldout")]))
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| `AbsentShare`",
        *(f"| and the {sign}" for sign in traffic.signs(run)),
    ]
