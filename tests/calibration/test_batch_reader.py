"""Splitting a batch into inputs and target."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from torch import nn

from lightning_calibft.calibration.batch_reader import BatchReader, check_rows, check_target, resolve_unpack_batch

X, Y = torch.ones(3, 2), torch.tensor([0, 1, 2])
Pair = namedtuple("Pair", ["image", "label"])


class Net(nn.Module):
    def forward(self, image, mask=None, *, scale=1):
        return image, mask, scale


def forward(image, mask=None):
    return image, mask


class Graph:
    """A batch as graph libraries have it: tensors as attributes."""

    def __init__(self, **tensors):
        self.__dict__.update(tensors)

    def keys(self):
        return list(self.__dict__)


def first_way(batch, function, **options):
    """Return what is passed to a function in the first way that is tried."""
    return next(iter(BatchReader(**options).arguments(batch, function).values()))


def ways(batch, function):
    return list(BatchReader().arguments(batch, function).values())


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
        {"image": X, "class": Y},
        {"image": X, "fine_label": Y},
        Graph(x=X, y=Y),
        (X, Y, ["a", "b", "c"]),
        (X, {"boxes": [1, 2, 3]}, Y),
        (X, X, Y),
        (Y, X),
        (X, {"label": Y, "name": ["a", "b", "c"]}),
        namedtuple("Swapped", ["label", "image"])(Y, X),
    ],
)
def test_one_input(batch):
    reader = BatchReader()
    reader.find_target(batch, 3)
    assert reader.rows(batch) is Y
    assert first_way(batch, forward) == ((X,), {})
    assert first_way(batch, Net()) == ((X,), {})


@pytest.mark.parametrize("function", [forward, Net()])
def test_inputs_by_name(function):
    batch = {"index": Y, "mask": X + 1, "image": X, "label": Y}
    assert first_way(batch, function) == ((), {"image": X, "mask": batch["mask"]})
    assert BatchReader().rows(batch) is Y


def test_what_is_not_a_tensor_can_be_named_too():
    batch = {"scale": 2, "image": X, "mask": Y, "label": Y}
    assert first_way(batch, Net()) == ((), {"scale": 2, "image": X, "mask": Y})


@pytest.mark.parametrize("key", ["image", "pixel_values", "data", "x", "input_ids", "audio"])
def test_of_several_tensors_the_usual_name_is_the_input(key):
    batch = {"crs": X + 1, "index": Y, key: X, "bounds": X + 2, "label": Y}
    assert first_way(batch, lambda anything: anything) == ((X,), {})


def test_a_forward_that_needs_the_labels_gets_them():
    def with_labels(input_ids, mask, labels):
        return input_ids, mask, labels

    batch = {"input_ids": X, "mask": X + 1, "other": X, "label": Y}
    assert ((), {"input_ids": X, "mask": batch["mask"], "labels": Y}) in ways(batch, with_labels)
    batch = {"input_ids": X, "mask": X + 1, "other": X, "labels": Y}
    assert ((), {"input_ids": X, "mask": batch["mask"], "labels": Y}) in ways(batch, with_labels)
    batch = (X, X + 1, Y)
    assert ways(batch, with_labels) == [((X,), {}), ((X, batch[1]), {}), (batch, {}), ((batch,), {})]


def test_a_forward_of_any_keywords_gets_the_whole_mapping():
    batch = {"input_ids": X, "mask": X + 1, "labels": Y}
    found = ways(batch, lambda **inputs: inputs)
    assert found.index(((), batch)) < found.index(((), {"input_ids": X, "mask": batch["mask"]}))


def test_a_forward_of_the_whole_batch():
    for batch in ((X, Y), {"image": X, "label": Y}, Graph(x=X, y=Y)):
        assert ((batch,), {}) in ways(batch, lambda anything: anything)


def test_unpack_batch():
    batch = (X, "more", Y)
    assert first_way(batch, forward, unpack_batch=lambda batch: (batch[0], batch[2])) == ((X,), {})
    assert first_way(batch, forward, unpack_batch=lambda batch: ((X, Y), batch[2])) == ((X, Y), {})
    assert first_way(batch, forward, unpack_batch=lambda batch: ({"mask": Y}, batch[2])) == ((), {"mask": Y})
    reader = BatchReader(lambda batch: (batch[0], batch[2]))
    assert len(reader.arguments(batch, forward)) == 1
    assert reader.rows(batch) is Y
    assert resolve_unpack_batch("operator.itemgetter") is __import__("operator").itemgetter
    assert resolve_unpack_batch(None) is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_is_a_class_id(dtype):
    assert check_target(Y.to(dtype)).dtype == dtype
    assert check_target(Y.to(dtype)[:, None]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_one_hot_vectors_are_classes(dtype):
    reader, one_hot = BatchReader(rows={0: 5, 1: 3, 2: 4}), torch.eye(3).to(dtype)
    reader.find_target((X, one_hot), 6)
    assert reader.rows((X, one_hot)).tolist() == [5, 3, 4]
    mixed = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    rows = reader.rows((X, mixed))
    assert rows[1] == 4
    with pytest.raises(ValueError, match="but got soft or multi-label targets, which do not name a single class"):
        check_rows(rows, 6)


def test_an_index_beside_the_labels_is_known_by_its_values():
    reader, batch = BatchReader(), (X, Y, Y + 40)
    with pytest.raises(ValueError, match=r"but batch\[1\] and batch\[2\] hold different class ids, and either could"):
        reader.rows(batch)
    reader.find_target(batch, 6)
    assert reader.rows(batch) is Y
    assert reader.rows((X, Y + 1, Y)).tolist() == [1, 2, 3]
    assert next(iter(reader.arguments(batch, forward).values())) == ((X,), {})


def test_token_ids_and_offsets_are_not_the_labels():
    batch = (Y, torch.arange(20), torch.tensor([0, 7, 12]))
    reader = BatchReader()
    reader.find_target(batch, 6)
    assert reader.rows(batch) is Y
    assert (batch[1:], {}) in reader.arguments(batch, forward).values()


@pytest.mark.parametrize(
    ("batch", "names"),
    [
        ({"image": X, "label": Y, "y": Y % 2}, r"batch\['label'\] and batch\['y'\]"),
        ({"image": X, "coarse_label": Y % 2, "label": Y}, r"batch\['coarse_label'\] and batch\['label'\]"),
        ({"image": X, "target": Y, "category": Y % 2}, r"batch\['target'\] and batch\['category'\]"),
        (Graph(x=X, label=Y, targets=Y % 2), r"batch\['label'\] and batch\['targets'\]"),
        ((X, Y, Y % 2), r"batch\[1\] and batch\[2\]"),
    ],
)
def test_several_different_targets_are_refused(batch, names):
    with pytest.raises(ValueError, match=f"but {names} hold different class ids, and either could be it. Pass"):
        BatchReader().find_target(batch, 3)


@pytest.mark.parametrize("batch", [{"image": X, "label": Y, "labels": Y.clone()}, (X, Y, Y.clone())])
def test_the_same_target_twice_is_one(batch):
    reader = BatchReader()
    reader.find_target(batch, 3)
    assert reader.rows(batch) is Y


@pytest.mark.parametrize(
    ("batch", "error", "text"),
    [
        ((X, X), TypeError, r"class ids, but got dtype torch.float32 with shape \(3, 2\)\. Soft and multi-label"),
        ((X, X > 0), TypeError, "class ids, but got dtype torch.bool"),
        ((X, X.to(torch.complex64)), TypeError, "got dtype torch.complex64"),
        ((X, Y[:, None, None]), ValueError, r"shape \(N,\), one class id per sample, but got \(3, 1, 1\)"),
        ((X, torch.stack([Y, Y], 1)), ValueError, r"shape \(N,\), one class id per sample, but got \(3, 2\)"),
        ((X, Y[0]), ValueError, r"shape \(N,\), one class id per sample, but got \(\)"),
        ((X, [0, 1, 2]), TypeError, "to be a tensor, but got a list of 3 items. Pass `unpack_batch`"),
        ((X, None), TypeError, "to be a tensor, but got a NoneType"),
        ((X,), ValueError, r"a pair \(inputs, target\), .* but got a tuple of 1 items. Pass `unpack_batch`"),
        ((X, X, X), ValueError, "but got a tuple of 3 items. Pass `unpack_batch`"),
        (X, ValueError, "but got a Tensor. Pass `unpack_batch`"),
        (None, ValueError, "but got a NoneType"),
        ({"image": X, "kind": Y}, ValueError, "one of the keys label, labels, .* but got the keys image, kind. Pass"),
    ],
)
def test_targets_that_are_refused(batch, error, text):
    reader = BatchReader()
    with pytest.raises(error, match=text):  # noqa: PT012
        reader.find_target(batch, 3)
        reader.rows(batch)


def test_values_are_not_read():
    """So that no device has to be waited for."""
    assert check_target(torch.empty(3, dtype=torch.long, device="meta")).shape == (3,)


@pytest.mark.parametrize(
    ("label", "text"),
    [(-1, "but got -1. Samples without a label are often marked -1.*-100.*`unpack_batch`"), (9, "but got 9. If the")],
)
def test_labels_that_are_no_rows(label, text):
    with pytest.raises(ValueError, match=text):
        check_rows(torch.tensor([0, label]), 6)
    check_rows(torch.tensor([0, -100, 5]), 6)


@pytest.mark.parametrize("path", ["", "function", "no.such.module", "torch.no_such_function", ".relative"])
def test_import_paths_that_lead_nowhere(path):
    with pytest.raises(ValueError, match=r"`unpack_batch` to be the import path of a function, such as .* but got"):
        resolve_unpack_batch(path)


@pytest.mark.parametrize("value", [3, "torch.pi", (1, 2)])
def test_what_cannot_be_called(value):
    with pytest.raises(TypeError, match="`unpack_batch` to be a function, but got"):
        resolve_unpack_batch(value)
