"""The benchmark on pictures, with tiny images, icons and weights in place of the real ones."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from miniature import MODEL, environment, make_images, make_weights, script
from torch import nn
from torch.utils.data import TensorDataset

from lightning_calibft import pseudo_cross_validation

LICENSE = {"title": "MIT", "url": "https://example.com/license"}
AUTHOR = {"name": "Nobody", "url": "https://example.com"}
SMALL = ["--image-size", "32", "--seeds", "1", "--accelerator", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    with environment():
        yield


@pytest.fixture(scope="module")
def classes(_scripts):
    """Twenty classes, and one icon of each."""
    return {name: words.split()[0] for name, words in list(script("pictures_data").CLASSES.items())[:20]}


@pytest.fixture(scope="module")
def options(tmp_path_factory, classes):
    folder = tmp_path_factory.mktemp("pictures")
    make_images(folder / "photos", classes, 10)
    make_images(folder / "paintings", classes, 4)
    (folder / "names.txt").write_text("\n".join([*classes, *(f"other {row}" for row in range(10))]))
    data = ["--data", folder / "photos", "--test-data", folder / "paintings", "--label-names", folder / "names.txt"]
    network = ["--model", MODEL, "--weights", make_weights(folder / "weights.pt", 30)]
    return [*network, *data, *SMALL, "--optimizers", "AdamW", "--output", folder / "kept"]


@pytest.fixture(scope="module")
def folder(options):
    return options[-1].parent


def run(*arguments):
    """Run the script and return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        script("pictures").main([str(argument) for argument in arguments])
    return printed.getvalue()


@pytest.fixture(scope="module")
def printed(options):
    return run(*options)


@pytest.fixture(scope="module")
def runs(printed, folder):
    (kept,) = (folder / "kept").iterdir()
    return script("recorded").read_picture_runs(kept)


def test_every_table_is_printed(printed):
    tables = [block for block in printed.split("\n\n") if block.startswith("|")]
    assert len(tables) == 10 + 4  # of these, four by the way to fine-tune
    assert "nan" not in printed
    for table in tables:
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1
    columns = re.findall(r"^\| pictures A, near, natural share \| (.*) \| mean \| worst \|$", printed, re.MULTILINE)
    ways = script("pictures").WAYS
    assert columns[0].split(" | ") == sorted(f"{way}_AdamW" for way in ways)
    assert f"{len(ways)} trainings" in printed


def test_runs_are_those_of_the_images(runs, classes):
    assert len(runs) == 4 * 6
    for run_ in runs:
        occurring = set(run_.seen) | {*run_.arrays["absent_classes"].tolist()}
        assert len(occurring) == len(classes)
        assert len(run_.seen) == {"head20": 4, "head80": 16}.get(run_.row.split(", ")[2].split("_")[0], 10)
        assert run_.natural == pytest.approx(1 - len(run_.seen) / 20)
        assert set(run_.on("heldout").target.tolist()) <= set(run_.seen)
        assert len(run_.target) == 6 * len(run_.seen)
        assert len(run_.on("heldout").target) == 2 * len(run_.seen)  # half of the other four images of each class
        near = ", near" in run_.group
        assert run_.is_seen.sum() == (2 if near else 4) * len(run_.seen)
        assert (~run_.is_seen).sum() == 4 * (20 - len(run_.seen))


def test_gamma_of_the_callback_is_that_of_the_tables(runs):
    """The callback found it on the held-out images, with all other rows absent and the share told."""
    pseudo_absent = script("estimators").METHODS["`pseudo_absent`, share told"]
    for run_ in (run_ for run_ in runs if run_.group == "pictures B, near"):
        gamma = pseudo_absent(run_.on("heldout"), run_.natural)
        assert gamma == pytest.approx(run_.arrays["callback_gamma"].item(), abs=0.02)  # logits are kept in float16


