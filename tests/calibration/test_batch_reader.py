"""Splitting a batch into inputs and target."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import nn

from lightning_calibft.calibration.batch_reader import BatchReader, call_forward, check_target, resolve_unpack_batch

X, Y = torch.ones(3, 2), torch.tensor([0, 1, 2])
Pair = namedtuple("Pair", ["image", "label"])


class Net(nn.Module):
    def forward(self, image, mask=None, *, scale=1):
        return image, mask, scale


def forward(image, mask=None):
    return image, mask


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        Pair(X, Y),
        {"image": X, "label": Y},
        {"labels": Y, "pixels": X, "names": ["a", "b", "c"]},
        OrderedDict(target=Y, input=X),
        UserDict(targets=Y, input=X),
        {"y": Y, "x": X},
    ],
)
def test_one_input(batch):
    assert BatchReader().rows(batch) is Y
    assert BatchReader().inputs(batch, forward) is X
    assert BatchReader().inputs(batch, Net()) is X


@pytest.mark.parametrize("function", [forward, Net()])
def test_inputs_by_name(function):
    batch = {"index": Y, "mask": X + 1, "image": X, "label": Y}
    assert BatchReader().inputs(batch, function) == {"image": X, "mask": batch["mask"]}
    assert BatchReader().rows(batch) is Y


def test_what_is_not_a_tensor_can_be_named_too():
    batch = {"scale": 2, "image": X, "mask": Y, "label": Y}
    assert BatchReader().inputs(batch, Net()) == {"scale": 2, "image": X, "mask": Y}


def test_unpack_batch():
    batch = (X, "more", Y)
    reader = BatchReader(lambda batch: (batch[0], batch[2]))
    assert (reader.inputs(batch, forward), reader.rows(batch)) == (X, Y)
    assert resolve_unpack_batch("operator.itemgetter") is __import__("operator").itemgetter
    assert resolve_unpack_batch(None) is None


def test_call_forward():
    assert call_forward(forward, X) == (X, None)
    assert call_forward(forward, (X, Y)) == call_forward(forward, [X, Y]) == (X, Y)
    assert call_forward(forward, {"mask": Y, "image": X}) == (X, Y)
    assert call_forward(Net(), UserDict(image=X, scale=3)) == (X, None, 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_is_a_class_id(dtype):
    assert check_target(Y.to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("batch", "error", "text"),
    [
        ((X, X), TypeError, r"class ids, but got dtype torch.float32 with shape \(3, 2\)\. Soft and multi-label"),
        ((X, X > 0), TypeError, "class ids, but got dtype torch.bool"),
        ((X, X.to(torch.complex64)), TypeError, "got dtype torch.complex64"),
        ((X, Y[:, None]), ValueError, r"shape \(N,\), one class id per sample, but got \(3, 1\)"),
        ((X, Y[0]), ValueError, r"shape \(N,\), one class id per sample, but got \(\)"),
        ((X, [0, 1, 2]), TypeError, "to be a tensor, but got a list of 3 items. Pass `unpack_batch`"),
        ((X, None), TypeError, "to be a tensor, but got a NoneType"),
        ((X,), ValueError, r"a pair \(inputs, target\) or a mapping, but got a tuple of 1 items. Pass `unpack_batch`"),
        ((X, Y, Y), ValueError, "but got a tuple of 3 items. Pass `unpack_batch`"),
        (X, ValueError, "but got a Tensor. Pass `unpack_batch`"),
        (None, ValueError, "but got a NoneType"),
        ({"image": X, "class": Y}, ValueError, "one of the keys label, labels, .* but got the keys image, class. Pass"),
    ],
)
def test_targets_that_are_refused(batch, error, text):
    with pytest.raises(error, match=text):
        BatchReader().rows(batch)


def test_inputs_that_are_refused():
    with pytest.raises(ValueError, match=r"names of the arguments of `forward`, but got the keys a, b, label. Pass"):
        BatchReader().inputs({"a": X, "b": X, "label": Y}, Net())


def test_values_are_not_read():
    """So that no device has to be waited for."""
    assert check_target(torch.empty(3, dtype=torch.long, device="meta")).shape == (3,)


@pytest.mark.parametrize("path", ["", "function", "no.such.module", "torch.no_such_function", ".relative"])
def test_import_paths_that_lead_nowhere(path):
    with pytest.raises(ValueError, match=r"`unpack_batch` to be the import path of a function, such as .* but got"):
        resolve_unpack_batch(path)


@pytest.mark.parametrize("value", [3, "torch.pi", (1, 2)])
def test_what_cannot_be_called(value):
    with pytest.raises(TypeError, match="`unpack_batch` to be a function, but got"):
        resolve_unpack_batch(value)
