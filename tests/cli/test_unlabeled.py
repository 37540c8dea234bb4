"""A newcomer's path: fine-tuning images, unlabeled images from where the model will work, and three commands."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from lightning_calibft import calibrate
from lightning_calibft.labels.image_folders import UnlabeledImages, data_config
from tests.cli.running import READ, plain, run
from tests.helpers.runs import quiet
from tests.shipping.consumer import NUM_CLASSES
from tests.shipping.fine_tuned import SEEN

pytestmark = quiet


@pytest.fixture
def before(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "before.pth"
    torch.save(timm.create_model("test_resnet", num_classes=NUM_CLASSES).state_dict(), path)
    return path


@pytest.fixture
def traffic(photos, tmp_path):
    """Images without labels, some of them in a folder inside, and a file that is none."""
    folder = tmp_path / "traffic"
    (folder / "monday").mkdir(parents=True)
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        shutil.copy(path, folder / ("monday" if number % 2 else ".") / f"{number}.png")
    (folder / "notes.txt").write_text("rainy")
    return folder


def test_three_commands(raw, before, photos, traffic, tmp_path, capsys):
    calibrated, shipped = tmp_path / "calibrated.pth", tmp_path / "model.onnx"
    words = ["calibrate", "test_resnet", raw, photos, calibrated, *READ, "--estimator", "pseudo_absent"]
    assert run(*words, "--pretrained", before, "--unlabeled", traffic, "--held-out", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["held_out"] is True
    assert run("export", calibrated, shipped, "--img-size", "32") == 0
    assert run("inspect", shipped) == 0
    text = capsys.readouterr().out
    low, high = told["absent_share_interval"]
    share = told["absent_share"]
    said = f"it is for {share:.1%}, estimated from unlabeled samples; 90 % interval {low:.1%} to {high:.1%}"
    assert said in text
    assert run("export", calibrated, tmp_path / "folder") == 0
    assert said in (tmp_path / "folder" / "README.md").read_text()

    config = data_config(plain(raw), img_size=32)
    images = UnlabeledImages(traffic, config)
    assert len(images) == len(list(photos.rglob("*.png")))
    model = plain(raw)
    data = ImageFolder(photos, images._transform, target_transform=SEEN.__getitem__)
    options = {"estimator": "pseudo_absent", "pretrained": plain(before), "progress": False}
    result = calibrate(model, DataLoader(data, 64), SEEN, unlabeled=DataLoader(images, 4), **options)
    assert share == pytest.approx(result.absent_share, rel=1e-4)
    assert told["gamma"] == pytest.approx(result.gamma, rel=1e-4)

    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(shipped)
    x = torch.stack([images[number] for number in range(3)])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(logits, model(x).detach().numpy(), atol=1e-4)
    assert resolve_model_data_config(model)["mean"] == config["mean"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--estimator", "alg"], "`--estimator` to know the margins"),
        (["--absent-share", "0.1"], "`--absent-share` to be None with `--unlabeled` samples"),
        (["--unlabeled", "nowhere"], "Found no images in the folder 'nowhere'"),
    ],
)
def test_what_does_not_fit(words, message, raw, before, photos, traffic, tmp_path, capsys):
    command = ["calibrate", "test_resnet", raw, photos, tmp_path / "calibrated.pth", *READ]
    command += ["--estimator", "pseudo_absent", "--pretrained", before, "--unlabeled", traffic, *words]
    assert run(*command) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "calibrated.pth").exists()