def test_cross_validation_is_that_of_the_package(runs, folder):
    pictures, methods = script("pictures"), script("methods")
    (kept,) = (folder / "kept").iterdir()
    before = torch.load(kept / "before.pt", weights_only=True)
    *_, positions, _ = pictures.divide(before, 50, 0)
    (features, _, target), augmented = before["train"], before["augmented"][0]
    args = pictures.parse_arguments(["--model", MODEL, "--weights", str(folder / "weights.pt")])
    start = SimpleNamespace(backbone=nn.Identity(), head=pictures.load_network(args).fc)

    def tune(module, subset):
        of_half = positions[torch.tensor(subset.indices)]
        both = TensorDataset(torch.cat([augmented[of_half], features[of_half]]), target[of_half].repeat(2))
        methods.fit(module, both, pictures.WAYS["head50"].epochs, 0)

    (run_,) = (run_ for run_ in runs if run_.name.endswith("/head50_AdamW_0, A, near"))
    module = methods.Classifier(start, "AdamW", pictures.PROBE_RATES["AdamW"])
    data = TensorDataset(features[positions], target[positions])
    result = pseudo_cross_validation(module, data, tune, run_.seen, absent_classes=run_.absent, progress=False)
    gamma = script("estimators").cross_validated(run_, None, "seen")
    assert gamma == pytest.approx(result.gamma, abs=0.01)  # logits are kept in float16


def test_finished_runs_are_read_and_linear_probes_do_not_run_the_backbone(printed, options, folder):
    """All of a probe is done on cached features: training, calibration, cross-validation and scoring."""
    (kept,) = (folder / "kept").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    with np.load(kept / "head50_AdamW_0.npz") as stored:
        arrays = dict(stored)
    (kept / "head50_AdamW_0.npz").unlink()
    called = set()
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(type(module)))
    try:
        run(*options, "--only", "before")
    finally:
        hook.remove()
    assert nn.Linear in called
    assert nn.Conv2d not in called
    after = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"head50_AdamW_0.npz"}
    with np.load(kept / "head50_AdamW_0.npz") as stored:
        for name in arrays.keys() - {"seconds"}:
            assert np.array_equal(arrays[name], stored[name]), name


def test_small_copies_are_runs_as_well(options, tmp_path, runs):
    run(*options, "--keep", tmp_path / "small", "--only", "before")
    copies = script("recorded").read_picture_runs(tmp_path / "small")
    assert [copy.name.split("/")[1] for copy in copies] == [run_.name.split("/")[1] for run_ in runs]
    for copy, run_ in zip(copies, runs, strict=True):
        assert len(copy.target) == min(50, len(run_.target))
        assert (copy.on("heldout").logits - run_.on("heldout").logits).abs().max() <= 0.13
        assert torch.equal(copy.margin, run_.margin)
        assert not any(name.startswith("pseudo0") for name in copy.arrays)


def test_recorded_runs_that_no_choice_was_made_on():
    """The recommended estimator is near the best gamma at each share, and the paper's is not."""
    estimators, recorded = script("estimators"), script("recorded")
    runs = [run_.on("heldout") for run_ in recorded.read_picture_runs(recorded.RUNS / "drawings")]
    assert len(runs) == 24
    of = {
        name: [estimators.losses(estimators.METHODS[name], runs, [share]) for share in estimators.SHARES]
        for name in ("gamma 0", "`alg`", "`pseudo_absent`, share told")
    }
    told = of["`pseudo_absent`, share told"]
    for found, zero in zip(told, of["gamma 0"], strict=True):
        assert sum(found.values()) / len(runs) < 0.7
        assert max(found.values()) < 2.5
        assert max(found[name] - zero[name] for name in found) < 2.0
    assert max(max(found.values()) for found in of["`alg`"]) > 30


