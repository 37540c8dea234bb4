"""What is no valid input raises an error that names it; what is gives what it means."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from lightning_calibft import ClassSplit, calibrate, get_gamma
from lightning_calibft.calibration.batch_reader import TARGET_KEYS, BatchReader
from lightning_calibft.functional import (
    ausuc,
    average_logit_gap,
    best_gamma,
    harmonic_mean_accuracy,
    seen_unseen_curve,
    split_accuracy,
)
from tests.properties.strategies import FLOATS, INTEGERS, splits

CONTAINERS = [list, tuple, iter, np.array, torch.tensor, lambda ids: dict.fromkeys(ids).keys()]
WRONG_IDS = st.sampled_from([True, 1.0, "1", None, (1,), np.bool_(True), np.float64(1), torch.tensor(1.0)])
DTYPES = [*FLOATS, *INTEGERS, torch.bool, torch.complex64]
FUNCTIONS = [ausuc, average_logit_gap, best_gamma, harmonic_mean_accuracy, seen_unseen_curve, split_accuracy]


@given(st.integers(2, 6), st.lists(st.integers(-2, 7), max_size=6), st.sampled_from(CONTAINERS), st.booleans())
def test_class_ids(num_classes, ids, container, absent):
    classes = container(ids)
    if container is CONTAINERS[-1]:
        ids = list(dict.fromkeys(ids))
    valid = 0 < len(ids) == len(set(ids)) and all(0 <= c < num_classes for c in ids)
    name = "absent_classes" if absent else "seen_classes"
    rest = sorted(set(range(num_classes)).difference(ids))
    arguments = (rest, classes) if absent else (classes,)
    if valid and rest:
        split = ClassSplit(num_classes, *arguments)
        seen, other = (rest, sorted(ids)) if absent else (sorted(ids), rest)
        assert (split.seen_classes, split.absent_classes) == (tuple(seen), tuple(other))
        assert split.absent_mask.nonzero().flatten().tolist() == other
    else:
        named = "seen_classes" if not rest else name
        with pytest.raises((TypeError, ValueError), match=f"^Expected argument `{named}` to "):
            ClassSplit(num_classes, *arguments)


@given(splits(), st.lists(WRONG_IDS, min_size=1, max_size=3), st.sampled_from([list, tuple, iter]))
def test_what_is_no_class_id(split, wrong, container):
    num_classes, seen, _ = split
    with pytest.raises((TypeError, ValueError), match=r"^Expected argument `seen_classes` to "):
        ClassSplit(num_classes, container([*seen, *wrong]))


@pytest.mark.parametrize("shape", [(), (1, 1), (2, 0)])
@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_arrays_of_other_shapes(make, shape):
    with pytest.raises(ValueError, match="`seen_classes` to be one-dimensional, but got shape"):
        ClassSplit(3, make(shape))


@given(splits(), st.integers(0, 6))
def test_overlaps(split, which):
    num_classes, seen, absent = split
    both = seen[which % len(seen)]
    with pytest.raises(ValueError, match=f"to share no class, but both hold {both}. Remove"):
        ClassSplit(num_classes, seen, [*absent, both])


@pytest.mark.parametrize("function", FUNCTIONS)
@given(st.data())
def test_any_tensors(function, data):
    num_classes, seen, absent = data.draw(splits(2))
    shape = data.draw(st.sampled_from([(0, num_classes), (3, num_classes)] * 3 + [(), (3,), (3, 1), (3, 0), (1, 3, 3)]))
    dtype = data.draw(st.sampled_from(FLOATS) | st.sampled_from(DTYPES))
    logits = torch.rand(shape, dtype=torch.float64).to(dtype)
    length = data.draw(st.sampled_from([(len(logits) if shape else 1,)] * 3 + [(), (1,), (4,), (3, 1), shape]))
    of_target = data.draw(st.sampled_from(INTEGERS) | st.sampled_from(DTYPES))
    label = data.draw(st.integers(0, num_classes - 1) | st.integers(0, 9))
    target = torch.full(length, label).to(of_target)
    valid = (
        (dtype in FLOATS and of_target in INTEGERS)
        and (logits.ndim == 2 and logits.shape[1] == num_classes and target.shape == logits.shape[:1])
        and (label < num_classes or not len(target))
    )
    if valid:
        function(logits, target, seen, absent)
        return
    with pytest.raises((TypeError, ValueError), match=r"^Expected argument `\w+` to "):
        function(logits, target, seen, absent)


@pytest.mark.parametrize("function", FUNCTIONS)
@given(st.sampled_from([None, 3, "ab", [[1.0, 2.0]], np.zeros((1, 2))]), st.booleans())
def test_what_is_no_tensor(function, value, as_logits):
    arguments = (value, torch.tensor([0])) if as_logits else (torch.zeros(1, 3), value)
    with pytest.raises(
        TypeError, match=r"^Expected argument `(preds|logits|target)` to be a tensor, but got a .* `torch.as"
    ):
        function(*arguments, [0, 1])


X, Y = torch.linspace(-1, 1, 24).reshape(8, 3), torch.tensor([0, 1, 1, 0, 2, 1, 0, 0])
Pair = namedtuple("Pair", ["a", "b"])


@dataclass
class Sample:
    image: torch.Tensor = X
    label: torch.Tensor = Y


PAIRS = [lambda x, y: (x, y), lambda x, y: [x, y], Pair]
PAIRS += [lambda x, y, key=key, kind=kind: kind({"x": x, key: y}) for key in TARGET_KEYS for kind in (dict, UserDict)]
PAIRS += [lambda x, y: OrderedDict(label=y, image=x, name=["a"] * len(y))]


@given(st.sampled_from(PAIRS), st.sampled_from(INTEGERS))
def test_batches(make, dtype):
    batch, reader = make(X, Y.to(dtype)), BatchReader()
    rows = reader.rows(batch)
    assert rows.dtype == torch.int64
    assert torch.equal(rows, Y)
    (passed,), _ = next(iter(reader.arguments(batch, lambda x: x).values()))
    assert passed is X


def nested(children):
    keys = st.sampled_from([*TARGET_KEYS, "image", "x", "mask"])
    return st.lists(children, max_size=4) | st.tuples(children, children) | st.dictionaries(keys, children, max_size=3)


def message_of(call):
    """What a call says of bad input, or what it returns."""
    try:
        return "", call()
    except (TypeError, ValueError) as error:
        return str(error), None


class Batches:
    """A loader: a list may also be one of loaders."""

    def __init__(self, batches):
        self.batches = list(batches)

    def __iter__(self):
        return iter(self.batches)


LEAVES = st.sampled_from(
    [None, 3, "ab", b"x", X, Y, Y[0], X[0], Y.bool(), Y[:, None], Y.numpy(), Sample(), np.int64(1)]
)


@given(st.recursive(LEAVES, nested, max_leaves=6), st.sampled_from([None, lambda batch: batch]))
def test_batches_of_any_structure(batch, unpack):
    reader = BatchReader(unpack)
    message, rows = message_of(lambda: reader.rows(batch))
    if rows is None:
        assert message.startswith(("Expected a batch", "Expected the target of a batch", "Expected argument `unpack_"))
    else:
        assert (rows.ndim, rows.dtype) == (1, torch.int64)


@pytest.mark.parametrize("dtype", INTEGERS)
@settings(max_examples=5)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.sampled_from(PAIRS))
def test_calibrate_reads_labels_of_any_integers(dtype, cuts, make):
    """Cut anywhere, so that batches after the first may be empty."""
    sizes = torch.tensor_split(torch.arange(8), sorted(cuts))
    model = nn.Sequential(nn.Linear(3, 8))
    whole = calibrate(model, Batches([(X, Y)]), progress=False)
    result = calibrate(model, Batches(make(X[rows], Y[rows].to(dtype)) for rows in sizes), progress=False)
    assert result.split == whole.split == ClassSplit(8, [0, 1, 2])
    assert result.gamma == pytest.approx(whole.gamma, rel=1e-5)
    assert get_gamma(model) == pytest.approx(whole.gamma, rel=1e-5)


@given(st.recursive(LEAVES, nested, max_leaves=4), st.booleans())
def test_calibrate_leaves_the_model_as_it_was(batch, named):
    model = nn.Sequential(nn.Linear(3, 8))
    seen = [0, 1] if named else None
    message, result = message_of(lambda: calibrate(model, Batches([(X, batch)]), seen, progress=False))
    if result is None:
        assert message.startswith("Expected")
        assert list(model.state_dict()) == ["0.weight", "0.bias"]
    else:
        assert get_gamma(model) == pytest.approx(result.gamma, rel=1e-6)
