from __future__ import annotations

import importlib
import random
import re
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image, ImageDraw
from timm.data import create_transform, resolve_model_data_config

from tests.helpers.processes import run_python

SCRIPT = Path(__file__).parents[2] / "examples" / "timm_finetune.py"
MODEL = "test_resnet"
# Neither in the order of the alphabet, nor the fine-tuning classes together: rows of the head are not folder positions.
CLASSES = ["square", "disc", "wedge", "bar", "cross", "ring"]
SEEN = ["ring", "square", "bar"]


def draw(name: str, rng: random.Random) -> Image.Image:
    """Draw a shape in a random color at a random place."""
    image = Image.new("RGB", (48, 48), tuple(rng.randrange(90) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    color = tuple(rng.randrange(140, 256) for _ in range(3))
    x, y, r = rng.randrange(14, 34), rng.randrange(14, 34), rng.randrange(8, 14)
    box = (x - r, y - r, x + r, y + r)
    if name == "square":
        pen.rectangle(box, fill=color)
    elif name == "disc":
        pen.ellipse(box, fill=color)
    elif name == "ring":
        pen.ellipse(box, outline=color, width=3)
    elif name == "wedge":
        pen.polygon([(x - r, y + r), (x + r, y + r), (x, y - r)], fill=color)
    if name in ("bar", "cross"):
        pen.line((x - r, y, x + r, y), fill=color, width=4)
    if name == "cross":
        pen.line((x, y - r, x, y + r), fill=color, width=4)
    return image


def make_folder(root: Path, classes: list[str], images_per_class: int, rng: random.Random) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(images_per_class):
            draw(name, rng).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = random.Random(0)
    make_folder(tmp_path / "train", SEEN, 6, rng)
    make_folder(tmp_path / "val", CLASSES, 3, rng)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES) + "\n")
    torch.manual_seed(0)
    torch.save(timm.create_model(MODEL, num_classes=len(CLASSES)).state_dict(), tmp_path / "pretrained.pt")
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = ["--classes", "names.txt", "--epochs", "2", "--batch-size", "5", "--workers", "0", *arguments]
    return run_python(SCRIPT, MODEL, "train", *options, cwd=folder)


def _reference_gamma(folder: Path, state: dict[str, torch.Tensor]) -> float:
    """Average logit gap of these weights on the training images without augmentation, image by image."""
    model = timm.create_model(MODEL, num_classes=len(CLASSES)).eval()
    model.load_state_dict(state)
    transform = create_transform(**resolve_model_data_config(model))
    gaps = []
    for file in sorted(folder.glob("*/*.png")):
        with torch.no_grad(), Image.open(file) as image:
            logits = dict(zip(CLASSES, model(transform(image).unsqueeze(0))[0].tolist(), strict=True))
        seen = [logits[name] for name in SEEN if name != file.parent.name]
        absent = [logits[name] for name in CLASSES if name not in SEEN]
        gaps.append(sum(seen) / len(seen) - sum(absent) / len(absent))
    return sum(gaps) / len(gaps)


def test_writes_folded_weights_that_plain_timm_loads(photos: Path) -> None:
    done = run(photos, "--weights", "pretrained.pt", "--val", "val", "--lr", "0.01")

    output = photos / "outputs"
    state = torch.load(output / "best.ckpt", weights_only=True)["state_dict"]
    trained = {key.removeprefix("model."): value for key, value in state.items() if "absent_class" not in key}
    gamma = float(re.search(r"gamma of .*best\.ckpt: (-?\d+\.\d+)", done.stdout)[1])
    assert gamma == pytest.approx(_reference_gamma(photos / "train", trained), abs=1e-4)
    assert abs(gamma) > 1e-3

    model = timm.create_model(MODEL, num_classes=len(CLASSES), checkpoint_path=str(output / "weights.pt"))
    folded = model.state_dict()
    change = folded["fc.bias"] - trained["fc.bias"]
    expected = torch.tensor([gamma * (name not in SEEN) for name in CLASSES])
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-4)
    assert all(torch.equal(folded[key], trained[key]) for key in folded if key != "fc.bias")
    pretrained = torch.load(photos / "pretrained.pt", weights_only=True)
    assert not torch.equal(folded["fc.weight"], pretrained["fc.weight"])
    assert torch.allclose(folded["fc.weight"], pretrained["fc.weight"], atol=0.1)


def test_runs_without_weights_and_validation_folder(photos: Path) -> None:
    run(photos, "--output", "elsewhere")
    assert (photos / "elsewhere" / "weights.pt").exists()
    assert not (photos / "outputs").exists()


def test_names_the_folders_that_are_no_class(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    open_folder = importlib.import_module("timm_finetune").open_folder
    with pytest.raises(SystemExit, match="folders that `--classes` does not name: bar\\."):
        open_folder(photos / "train", [name for name in CLASSES if name != "bar"], transform=None)
