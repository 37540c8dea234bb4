from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from lightning_calibft.split import ClassSplit


def test_absent_classes_are_the_rest_by_default():
    split = ClassSplit(6, [4, 0])
    assert (split.num_classes, split.seen_classes, split.absent_classes) == (6, (0, 4), (1, 2, 3, 5))


def test_classes_in_neither_list_are_in_neither_mask():
    split = ClassSplit(5, [3, 0], [1])
    assert split.seen_mask.tolist() == [True, False, False, True, False]
    assert split.absent_mask.tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
    "classes", [[2, 0], (0, 2), {0, 2}, range(0, 3, 2), iter([2, 0]), torch.tensor([2, 0]), np.array([2, 0])]
)
def test_any_list_of_integers(classes):
    split = ClassSplit(4, classes)
    assert split == ClassSplit(4, [0, 2], [1, 3])
    assert all(type(c) is int for c in split.seen_classes)


def test_is_a_value():
    split = ClassSplit(4, [0, 2])
    assert pickle.loads(pickle.dumps(split)) == split
    assert len({split, ClassSplit(4, [2, 0])}) == 1
    with pytest.raises(AttributeError):
        split.num_classes = 5


def test_from_targets():
    assert ClassSplit.from_targets(torch.tensor([[2, 2], [0, 2]]), 4) == ClassSplit(4, [0, 2])


@pytest.mark.parametrize("target", [torch.rand(3), torch.ones(3, dtype=torch.bool), torch.ones(3).cfloat()])
def test_from_targets_refuses_what_is_no_id(target):
    with pytest.raises(TypeError, match="`target` to be a tensor of class ids, but got dtype"):
        ClassSplit.from_targets(target, 4)


@pytest.mark.parametrize("target", [torch.tensor([], dtype=torch.long), torch.tensor([4]), torch.arange(4)])
def test_from_targets_refuses_what_is_no_split(target):
    with pytest.raises(ValueError, match="Expected argument `seen_classes`"):
        ClassSplit.from_targets(target, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4.0, [0]), TypeError, "`num_classes` to be an integer, but got 4.0"),
        ((True, [0]), TypeError, "`num_classes` to be an integer, but got True"),
        ((1, [0]), ValueError, "`num_classes` to be at least 2, but got 1"),
        ((4, []), ValueError, "`seen_classes` to name at least one class, but it is empty"),
        ((4, [0], []), ValueError, "`absent_classes` to name at least one class, but it is empty"),
        ((4, [0, 4]), ValueError, r"`seen_classes` to hold class ids in \[0, 4\), but got 4"),
        ((4, [0], [-1]), ValueError, r"`absent_classes` to hold class ids in \[0, 4\), but got -1"),
        ((4, [0, 1, 0]), ValueError, "`seen_classes` to hold each class once, but got 0 more than once"),
        ((4, [0, 1], [1, 2]), ValueError, "share no class, but both hold 1"),
        ((4, range(4)), ValueError, "leave out at least one of the 4 classes"),
        ((4, [0.0]), TypeError, "`seen_classes` to hold integers, but got 0.0"),
        ((4, [True, False]), TypeError, "`seen_classes` to hold integers, but got True.* not a mask"),
        ((4, torch.tensor([True, False, True, False])), TypeError, "`seen_classes` to hold integers, but got True"),
        ((4, torch.tensor([[0, 1]])), ValueError, r"`seen_classes` to be one-dimensional, but got shape \(1, 2\)"),
        ((4, torch.tensor(1)), ValueError, r"`seen_classes` to be one-dimensional"),
        ((4, "01"), TypeError, "`seen_classes` to be a list of class ids, but got '01'"),
        ((4, {0: "cat"}), TypeError, "`seen_classes` to be a list of class ids"),
        ((4, 2), TypeError, "`seen_classes` to be a list of class ids, but got 2"),
        ((4, ["0"]), TypeError, "`seen_classes` to hold integers, but got '0'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ClassSplit(*arguments)


def test_long_lists_are_shortened_in_errors():
    with pytest.raises(ValueError, match=r"but got 10, 11, .*, 19 and 80 more\."):
        ClassSplit(10, range(100))


def test_a_wide_split_fits_a_screen():
    split = ClassSplit(1000, range(0, 1000, 3))
    assert repr(split) == (
        "ClassSplit(num_classes=1000, seen_classes=(0, 3, 6, 9, 12, 15, 18, 21, 24, 27 and 324 more),"
        " absent_classes=(1, 2, 4, 5, 7, 8, 10, 11, 13, 14 and 656 more))"
    )
    assert repr(ClassSplit(3, [1])) == "ClassSplit(num_classes=3, seen_classes=(1,), absent_classes=(0, 2))"
