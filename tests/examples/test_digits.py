from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from tests.helpers.processes import run_python

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = [
    "pre-trained",
    "fine-tuned",
    "fine-tuned + ALG",
    "fine-tuned + pseudo-absent",
    "oracle gamma",
    "all-class fine-tuning",
]


@pytest.fixture
def digits_data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("digits_data")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Run the demo as a user does, short; return what it printed and the folder it ran in."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("demo")
    (folder / "digits_data.py").write_text("raise ImportError('not of the demo')")
    return run_python(EXAMPLES / "digits.py", "--seeds", "1", "--epochs", "8", cwd=folder).stdout, folder


def table(printed: str) -> dict[str, dict[str, float]]:
    """Read the Markdown table back: the mean in each cell."""
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    (_, *columns), _, *rows = lines
    return {
        name: dict(zip(columns, (float(cell.split(" ± ")[0]) for cell in cells), strict=True)) for name, *cells in rows
    }


def test_demo_prints_the_table(demo: tuple[str, Path]) -> None:
    rows = table(demo[0])
    assert list(rows) == ROWS
    tuned, calibrated, oracle = rows["fine-tuned"], rows["fine-tuned + ALG"], rows["oracle gamma"]
    assert calibrated["gamma"] != 0
    assert tuned["gamma"] == 0
    for unchanged in ("AUSUC", "NCM_S/Y", "NCM_U/Y"):
        assert tuned[unchanged] == calibrated[unchanged] == oracle[unchanged]
    assert calibrated["Acc_U/Y"] > tuned["Acc_U/Y"] + 5
    better = rows["fine-tuned + pseudo-absent"]
    assert better["gamma"] not in (0, calibrated["gamma"])
    assert better["Acc_Y/Y"] > tuned["Acc_Y/Y"] + 5
    assert oracle["Acc_Y/Y"] >= max(better["Acc_Y/Y"], tuned["Acc_Y/Y"], calibrated["Acc_Y/Y"])
    assert rows["all-class fine-tuning"]["Acc_Y/Y"] > tuned["Acc_Y/Y"] + 10


def test_demo_saves_the_curve(demo: tuple[str, Path]) -> None:
    with Image.open(demo[1] / "outputs" / "curve.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) >= 400
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_demo_predicts_absent_classes_in_fresh_processes(demo: tuple[str, Path], digits_data: ModuleType) -> None:
    found = re.findall(r"(\d+) of (\d+) images of absent classes right; lightning_calibft was (.*)", demo[0])
    assert [imported for *_, imported in found] == ["imported", "never imported"]

    state = torch.load(demo[1] / "outputs" / "seed0" / "best.ckpt", weights_only=True)["state_dict"]
    gamma = state.pop("head.absent_class_calibration.offset")
    mask = state.pop("head.absent_class_calibration.mask")
    module = importlib.import_module("digits_module").DigitClassifier()
    module.load_state_dict(state)
    data = digits_data.make_data(seed=0)
    assert [row for row in range(10) if not mask[row]] == data.seen_classes
    images, labels = digits_data.keep_classes(data.target_test, mask.nonzero().flatten().tolist()).tensors
    with torch.no_grad():
        logits = module.eval()(images)
    right = ((logits + gamma * mask).argmax(1) == labels).sum().item()
    assert [(int(count), int(of)) for count, of, _ in found] == [(right, len(labels))] * 2
    assert right > (logits.argmax(1) == labels).sum().item()


@pytest.mark.parametrize("name", ["digits_data.py", "digits_module.py"])
def test_the_users_own_files_know_nothing_of_the_package(name: str) -> None:
    assert not re.search(r"^\s*(from|import) lightning_calibft", (EXAMPLES / name).read_text(), re.MULTILINE)


def test_base_images_are_disjoint(digits_data: ModuleType) -> None:
    parts = digits_data.split_rows(1797, torch.Generator().manual_seed(3))
    assert {name: len(rows) for name, rows in parts.items()} == {
        "source": 809,
        "target_train": 449,
        "held_out": 90,
        "target_test": 449,
    }
    assert torch.equal(torch.cat(list(parts.values())).sort().values, torch.arange(1797))


def test_data_depends_on_the_seed_alone(digits_data: ModuleType) -> None:
    torch.manual_seed(1)
    one = digits_data.make_data(seed=7)
    state = torch.get_rng_state()
    same, other = digits_data.make_data(seed=7), digits_data.make_data(seed=8)
    assert torch.equal(torch.get_rng_state(), state)
    for part in digits_data.SHARES:
        for first, second in zip(getattr(one, part).tensors, getattr(same, part).tensors, strict=True):
            assert torch.equal(first, second)
        assert not torch.equal(getattr(one, part).tensors[0], getattr(other, part).tensors[0])
    assert one.seen_classes == same.seen_classes


def test_parts_hold_all_classes_and_half_are_seen(digits_data: ModuleType) -> None:
    data = digits_data.make_data(seed=0)
    assert len(set(data.seen_classes)) == 5
    for part in digits_data.SHARES:
        images, labels = getattr(data, part).tensors
        assert labels.unique().tolist() == list(range(10))
        assert images.shape == (len(labels), 1, 16, 16)
        assert images.min() >= 0
        assert images.max() <= 1
    kept = digits_data.keep_classes(data.target_train, data.seen_classes)
    assert kept.tensors[1].unique().tolist() == data.seen_classes
    assert len(kept) == sum((data.target_train.tensors[1] == label).sum() for label in data.seen_classes)


def test_target_domain_is_rotated_by_25_degrees(digits_data: ModuleType) -> None:
    # A bar through the center: its principal axis tells the angle. Texture and noise only blur it.
    bar = torch.zeros(64, 1, 16, 16)
    bar[:, :, 7:9, 2:14] = 1
    angles = {}
    for name in ("source_domain", "target_domain"):
        image = getattr(digits_data, name)(bar, torch.Generator().manual_seed(0)).mean(dim=(0, 1))
        weight = (image - image.median()).clamp(min=0.2) - 0.2
        y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
        x, y = x - (weight * x).sum() / weight.sum(), y - (weight * y).sum() / weight.sum()
        xx, yy, xy = ((weight * product).sum() for product in (x * x, y * y, x * y))
        angles[name] = torch.rad2deg(0.5 * torch.atan2(2 * xy, xx - yy)).item()
    assert abs(angles["source_domain"]) < 3
    assert abs(abs(angles["target_domain"]) - 25) < 5
