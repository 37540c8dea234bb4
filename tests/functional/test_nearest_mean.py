from __future__ import annotations

import math

import pytest
import torch

from lightning_calibft.functional import class_means, nearest_class_mean_accuracy, nearest_class_mean_logits
from tests.golden import load


def _reference_means(features, target, num_classes):
    means = []
    for c in range(num_classes):
        rows = [row / row.norm() for row, label in zip(features.double(), target, strict=True) if label == c]
        means.append(sum(rows) / len(rows) if rows else torch.full_like(features[0].double(), torch.nan))
    return torch.stack(means)


def _reference_accuracy(features, target, means, samples, candidates):
    rights = []
    for row, label in zip(features.double(), target.tolist(), strict=True):
        if label in samples:
            cosines = {c: (row @ means[c] / row.norm() / means[c].norm()).item() for c in candidates}
            known = {c: cosine for c, cosine in cosines.items() if not math.isnan(cosine)}
            rights.append(bool(known) and max(known, key=known.get) == label)
    return sum(rights) / len(rights)


@pytest.mark.parametrize("name", ["digits_sgd", "digits_adamw_3_of_10"])
def test_real_features(name):
    data = load(name)
    features, target = data["test_features"], data["test_target"]
    train, test = slice(0, 600), slice(600, None)
    means = class_means(features[train], target[train], 10)
    expected = _reference_means(features[train], target[train], 10)
    assert torch.allclose(means.double(), expected, atol=1e-6)
    groups = {"seen": data["seen_classes"].tolist(), "absent": data["absent_classes"].tolist(), "all": list(range(10))}
    for samples, candidates in (("all", "all"), ("seen", "all"), ("absent", "all"), ("absent", "absent")):
        value = nearest_class_mean_accuracy(
            features[test], target[test], means, groups["seen"], samples=samples, candidates=candidates
        )
        assert value == _reference_accuracy(features[test], target[test], expected, groups[samples], groups[candidates])


def test_classes_without_a_mean_are_never_predicted():
    data = load("digits_sgd")
    seen = data["seen_classes"].tolist()
    means = class_means(data["train_features"], data["train_target"], 10)
    assert means.isnan().all(1).tolist() == [c not in seen for c in range(10)]
    logits = nearest_class_mean_logits(data["test_features"], means)
    assert torch.equal(logits == -torch.inf, means.isnan().all(1).expand_as(logits))
    args = data["test_features"], data["test_target"], means, seen
    assert nearest_class_mean_accuracy(*args, samples="absent") == 0.0
    assert nearest_class_mean_accuracy(*args, samples="absent", candidates="absent") == 0.0
    assert nearest_class_mean_accuracy(*args, samples="seen") > 0.9


def test_left_out_labels():
    features, target = torch.randn(8, 4), torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    expected = class_means(features[:6], target[:6], 3)
    for label, kwargs in ((-1, {"ignore_index": -1}), (7, {"validate_args": False}), (-5, {"validate_args": False})):
        target[6:] = label
        assert torch.allclose(class_means(features, target, 3, **kwargs), expected)


def test_half_precision_is_computed_in_float32():
    features = torch.randn(6, 4).bfloat16()
    means = class_means(features, torch.tensor([0, 1, 2, 0, 1, 2]), 3)
    assert means.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = nearest_class_mean_logits(features, means)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, nearest_class_mean_logits(features.float(), means))
    assert class_means(features.double(), torch.zeros(6).long(), 1).dtype == torch.float64


def test_bad_tensors_are_named():
    features, target, means = torch.randn(4, 5), torch.tensor([0, 1, 2, 0]), torch.randn(3, 5)
    with pytest.raises(ValueError, match="`features` to have 5 columns, as `class_means` has, but got 4"):
        nearest_class_mean_accuracy(features[:, :4], target, means, [0])
    with pytest.raises(TypeError, match="`features` to be a floating point tensor"):
        class_means(features.long(), target, 3)
    with pytest.raises(ValueError, match=r"`target` to hold class ids in \[0, 2\), but got 2"):
        class_means(features, target, 2)
    with pytest.raises(ValueError, match="`class_means` to be two-dimensional"):
        nearest_class_mean_accuracy(features, target, means[0], [0])
