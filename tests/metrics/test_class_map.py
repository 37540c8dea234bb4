"""Metrics that map targets to rows of the head themselves."""

from __future__ import annotations

import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from lightning_calibft.metrics import AUSUC, AverageLogitGap, SplitAccuracy, absent_class_metrics
from tests.helpers.references import random_case
from tests.metrics.cases import make, same

# The targets are not in the order of the rows, and not even 0 to 8.
ROWS = {40: 3, 0: 7, 2: 0, 5: 5, 11: 1, 12: 8, 1: 2, 3: 6, 4: 4}
TARGETS = torch.tensor([{row: target for target, row in ROWS.items()}[row] for row in range(9)])


@pytest.mark.parametrize("validate_args", [True, False])
def test_equals_the_metric_of_targets_mapped_by_hand(name, batch, validate_args):
    logits, rows = batch
    mapping, plain = make(name, class_map=ROWS, validate_args=validate_args), make(name)
    mapping = pickle.loads(pickle.dumps(mapping))
    for part in (slice(25), slice(25, None)):
        mapping.update(logits[part], TARGETS[rows[part]])
        plain.update(logits[part], rows[part])
    assert same(mapping.compute(), plain.compute())


@pytest.mark.parametrize("ignore_index", [-100, 255, 40])
def test_ignored_targets_are_left_out(name, batch, ignore_index):
    """Row 3 has samples though target 3 may be ignored, and the other way round."""
    logits, rows = batch
    target = TARGETS[rows]
    target[::4] = ignore_index
    keep = target != ignore_index
    mapping, plain = make(name, class_map=ROWS, ignore_index=ignore_index), make(name)
    mapping.update(logits, target)
    plain.update(logits[keep], rows[keep])
    assert same(mapping.compute(), plain.compute())


@pytest.mark.parametrize("ignore_index", range(6))
def test_an_ignored_target_may_have_the_number_of_a_row(name, batch, ignore_index):
    logits, rows = batch
    keep = rows != ROWS[ignore_index]
    mapping, plain = make(name, class_map=ROWS, ignore_index=ignore_index), make(name)
    mapping.update(logits, TARGETS[rows])
    plain.update(logits[keep], rows[keep])
    assert same(mapping.compute(), plain.compute())


def test_targets_without_a_row(name, batch):
    logits, rows = batch
    target = TARGETS[rows]
    target[7] = 6
    text = r"`class_map` to give the row of every target, but 6 is missing\. Add it"
    with pytest.raises(ValueError, match=text):
        make(name, class_map=ROWS).update(logits, target)
    with pytest.raises(ValueError, match=text):
        make(name, class_map=ROWS, ignore_index=255).update(logits, target)
    mapping, plain = make(name, class_map=ROWS, validate_args=False), make(name)
    mapping.update(logits, target)
    keep = target != 6
    plain.update(logits[keep], rows[keep])
    assert same(mapping.compute(), plain.compute())


def test_names_and_errors(name, batch):
    logits, rows = batch
    names = list("abcdefghi")
    by_name = make(name, class_map={target: names[row] for target, row in ROWS.items()}, label_names=names)
    assert by_name.class_map == ROWS
    assert make(name).class_map is None
    with pytest.raises(ValueError, match=r"in \[0, 9\), but got 9"):
        make(name, class_map=[9])
    with pytest.raises(TypeError, match=r"class ids, .*A `class_map` maps integers"):
        by_name.update(logits, rows / 9)
    with pytest.raises(ValueError, match=r"`target` to have shape \(60,\)"):
        by_name.update(logits, TARGETS[rows][:, None])


def test_moving_devices_moves_the_map(name):
    metric = make(name, class_map=ROWS).to("meta")
    assert {tensor.device.type for tensor in metric._constants.values()} == {"meta"}


@pytest.mark.parametrize("cls", [AUSUC, SplitAccuracy, AverageLogitGap])
def test_two_maps_in_one_collection_stay_right(cls):
    """Their states are equal after the first batch, so that a collection would merge them."""
    logits, rows, seen, absent = random_case(0)
    maps = [
        {0: 0, **{target: target for target in range(1, 9)}},
        {0: 0, **{target: 9 - target for target in range(1, 9)}},
    ]
    metrics = MetricCollection({str(index): cls(9, seen, absent, class_map=rows) for index, rows in enumerate(maps)})
    easy = torch.eye(9)[:1].repeat(3, 1), torch.zeros(3, dtype=torch.long)
    metrics.update(*easy)
    metrics.update(logits, rows)
    for index, class_map in enumerate(maps):
        alone = cls(9, seen, absent)
        alone.update(*easy)
        alone.update(logits, torch.tensor([class_map[target] for target in rows.tolist()]))
        assert same(metrics.compute()[str(index)], alone.compute())


def test_collection(batch):
    logits, rows = batch
    _, _, seen, absent = random_case(0)
    mapping = absent_class_metrics(9, seen, absent, class_map=[f"class {ROWS[t]}" for t in range(6)], label_names=NAMES)
    plain = absent_class_metrics(9, seen, absent)
    keep = TARGETS[rows] < 6
    mapping.update(logits[keep], TARGETS[rows][keep])
    plain.update(logits[keep], rows[keep])
    assert mapping.compute() == plain.compute()
    assert {len(group) for group in mapping.compute_groups.values()} == {5}


NAMES = [f"class {row}" for row in range(9)]
