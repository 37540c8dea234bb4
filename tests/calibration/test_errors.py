"""What ``calibrate()`` refuses; the model is then as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import calibrate, get_gamma, set_gamma
from lightning_calibft.metrics import AverageLogitGap
from tests.calibration.nets import ALL, X, Y, net
from tests.helpers.runs import ABSENT, SEEN, assert_same, blobs, loader, quiet

pytestmark = quiet


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"seen_classes": [0, 6]}, ValueError, r"`seen_classes` to hold class ids in \[0, 6\), but got 6"),
        ({"seen_classes": [0, 0]}, ValueError, "each class once"),
        ({"seen_classes": [True]}, TypeError, "to hold integers, but got True"),
        ({"seen_classes": range(6)}, ValueError, "to leave out at least one of the 6 classes"),
        ({"seen_classes": [0]}, ValueError, "at least 2 classes, but got 1"),
        ({"seen_classes": SEEN, "absent_classes": SEEN}, ValueError, "share no class, but both hold 0, 2, 3"),
        ({"estimator": "beta"}, ValueError, "one of 'alg', 'pseudo_absent', .* or a metric, but got 'beta'"),
        ({"estimator": AverageLogitGap(7, SEEN)}, ValueError, "made for the 6 classes of the head, but got one for 7"),
        ({"estimator": AverageLogitGap(6, SEEN), "seen_classes": SEEN}, ValueError, "with an `estimator`"),
        ({"head": "body.0.x"}, ValueError, "`head` to name a module of Net, but got 'body.0.x'"),
        ({"unpack_batch": "a.b"}, ValueError, "`unpack_batch` to be the import path"),
        ({"loader": []}, ValueError, "to hold samples of the seen classes, but got none. Check the loader"),
        ({"loader": [], "seen_classes": SEEN}, ValueError, "to hold samples of the seen classes, but got none"),
        ({"loader": loader(), "seen_classes": ABSENT}, ValueError, "to hold samples of the seen classes, but got none"),
        ({"loader": [(X, torch.full_like(Y, -100))]}, ValueError, "to hold samples of the seen classes, but got none"),
        ({"loader": [(X, Y + 4)]}, ValueError, r"class ids in \[0, 6\), rows of the classification head, but got"),
        ({"loader": [(X, Y - 1)]}, ValueError, r"class ids in \[0, 6\), rows of the classification head, but got -1"),
        ({"loader": [(X, Y + 4)], "seen_classes": SEEN}, ValueError, "but 30 of 45 samples have other labels"),
        (
            {"loader": [(X, 0.9 * nn.functional.one_hot(Y, 6).float())]},
            TypeError,
            "Soft and multi-label .* not name a single class",
        ),
        ({"loader": [(X, 2 * nn.functional.one_hot(Y, 6))]}, ValueError, r"shape \(N,\), one class id per sample"),
        ({"loader": [(X, Y, Y % 2)]}, ValueError, r"batch\[1\] and batch\[2\] hold different class ids"),
        ({"loader": [X]}, ValueError, "got a Tensor. Pass `unpack_batch`"),
        ({"loader": [{"x": X, "z": Y}]}, ValueError, "one of the keys label, .* got the keys x, z"),
        ({"loader": [(X[:9], Y)]}, ValueError, r"logits of shape \(45, 6\) for a batch of 45 .* got \[\(9, 6\)\]"),
        ({"loader": blobs(ALL)}, TypeError, "`loader` to be a DataLoader or an iterable of batches, but got a Tensor"),
        ({"loader": loader(blobs(ALL))}, ValueError, "to leave out at least one of the 6 classes"),
        ({"loader": loader(blobs([3]))}, ValueError, "at least 2 classes, but got 1"),
    ],
)
def test_errors_leave_the_model_as_it_was(change, error, text, attached):
    model = net()
    if attached:
        set_gamma(model, 2.5, [0, 1])
    before = copy.deepcopy(model.state_dict())
    hooks = len(model.fc._forward_hooks)
    with pytest.raises(error, match=text):
        calibrate(model, **{"loader": loader(), "progress": False, **change})
    assert_same(dict(model.state_dict()), dict(before))
    assert len(model.fc._forward_hooks) == hooks
    assert get_gamma(model) == (2.5 if attached else None)
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("index", [0, 17, 44])
def test_logits_that_are_not_finite(index, value):
    x = X.clone()
    x[index] = value
    model = net()
    keys = list(model.state_dict())
    text = f"finite logits in the calibration pass, but batch {index // 8} has NaN or infinite ones. Gamma stays unset"
    with pytest.raises(ValueError, match=text):
        calibrate(model, DataLoader(TensorDataset(x, Y), 8), progress=False)
    assert list(model.state_dict()) == keys


def test_an_error_of_the_user_leaves_the_model_as_it_was():
    def broken():
        yield X, Y
        raise KeyboardInterrupt

    model = net().train()
    keys = list(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, broken(), SEEN, progress=False)
    assert list(model.state_dict()) == keys
    assert model.training
