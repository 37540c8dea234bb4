"""What the network and the nearest class mean gain."""

from __future__ import annotations

import copy
from dataclasses import astuple

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_calibft.analysis.accuracy_gain import accuracy_gain, group_accuracies
from tests.calibration.nets import Net
from tests.helpers.analysis_references import _reference_ncm
from tests.helpers.references import _reference_split_accuracy, random_case
from tests.helpers.runs import ABSENT, NUM_CLASSES, SEEN, VAL, blobs, pretrained, quiet

pytestmark = quiet
CLASS_DATA = blobs([*SEEN, *ABSENT], each=9, seed=7)
TEST = [0.6 * VAL.tensors[0], VAL.tensors[1]]  # not too easy


def reference(logits, target, seen=SEEN, absent=ABSENT):
    every = sorted(seen + absent)
    return [
        _reference_split_accuracy(logits, target, seen, every),
        _reference_split_accuracy(logits, target, absent, every),
        _reference_split_accuracy(logits, target, seen, seen),
        _reference_split_accuracy(logits, target, absent, absent),
    ]


def test_group_accuracies():
    logits, target, seen, absent = random_case(0)
    assert astuple(group_accuracies(logits, target, seen, absent)) == pytest.approx(
        reference(logits, target, seen, absent)
    )


def test_gain():
    before = pretrained()
    after = copy.deepcopy(before)
    with torch.no_grad():  # absent logits pushed down, features changed
        after.fc.bias[ABSENT] -= 4
        after.body[0].weight += 0.3 * torch.randn_like(after.body[0].weight)
    test = [(TEST[0][:20], TEST[1][:20]), (TEST[0][20:], TEST[1][20:])]
    gain = accuracy_gain(before, after, DataLoader(CLASS_DATA, 8, shuffle=True), test, SEEN)
    for model, network, ncm in (
        (before, gain.network_before, gain.ncm_before),
        (after, gain.network_after, gain.ncm_after),
    ):
        model = copy.deepcopy(model).eval()
        with torch.no_grad():
            assert astuple(network) == pytest.approx(reference(model(TEST[0]), TEST[1]))
            features, test_features = model.body(CLASS_DATA.tensors[0]), model.body(TEST[0])
        similarities = torch.tensor(_reference_ncm(features, CLASS_DATA.tensors[1], test_features, NUM_CLASSES))
        assert astuple(ncm) == pytest.approx(reference(similarities, TEST[1]))
    assert gain.network.absent_among_all < -0.3  # else the test shows little
    assert astuple(gain.network) == pytest.approx(
        [b - a for a, b in zip(astuple(gain.network_before), astuple(gain.network_after), strict=True)]
    )
    assert gain.ncm.absent_among_all == gain.ncm_after.absent_among_all - gain.ncm_before.absent_among_all
    assert gain.ncm.absent_among_all != gain.network.absent_among_all

    _, ax = gain.plot()
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == pytest.approx([100 * value for value in (*astuple(gain.network), *astuple(gain.ncm))])


def test_the_head_can_be_named():
    with pytest.raises(ValueError, match="nowhere"):
        accuracy_gain(Net(), Net(), [], [], SEEN, head="nowhere")
