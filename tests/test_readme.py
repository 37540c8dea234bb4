"""The README's commands run as written, in its order."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import AbsentClassCalibration, inspect_checkpoint, set_gamma
from lightning_calibft.cli import main

README = Path(__file__).parents[1] / "README.md"
ROOT = README.parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def make_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 6))


class MyModule(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("loss", nn.functional.cross_entropy(self(x), y))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(num_classes: int, size: int = 60) -> DataLoader:
    generator = torch.Generator().manual_seed(num_classes)
    target = torch.randint(num_classes, (size,), generator=generator)
    inputs = torch.randn(size, 4, 4, generator=generator)
    inputs.flatten(1)[torch.arange(size), target] += 3
    return DataLoader(TensorDataset(inputs, target), batch_size=20)


def make_photos(folder: Path) -> None:
    for name in ("cat", "cow", "dog"):
        (folder / name).mkdir(parents=True)
        for shade in (40, 90, 200):
            Image.new("RGB", (32, 24), (shade, 100, len(name))).save(folder / name / f"{shade}.png")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a user, with the files that the README speaks of."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    make_photos(tmp_path / "photos" / "train")
    Path("names.txt").write_text("\n".join(["cat", "dog", "ant", "cow", "bee", "owl"]))
    return tmp_path


def test_python_blocks(folder):
    pytest.importorskip("onnxscript")
    names = {"MyModule": MyModule, "make_net": make_net, "model": MyModule(), "example_images": torch.randn(2, 4, 4)}
    names |= {"train_loader": loader(3), "val_loader": loader(6), "test_loader": loader(6)}
    names["net"] = set_gamma(make_net(), 2.5, [0, 1, 2])
    outputs = []
    for block in blocks("python"):
        if "calibrate(net" in block:
            names["net"] = make_net()
        exec(compile(block, str(README), "exec"), names)
        outputs.append(dict(names))
    assert len(outputs) == 8

    assert "test_acc_absent" in outputs[0]["trainer"].callback_metrics
    module = names["MyLoggingModule"]()
    pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False).validate(module, loader(6))
    inputs = loader(6).dataset.tensors[0]
    calibrated = outputs[3]["model"]  # as the second fit has left it and saved it
    torch.testing.assert_close(outputs[4]["model"].eval()(inputs), calibrated.eval()(inputs))
    assert "<h2>What it means</h2>" in Path("report.html").read_text()
    assert {path.name for path in folder.iterdir()} > {"model.ckpt", "model.safetensors", "net.onnx", "net.pt2"}
    assert names["classes"] == ["cat", "cow", "dog"]
    assert names["result"].num_samples == 60


def test_ways_to_find_gamma(folder):
    (block,) = (block for block in blocks("python") if 'estimator="pcv"' in block)
    callbacks = [eval(line, {"AbsentClassCalibration": AbsentClassCalibration}) for line in block.splitlines()]
    gammas = set()
    for callback in callbacks:
        pl.seed_everything(0, verbose=False)
        trainer = pl.Trainer(max_epochs=20, callbacks=[callback], logger=False, enable_progress_bar=False)
        trainer.fit(MyModule(), loader(3), loader(6, 240))
        gammas.add(round(callback.result.gamma, 3))
    assert len(gammas) == len(callbacks) == 4


def commands(first: str) -> list[list[str]]:
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    return [words for words in lines if words[0] == first]


def run_command(words: list[str]) -> None:
    """Run a command in a process of its own, with the programs that are installed beside Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(words, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_commands_are_known():
    """The installation and `make` are for continuous integration."""
    lines = [line for block in blocks("bash") for line in block.splitlines() if not line.startswith(("pip", "make"))]
    assert len(lines) == len(commands("calibft")) + len(commands("python")) == 5


def test_calibft(folder):
    """The first command as a process of its own; the others in this one, where nothing is imported anew."""
    pytest.importorskip("onnxscript")
    model = timm.create_model("resnet18", num_classes=6)
    torch.save(model.state_dict(), "weights.pth")
    set_gamma(model, 2.5, [0, 1, 3])
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0"}, "best.ckpt")
    first, *others = commands("calibft")
    run_command(first)
    for _, *words in others:
        assert main(words) == 0
    plain = timm.create_model("resnet18", num_classes=6, checkpoint_path="model.safetensors").eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(plain(images), model.eval()(images), rtol=0, atol=1e-5)
    assert inspect_checkpoint("calibrated.pth")["seen_classes"] == [0, 1, 3]
    assert Path("model.onnx").is_file()


def test_scripts(folder):
    pytest.importorskip("jsonargparse")
    shutil.copytree(ROOT / "examples", "examples", ignore=shutil.ignore_patterns("benchmarks"))
    for words in commands("python"):
        run_command(words)
