"""``calibrate()`` where targets are not rows of the head."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from lightning_calibft import calibrate, get_gamma
from lightning_calibft.calibration.batch_reader import BatchReader
from lightning_calibft.metrics import AverageLogitGap
from tests.calibration.nets import Net, X, Y, assert_calibrated, net
from tests.helpers.runs import ABSENT, SEEN, assert_same, quiet

pytestmark = quiet

ROWS = [3, 0, 2]  # of folders 0, 1 and 2
NAMES = ["ant", "bee", "cat", "cow", "dog", "eel"]
FOLDERS = torch.tensor([1, -1, 2, 0])[Y]


def batches(target=FOLDERS, size=8):
    return list(zip(X.split(size), target.split(size), strict=True))


class Wide(Net):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 12)


@pytest.mark.parametrize("seen", [None, SEEN])
@pytest.mark.parametrize(
    "arguments",
    [
        {"class_map": ROWS},
        {"class_map": {2: 2, 0: 3, 1: 0, 99: 5}},
        {"class_map": {"0": "cow", "1": "ant", "2": "cat"}, "label_names": NAMES},
        {"class_map": ["cow", "ant", "cat"], "label_names": "names.txt"},
        {"class_map": "map.json"},
    ],
    ids=["list", "dict", "names", "file_of_names", "file"],
)
def test_targets_are_mapped(arguments, seen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    (tmp_path / "map.json").write_text(json.dumps(ROWS))
    model = net()
    result = calibrate(model, batches(), seen, progress=False, **arguments)
    assert_calibrated(model, result)
    assert result.split.seen_classes == tuple(SEEN)
    assert result == calibrate(net(), batches(Y), seen, progress=False)


def test_ignored_samples_and_own_batches():
    target = FOLDERS.clone()
    target[::5] = -100
    keep = target != -100
    model = net()
    data = [(target, x) for x, target in batches(target)]
    result = calibrate(model, data, class_map=ROWS, unpack_batch=lambda batch: (batch[1], batch[0]), progress=False)
    assert_calibrated(model, result, x=X[keep], y=Y[keep])


def test_two_targets_of_one_row():
    model = net()
    target = FOLDERS + 3 * (torch.arange(len(FOLDERS)) % 2)
    assert_calibrated(model, calibrate(model, batches(target), class_map=ROWS * 2, progress=False))


def test_an_estimator_that_is_a_metric():
    model = net()
    assert_calibrated(
        model, calibrate(model, batches(), estimator=AverageLogitGap(6, SEEN), class_map=ROWS, progress=False)
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"class_map": ROWS[:2]}, r"`class_map` to give the row of every target, but 2 is missing\. Add it"),
        ({"class_map": ROWS[:2], "seen_classes": [0, 3]}, r"the row of every target, but 2 is missing\. Add it"),
        ({"class_map": [0, 6]}, r"rows of the classification head, in \[0, 6\), but got 6"),
        ({"class_map": ["ant"], "label_names": NAMES[:5]}, "`label_names` to name each of the 6 rows of the head, but"),
        ({"label_names": NAMES}, "`class_map` to be given with `label_names`, but got None"),
        ({"class_map": "imagenette"}, "the WordNet ids of a head of 6 rows"),
        (
            {"estimator": AverageLogitGap(6, SEEN, class_map=ROWS)},
            "`estimator` to take rows .* with a `class_map`. Pass",
        ),
        (
            {"class_map": ROWS, "seen_classes": ABSENT},
            r"but got none: its labels are the rows 0, 2, 3\. Check the loader and `seen_classes`\.$",
        ),
    ],
)
def test_errors_leave_the_model_as_it_was(arguments, text):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=text):
        calibrate(model, batches(), progress=False, **arguments)
    assert get_gamma(model) is None
    assert_same(dict(model.state_dict()), dict(before))


HINT = (
    r"The labels are 0 to 2: they look like positions in a list of folders, .* `class_map=\[\.\.\.\]`, or with"
    r" `class_map=dataset\.classes, label_names=\.\.\.` .* has trained rows 0 to 2: map them there too\."
)


def test_labels_that_look_like_positions_of_folders():
    with pytest.warns(UserWarning, match=HINT + r" If you mean these rows, pass `seen_classes=list\(range\(3\)\)`"):
        calibrate(net(Wide), batches(), progress=False)


@pytest.mark.parametrize(
    ("make", "target", "arguments"),
    [
        (Wide, FOLDERS, {"class_map": ROWS}),
        (Wide, FOLDERS, {"class_map": [0, 1, 2]}),
        (Wide, FOLDERS, {"seen_classes": [0, 1, 2]}),
        (Wide, FOLDERS, {"estimator": AverageLogitGap(12, [0, 1, 2])}),
        (Wide, FOLDERS + 1, {}),
        (Wide, Y, {}),
        (Wide, torch.arange(len(Y)) % 4, {}),  # 16 rows would be too many for these
        (Net, FOLDERS, {}),
    ],
)
def test_labels_that_may_be_rows(make, target, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        calibrate(net(make), batches(target), progress=False, **arguments)


def test_seen_classes_that_no_sample_has():
    none = r"to hold samples of the seen classes, but got none: its labels are the rows"
    for make in (Wide, Net):
        with pytest.raises(ValueError, match=rf"{none} 0, 1, 2\. Check the loader and `seen_classes`\. {HINT}"):
            calibrate(net(make), batches(), seen_classes=[3, 4], progress=False)
    for target, class_map, rows in ((Y, None, "0, 2, 3"), (FOLDERS, [0, 1, 2], "0, 1, 2")):
        with pytest.raises(ValueError, match=rf"{none} {rows}\. Check the loader and `seen_classes`\.$"):
            calibrate(net(Wide), batches(target), seen_classes=[4, 5], class_map=class_map, progress=False)


def test_seen_classes_that_some_samples_have():
    left_out = "15 of 45 samples .* add their classes to `seen_classes`."
    with pytest.warns(UserWarning, match=f"{left_out} {HINT}"):
        calibrate(net(Wide), batches(), seen_classes=[1, 2, 5], progress=False)
    for make, target, rows in ((Net, FOLDERS, None), (Wide, Y, None), (Wide, FOLDERS, [0, 1, 2])):
        with pytest.warns(UserWarning, match=f"{left_out}$"):
            calibrate(
                net(make),
                batches(target),
                seen_classes=[0, 2, 4] if target is Y else [1, 2, 5],
                class_map=rows,
                progress=False,
            )


def test_a_reader_follows_its_batches():
    reader = BatchReader(rows={0: 3, 1: 0, 2: 2})
    assert torch.equal(reader.rows((X, FOLDERS)), Y)
    assert reader.rows((X, FOLDERS.to("meta"))).device.type == "meta"
    assert reader.maps
    assert not BatchReader().maps
    assert BatchReader().rows((X, FOLDERS)) is FOLDERS
