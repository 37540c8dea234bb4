"""The page on other trainers runs as written, in its order."""

from __future__ import annotations

import random
import re
import shlex
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.models import load_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import get_gamma, inspect_checkpoint
from lightning_calibft.cli import main

for package in ("transformers", "accelerate", "open_clip"):
    pytest.importorskip(package)

from tests.integrations.hugging_face import TRAIN, VAL, folders, trainer_of, vit  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
NAMES, SEEN = ["ant", "bee", "cat", "dog", "eel", "fox"], [1, 3, 4]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def make_photos(folder: Path) -> None:
    rng = random.Random(0)
    for row in SEEN:
        (folder / NAMES[row]).mkdir(parents=True)
        for number in range(4):
            color = (rng.randrange(120), 40 * row, 200)
            Image.new("RGB", (40, 36), color).save(folder / NAMES[row] / f"{number}.png")


def save_as_timm(folder: Path) -> nn.Module:
    """What `train.py --model-ema` writes, with weights in the average that differ from the others."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=len(NAMES))
    average = ModelEmaV3(timm.create_model("test_resnet", num_classes=len(NAMES)))
    args = Namespace(model="test_resnet", img_size=32, input_size=None, mean=[0.4, 0.5, 0.6], model_kwargs={})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=average, checkpoint_dir=str(folder))
    saver.save_checkpoint(0, metric=0.5)
    return average.module


def open_clip_model():
    import open_clip

    torch.manual_seed(0)
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 16}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(embed_dim=12, vision_cfg=vision, text_cfg=text)


def samples(*shape: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    target = torch.tensor(SEEN).repeat(6)
    return DataLoader(TensorDataset(torch.randn(len(target), *shape, generator=generator), target), 5, shuffle=True)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What a reader of the page has: a model, data, files."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    make_photos(Path("data/train"))
    Path("names.txt").write_text("\n".join(NAMES))
    args = trainer_of(tmp_path / "outputs", vit()).args
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, len(NAMES)))
    words = torch.randint(1, 49, (len(NAMES), 8))
    return {
        **{"model": vit(), "args": args, "train": TRAIN, "test": VAL, "checkpoint": "outputs/checkpoint-6"},
        **{"net": net, "train_loader": samples(4, 4)},
        **{"clip": open_clip_model(), "tokens": words, "photo_loader": samples(3, 16, 16)},
    }


def test_the_page(names):
    average = save_as_timm(Path.cwd())
    commands = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    commands = [words for words in commands if words[0] == "calibft"]
    assert [words[1] for words in commands] == ["calibrate", "fold"]
    for _, *words in commands:
        assert main(words) == 0
    gammas = []
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), names)
        gammas.append(get_gamma(names["model"]))
    assert len(gammas) == 6
    # transformers
    assert gammas[0] is None  # folded
    assert [folder.name for folder in folders("outputs")] == ["checkpoint-3", "checkpoint-6"]
    assert gammas[1] == pytest.approx(
        names["callback"].checkpoint_results[str(Path.cwd() / "outputs/checkpoint-6")].gamma
    )
    # Fabric
    saved = torch.load("net.ckpt", weights_only=True)["model"]
    assert float(saved["3.absent_class_calibration.offset"]) == get_gamma(names["net"]) != 0
    # timm: the average, with gamma in its bias, also as `validate.py` loads it
    gamma = inspect_checkpoint("calibrated.pth")["gamma"]
    assert inspect_checkpoint("calibrated.pth")["seen_classes"] == SEEN
    shift = gamma * torch.tensor([row not in SEEN for row in range(len(NAMES))])
    for use_ema in (True, False):
        model = timm.create_model("test_resnet", num_classes=len(NAMES))
        load_checkpoint(model, "folded.pth", use_ema)
        for loaded in (model, names["model"]):
            torch.testing.assert_close(loaded.fc.bias, average.fc.bias + shift)
            torch.testing.assert_close(loaded.fc.weight, average.fc.weight)
    # open_clip
    assert get_gamma(names["classifier"]) == pytest.approx(names["result"].gamma)
    assert inspect_checkpoint("classifier.safetensors")["absent_classes"] == [0, 2, 5]
