"""Rows of the head from what numbers or names the classes of a dataset."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset

from lightning_calibft.labels.class_map import (
    IGNORE_INDEX,
    check_mapped,
    is_unmapped,
    resolve_class_map,
    rows_tensor,
    to_rows,
    unmapped_error,
)
from lightning_calibft.labels.label_names import CLASS_MAPS, LABEL_SETS, wordnet_ids

NAMES = ["ant", "bee", "cat", "cow", "dog"]
OF_TIMM = ["imagenet-a", "imagenet-r", "mini-imagenet"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("class_map", "label_names", "rows"),
    [
        ([3, 0, 2], None, {0: 3, 1: 0, 2: 2}),
        ((3, 0, 2), None, {0: 3, 1: 0, 2: 2}),
        ([3, 0, 2], NAMES, {0: 3, 1: 0, 2: 2}),
        ([3, 3], None, {0: 3, 1: 3}),
        ({7: 4, 2: 0}, None, {7: 4, 2: 0}),
        ({"7": 4, "2": 0}, None, {7: 4, 2: 0}),
        (["dog", "ant"], NAMES, {0: 4, 1: 0}),
        (["dog", "ant"], tuple(NAMES), {0: 4, 1: 0}),
        ({1: "dog", 0: "ant"}, NAMES, {1: 4, 0: 0}),
        ({"1": "dog", "0": "ant"}, NAMES, {1: 4, 0: 0}),
        (["cat", "dog"], [*NAMES, "ant"], {0: 2, 1: 4}),
    ],
)
def test_rows(class_map, label_names, rows, folder):
    assert resolve_class_map(class_map, label_names) == rows
    width = 5 if label_names is None else len(label_names)
    assert resolve_class_map(class_map, label_names, width) == rows
    Path("map.json").write_text(json.dumps(class_map))
    for path in ("map.json", folder / "map.json"):
        assert resolve_class_map(path, label_names, width) == rows


def test_nothing_is_mapped_to_nothing():
    assert resolve_class_map(None) is None
    assert resolve_class_map(None, num_classes=5) is None


@pytest.mark.parametrize("path", [str, Path])
def test_files_of_label_names(path, folder):
    Path("names.txt").write_text("\n".join(NAMES) + "\n")
    Path("windows.txt").write_bytes(("\ufeff" + "\r\n".join(NAMES)).encode())
    Path("names.json").write_text(json.dumps(NAMES))
    for name in ("names.txt", "windows.txt", "names.json"):
        assert resolve_class_map(["ant", "dog"], path(name), 5) == {0: 0, 1: 4}


@pytest.mark.parametrize("name", LABEL_SETS)
def test_label_sets_of_timm(name):
    ids = ImageNetInfo(name).label_names()
    assert infer_imagenet_subset({"num_classes": len(ids)}) == name
    rows = [5, 0, len(ids) - 1]
    assert resolve_class_map([ids[row] for row in rows], name, len(ids)) == dict(enumerate(rows))


@pytest.mark.parametrize("name", OF_TIMM)
def test_subsets_that_timm_knows(name):
    """Its lists agree with each other, and are in the order in which ``ImageFolder`` numbers folders."""
    stem = str(files("timm.data") / "_info" / name.replace("-", "_"))
    rows = [int(line) for line in Path(f"{stem}_indices.txt").read_text().split()]
    ids = Path(f"{stem}_synsets.txt").read_text().split()
    assert wordnet_ids(name) == ids == sorted(ids)
    assert len(rows) == {"imagenet-a": 200, "imagenet-r": 200, "mini-imagenet": 100}[name]
    assert resolve_class_map(name) == resolve_class_map(name, num_classes=1000) == dict(enumerate(rows))


@pytest.mark.parametrize(
    (
        "name",
        "rows",
    ),  # of the ten classes, from https://github.com/fastai/imagenette and the list of ImageNet's classes
    [
        ("imagenette", [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]),
        ("imagewoof", [155, 159, 162, 167, 182, 193, 207, 229, 258, 273]),
    ],
)
def test_imagenette_and_imagewoof(name, rows):
    assert resolve_class_map(name, num_classes=1000) == dict(enumerate(rows))
    assert wordnet_ids(name) == sorted(wordnet_ids(name))
    assert resolve_class_map(wordnet_ids(name), "imagenet-1k", 1000) == dict(enumerate(rows))


@pytest.mark.parametrize("name", CLASS_MAPS)
@pytest.mark.parametrize("width", [11821, 21841, 21842])
def test_known_subsets_of_other_heads(name, width):
    ids = ImageNetInfo(infer_imagenet_subset({"num_classes": width})).label_names()
    if missing := [wordnet for wordnet in wordnet_ids(name) if wordnet not in ids]:
        with pytest.raises(ValueError, match=rf"names that are in `label_names`, but got '{missing[0]}'"):
            resolve_class_map(name, num_classes=width)
    else:
        rows = resolve_class_map(name, num_classes=width)
        assert [ids[row] for row in rows.values()] == wordnet_ids(name)


def test_known_subsets_with_own_label_names():
    names = ["other", *reversed(wordnet_ids("imagenette"))]
    assert resolve_class_map("imagenette", names, 11) == {target: 10 - target for target in range(10)}
    with pytest.raises(ValueError, match=r"`label_names` to give the WordNet ids of a head of 11 rows"):
        resolve_class_map("imagenette", num_classes=11)


@pytest.mark.parametrize(
    ("class_map", "label_names", "error", "text"),
    [
        ([0, 5], None, ValueError, r"rows of the classification head, in \[0, 5\), but got 5"),
        ([0, -1], None, ValueError, r"rows of the classification head, in \[0, 5\), but got -1"),
        ([0, True], None, TypeError, "rows of the head or their names, but got True"),
        ([0, 1.0], None, TypeError, "rows of the head or their names, but got 1.0"),
        ([0, None], None, TypeError, "rows of the head or their names, but got None"),
        ({-1: 0}, None, ValueError, "to map targets of at least 0, but got -1"),
        ({True: 0}, None, TypeError, "targets, which are integers, but got True"),
        ({0.0: 0}, None, TypeError, "targets, which are integers, but got 0.0"),
        ({"cat": 0}, None, TypeError, "targets, which are integers, but got 'cat'. To use folder names, pass the list"),
        ({1: 0, "1": 2}, None, ValueError, "to hold each target once, but got"),
        ([], None, ValueError, "to map at least one target, but it is empty"),
        ({}, None, ValueError, "to map at least one target, but it is empty"),
        (3, None, TypeError, "to be a list or dict of rows or names, .* 'imagewoof', but got 3"),
        (
            ["cat", "dog"],
            None,
            ValueError,
            "`label_names` to name the rows .* the name 'cat', but got None. Pass the list",
        ),
        (["cat", "dgo"], NAMES, ValueError, "names that are in `label_names`, but got 'dgo'. Did you mean 'dog'?"),
        (["xyz"], NAMES, ValueError, "names that are in `label_names`, but got 'xyz'.$"),
        (["cat"], ["cat", "a", "b", "cat", "c"], ValueError, "'cat', .* to one row, but the rows 0, 3 have it"),
        (["cat"], NAMES[:4], ValueError, "`label_names` to name each of the 5 rows of the head, but got 4 names"),
        (["cat"], [*NAMES[:4], 4], TypeError, "`label_names` to hold the names of the head's rows, but got 4"),
        (["cat"], 3, TypeError, "`label_names` to be a list of names, but got 3"),
        (["cat"], "imagenet-2k", ValueError, "`label_names` to be one of 'imagenet-1k', .*Did you mean 'imagenet-22k'"),
        (["cat"], "no.json", ValueError, "`label_names` to be one of .* but got 'no.json': .*No such file"),
        (["cat"], "rows.json", TypeError, "`label_names` to be a list of names, but got {"),
        (None, NAMES, ValueError, "`class_map` to be given with `label_names`, but got None"),
        ("imagenet-s", None, ValueError, "'imagewoof' or the path of a file, but got 'imagenet-s': .* Did you mean"),
        ("imagenet-o", NAMES, ValueError, "but got 'imagenet-o'"),
        ("broken.json", None, ValueError, "`class_map` to be a JSON file, but 'broken.json' is not: Expecting"),
        ("binary.json", None, ValueError, "but got 'binary.json': 'utf-8' codec"),
        (".", None, ValueError, "but got '.': .*Is a directory"),
        ("name.json", None, TypeError, "to be a list or dict of rows or names, .* but got 'imagenette'"),
    ],
)
def test_what_is_refused(class_map, label_names, error, text, folder):
    Path("broken.json").write_text("[0, 1")
    Path("binary.json").write_bytes(b"\xff\xfe\x00")
    Path("name.json").write_text('"imagenette"')
    Path("rows.json").write_text('{"0": 1}')
    with pytest.raises(error, match=text):
        resolve_class_map(class_map, label_names, 5)


def _reference_to_rows(target, rows):
    return [IGNORE_INDEX if value == IGNORE_INDEX else rows.get(value) for value in target]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("rows", [{0: 3, 1: 0, 2: 2}, {30: 1, 2: 999, 17: 1}, {5: 0}])
def test_targets_become_rows(rows, dtype):
    target = torch.tensor([*rows, *reversed(rows), IGNORE_INDEX, -7, 3, 31, 6], dtype=dtype)
    mapped = to_rows(target, rows_tensor(rows))
    assert mapped.dtype == torch.long
    expected = _reference_to_rows(target.tolist(), rows)
    assert [None if is_unmapped(row) else row for row in mapped.tolist()] == expected
    for row, label, row_or_none in zip(mapped.tolist(), target.tolist(), expected, strict=True):
        if row_or_none is None:
            assert f"but {label} is missing. Add it" in str(unmapped_error(row))


def test_targets_of_any_shape():
    assert to_rows(torch.empty(0, dtype=torch.long), rows_tensor({0: 1})).shape == (0,)
    assert to_rows(torch.tensor([[1, 0]], dtype=torch.uint8), rows_tensor({0: 3, 1: 5})).tolist() == [[5, 3]]


@pytest.mark.parametrize("ignore_index", [255, 0])
def test_an_ignored_target_is_no_row(ignore_index):
    mapped = to_rows(torch.tensor([1, ignore_index]), rows_tensor({0: 2, 1: 0}), ignore_index)
    assert mapped.tolist() == [0, IGNORE_INDEX]
    assert is_unmapped(to_rows(torch.tensor([IGNORE_INDEX]), rows_tensor({0: 2}), None)).all()


def test_targets_that_have_no_row():
    check_mapped(to_rows(torch.tensor([1, 0, IGNORE_INDEX]), rows_tensor({0: 2, 1: 0})))
    with pytest.raises(ValueError, match=r"`class_map` to give the row of every target, but 4 is missing\. Add it"):
        check_mapped(to_rows(torch.tensor([1, 4, 0]), rows_tensor({0: 2, 1: 0})))


def test_values_are_not_read():
    """So that no device has to be waited for."""
    rows = rows_tensor({0: 2, 1: 0}).to("meta")
    assert to_rows(torch.empty(3, dtype=torch.long, device="meta"), rows).shape == (3,)


@pytest.mark.parametrize("target", [torch.tensor([0.5]), torch.tensor([True]), torch.tensor([1j])])
def test_soft_targets_are_refused(target):
    with pytest.raises(TypeError, match=r"class ids, but got dtype .*A `class_map` maps integers"):
        to_rows(target, rows_tensor({0: 2, 1: 0}))


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("lion", 291),
        ("king of beasts", 291),
        ("Lion", 291),
        ("tabby cat", 281),
        ("tabby_cat", 281),
        ("Persian cat", 283),
        ("persian_cat", 283),
        ("n02129165", 291),
    ],
)
def test_names_of_imagenet_rows_as_people_write_them(name, row):
    assert resolve_class_map([name], "imagenet-1k", 1000) == {0: row}


def test_one_word_of_a_longer_name():
    names = ["tench, Tinca tinca", "crane", "crane, a bird", "Tabby, tabby cat"]
    assert resolve_class_map(["tench", "crane", "tabby cat", "crane, a bird"], names) == {0: 0, 1: 1, 2: 3, 3: 2}


def test_a_name_that_no_imagenet_row_has():
    with pytest.raises(ValueError, match=r"such as 'n01440764' or '[a-z ]+', names .* got 'tabyb cat'. .*'tabby cat'"):
        resolve_class_map(["tabyb cat"], "imagenet-1k")
    with pytest.raises(ValueError, match=r"the name 'crane', .* to one row, but the rows 134, 517 have it"):
        resolve_class_map(["crane"], "imagenet-1k")
