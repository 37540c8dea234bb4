"""What is said of arguments that no other test refuses: which one it is, what it was, and what to do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_calibft import ClassSplit, calibrate
from lightning_calibft.calibration.batch_reader import BatchReader
from lightning_calibft.estimators import check_estimator
from lightning_calibft.functional import (
    best_gamma,
    calibrate_logits,
    class_means,
    nearest_class_mean_logits,
    weight_aligning,
)
from lightning_calibft.labels.class_map import resolve_class_map, rows_tensor, to_rows
from lightning_calibft.metrics import AUSUC

LOGITS, TARGET = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((LOGITS.long(), 2.5, [0]), TypeError, "`logits` to be a floating point tensor, but got torch.int64"),
        ((LOGITS.tolist(), 2.5, [0]), TypeError, "`logits` to be a tensor, but got a list. .* `torch.as_tensor`"),
        ((LOGITS[0, 0], 2.5, [0]), ValueError, r"`logits` to have shape \(..., C\), but got \(\)"),
        ((LOGITS, None, [0]), TypeError, "`gamma` to be a number, but got None"),
        ((LOGITS, True, [0]), TypeError, "`gamma` to be a number, but got True"),
        ((LOGITS, torch.ones(2), [0]), TypeError, "`gamma` to be a number, but got tensor"),
        ((LOGITS, 2.5, [3]), ValueError, r"`seen_classes` to hold class ids in \[0, 3\), but got 3"),
    ],
)
def test_calibrate_logits(arguments, error, text):
    with pytest.raises(error, match=f"^Expected argument {text}"):
        calibrate_logits(*arguments)


@pytest.mark.parametrize(
    ("gamma", "error", "text"),
    [(math.nan, ValueError, "nan"), (None, TypeError, "None"), ("2", TypeError, "'2'"), ([1.0], TypeError, "")],
)
def test_accuracies_at_what_is_no_gamma(gamma, error, text):
    metric = AUSUC(3, [0, 1])
    metric.update(LOGITS, TARGET)
    with pytest.raises(error, match=f"^Expected argument `gamma` to be a number, but got .*{text}"):
        metric.accuracies(gamma)


@pytest.mark.parametrize(
    ("name", "option"), [("fixed", "gamma"), ("alg", "absent_share"), ("pseudo_absent", "absent_share")]
)
@pytest.mark.parametrize("value", ["2", True, [2.0], 1j])
def test_options_that_are_no_numbers(name, option, value):
    with pytest.raises(TypeError, match=f"^Expected argument `{option}` to be a number, but got"):
        check_estimator(name, {option: value})


def test_options_that_are_no_mapping():
    with pytest.raises(TypeError, match=r"^Expected argument `estimator_kwargs` to be a mapping, but got 3"):
        check_estimator("alg", 3)


@pytest.mark.parametrize(
    ("returned", "text"),
    [(None, "a NoneType"), ((1,), "a tuple of 1 items"), ((1, 2, 3), "a tuple of 3 items"), (LOGITS, "a Tensor")],
)
def test_what_unpack_batch_returns(returned, text):
    reader = BatchReader(lambda batch: returned)
    for split in (reader.rows, lambda batch: reader.arguments(batch, None)):
        with pytest.raises(TypeError, match=rf"`unpack_batch` to return `\(inputs, target\)`, but got {text}"):
            split(LOGITS)


def test_targets_that_are_no_tensors():
    for function in (lambda x: ClassSplit.from_targets(x, 3), lambda x: to_rows(x, rows_tensor({0: 1}))):
        with pytest.raises(TypeError, match=r"^Expected argument `target` to be a tensor, but got a list. Convert it"):
            function([0, 1])


@pytest.mark.parametrize("argument", ["class_map", "label_names"])
def test_a_path_that_cannot_be_one(argument):
    arguments = {"class_map": ["a"], argument: "a\0b"}
    with pytest.raises(ValueError, match=f"^Expected argument `{argument}` to be one of .* or the path of a file"):
        resolve_class_map(**arguments)


@pytest.mark.parametrize(("value", "error"), [(2.0, TypeError), (True, TypeError), (0, ValueError), (-3, ValueError)])
def test_number_of_classes_of_means(value, error):
    with pytest.raises(error, match=r"^Expected argument `num_classes` to be (an integer|at least 1), but got"):
        class_means(LOGITS[:0], TARGET[:0], value)


def test_features_and_means_of_different_width():
    with pytest.raises(ValueError, match=r"^Expected argument `features` to have 5 columns, as `class_means` has"):
        nearest_class_mean_logits(LOGITS, torch.zeros(3, 5))
    with pytest.raises(TypeError, match=r"^Expected argument `class_means` to be a tensor, but got a list"):
        nearest_class_mean_logits(LOGITS, [[1.0]])


def test_weights_that_no_factor_scales():
    with pytest.raises(ValueError, match=r"^Expected argument `weight` to have nonzero rows for absent classes"):
        weight_aligning(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), [0])


def test_gammas_of_logits_at_the_limits_of_float64():
    logits = torch.tensor([[1.5e308, 0.0], [1.2e308, 0.0]], dtype=torch.float64)
    assert best_gamma(logits, torch.tensor([0, 1]), [0]).item() == pytest.approx(1.35e308)


def test_labels_of_one_byte_are_no_mask():
    """With as many samples as classes, indexing by them would have chosen other classes."""
    labels = torch.tensor([1, 2, 2, 1, 2, 1], dtype=torch.uint8)
    result = calibrate(nn.Sequential(nn.Linear(2, 6)), [(torch.randn(6, 2), labels)], progress=False)
    assert result.split == ClassSplit(6, [1, 2])