def make_icon_sets(folder, classes):
    """Write icon sets: disks of a color for each class, of a size for each set, one of them under another name."""
    folder.mkdir()
    for size, name in enumerate(script("pictures_data").ICON_SETS):
        icons = {}
        for icon in classes.values():
            color = "".join(f"{random.Random(icon + str(part)).randrange(256):02x}" for part in range(3))
            icons[icon] = {"body": f'<circle cx="8" cy="8" r="{4 + size / 3}" fill="#{color}"/>'}
        first, second, *_ = classes.values()
        icons[f"{second}-1"] = icons.pop(second)
        aliases = {f"{first}-face": {"parent": first}}
        info = {"author": AUTHOR, "license": LICENSE}
        (folder / f"{name}.json").write_text(json.dumps({"icons": icons, "aliases": aliases, "info": info}))


def test_drawings(classes, tmp_path):
    pytest.importorskip("resvg_py")
    make_icon_sets(tmp_path / "icons", classes)
    network = ["--model", MODEL, "--weights", make_weights(tmp_path / "weights.pt"), *SMALL]
    some = ["--ways", "head50", "light", "--optimizers", "SGD", "--only", "licenses"]
    printed = run(*network, *some, "--icons", tmp_path / "icons", "--output", tmp_path / "kept")
    for name, of in script("pictures_data").ICON_SETS.items():
        line = f"| `@iconify-json/{name}` {of.version} | {of.part} | 20 | 20 | [Nobody]({AUTHOR['url']}) |"
        assert f"{line} [MIT]({LICENSE['url']}) |" in printed
    (kept,) = (tmp_path / "kept").iterdir()
    assert {path.name for path in kept.iterdir()} == {"before.pt", "head50_SGD_0.npz", "light_SGD_0.npz"}
    with np.load(kept / "light_SGD_0.npz") as arrays:
        assert len(arrays["train_target"]) == 3 * 10
        assert len(arrays["test_seen"]) == 4 * 20


def test_an_icon_is_where_it_was_drawn():
    pytest.importorskip("resvg_py")
    data = script("pictures_data")
    icon_set = {"width": 4, "height": 4}
    icon = {"body": '<path fill="#ff0000" fill-opacity="0.5" d="M0 0h2v4h-2z"/>'}
    pixels = data.rendered(icon, icon_set, 8)
    assert pixels.shape == (4, 8, 8)
    left, right = pixels[:, :, :4], pixels[:, :, 4:]
    assert (right == 0).all()
    assert ((left[0].int() - 128).abs() <= 1).all()  # red times opacity
    assert ((left[3].int() - 128).abs() <= 1).all()
    assert (left[1:3] == 0).all()


def test_pictures_are_fixed_or_fresh():
    data = script("pictures_data")
    icons = torch.zeros(2, 4, 16, 16, dtype=torch.uint8)
    fixed, fresh = (
        data.Pictures(icons, torch.tensor([3, 5]), (0.5,) * 3, (0.5,) * 3, fixed=fixed) for fixed in (True, False)
    )
    torch.manual_seed(0)
    state = torch.get_rng_state()
    (one, row), (again, _), (other, _) = fixed[1], fixed[1], fixed[0]
    assert row == 5
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(fresh[1][0], fresh[1][0])
    assert one.min() > 2 * 0.9 * 0.8 - 1 - 1e-6  # an invisible icon on its light background


def test_classes_and_parts():
    data = script("pictures_data")
    assert len(data.CLASSES) > 250
    rows = script("lightning_calibft").resolve_class_map(list(data.CLASSES), "imagenet-1k", 1000)
    assert len(set(rows.values())) == len(data.CLASSES)
    words = [word for text in data.CLASSES.values() for word in text.split()]
    assert len(words) == len(set(words))  # no icon shows two classes
    families = {
        part: {name.split("-")[0] for name, of in data.ICON_SETS.items() if of.part == part}
        for part in ("train", "near", "test")
    }
    assert families["train"] == families["near"] == {"noto", "emojione", "fluent"}
    assert families["train"].isdisjoint(families["test"])
    assert not any(name in data.ICON_SETS for name in ("apple", "facebook"))
