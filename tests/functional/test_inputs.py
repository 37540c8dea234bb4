from __future__ import annotations

import pytest
import torch

from lightning_calibft.functional import (
    ausuc,
    average_logit_gap,
    best_gamma,
    harmonic_mean_accuracy,
    seen_unseen_curve,
    split_accuracy,
)

FUNCTIONS = [ausuc, average_logit_gap, best_gamma, harmonic_mean_accuracy, seen_unseen_curve, split_accuracy]
LOGITS, TARGET = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (
            LOGITS,
            torch.rand(4, 3),
            TypeError,
            "but got dtype torch.float32 with.*Soft and multi-label targets",
        ),
        (LOGITS, torch.ones(4, dtype=torch.bool), TypeError, "class ids, but got dtype torch.bool"),
        (LOGITS, TARGET[:, None], ValueError, r"`target` to have shape \(4,\).* but got \(4, 1\)"),
        (LOGITS, TARGET[:2], ValueError, r"`target` to have shape \(4,\).* but got \(2,\)"),
        (LOGITS, torch.tensor([0, 1, 3, 0]), ValueError, r"`target` to hold class ids in \[0, 3\), but got 3"),
        (LOGITS, torch.tensor([0, -100, 1, 0]), ValueError, r"but got -100. Pass `ignore_index`"),
        (LOGITS.long(), TARGET, TypeError, "`preds` to be a floating point tensor, but got torch.int64"),
        (LOGITS[0], TARGET, ValueError, r"`preds` to have shape \(N, C\), but got \(3,\)"),
    ],
)
def test_bad_tensors_are_named(function, logits, target, error, message):
    with pytest.raises(error, match=message):
        function(logits, target, [0, 1])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_split_is_validated(function):
    with pytest.raises(ValueError, match="`seen_classes` to hold class ids"):
        function(LOGITS, TARGET, [0, 3])
    with pytest.raises(ValueError, match="share no class"):
        function(LOGITS, TARGET, [0, 1], [1, 2])


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_any_integer_dtype_of_labels(function, dtype):
    logits = torch.randn(6, 300)
    target = torch.tensor([0, 1, 2, 100, 120, 0])
    a, b = (function(logits, labels, [0, 1, 2]) for labels in (target, target.to(dtype)))
    for x, y in zip(*((a, b) if isinstance(a, tuple) else ((a,), (b,))), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_inputs_are_left_alone_and_no_graph_is_kept(function):
    logits, target = LOGITS.clone().requires_grad_(), TARGET.clone()
    values = function(logits, target, [0, 1])
    for value in values if isinstance(values, tuple) else (values,):
        assert not value.requires_grad
    assert torch.equal(logits, LOGITS)
    assert torch.equal(target, TARGET)
