"""The README and the pages of the documentation: their code runs as written, their links lead somewhere."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_calibft
from lightning_calibft import AbsentClassCalibration, inspect_checkpoint, set_gamma
from lightning_calibft.cli import main

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
# Those on other trainers run in tests/examples/test_integrations.py.
PAGES = [README, *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "integrations")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


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


class FrozenNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.fc = nn.Flatten(), nn.Linear(16, 6)


def loader(num_classes: int, size: int = 60) -> DataLoader:
    generator = torch.Generator().manual_seed(num_classes)
    target = torch.randint(num_classes, (size,), generator=generator)
    inputs = torch.randn(size, 4, 4, generator=generator)
    inputs.flatten(1)[torch.arange(size), target] += 3
    return DataLoader(TensorDataset(inputs, target), batch_size=20)


def trained() -> pl.Trainer:
    """A Trainer after a fit that has left a calibrated checkpoint."""
    trainer = pl.Trainer(max_epochs=1, callbacks=[AbsentClassCalibration()], logger=False, enable_progress_bar=False)
    trainer.fit(MyModule(), loader(3))
    return trainer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory of a user, with the files that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name in ("cat", "cow", "dog"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        for shade in (40, 90, 200):
            image = Image.new("RGB", (32, 24), (shade, 100, len(name)))
            image.save(tmp_path / "photos" / "train" / name / f"{shade}.png")
    Path("names.txt").write_text("\n".join(["cat", "dog", "ant", "cow", "bee", "owl"]))
    return tmp_path


def run_page(page: Path) -> dict[str, Any]:
    """Run the blocks of a page, one after the other, and return the names that they leave."""
    features, target = torch.randn(60, 16), torch.randint(3, (60,))
    names = {"MyModule": MyModule, "make_net": make_net, "model": MyModule(), "example_images": torch.randn(2, 4, 4)}
    names |= {"train_loader": loader(3), "val_loader": loader(6, 240), "test_loader": loader(6)}
    names |= {"tuned_net": make_net(), "pretrained_net": make_net(), "held_out_loader": loader(3, 90)}
    names |= {"unlabeled_loader": [inputs for inputs, _ in loader(6)]}
    names |= {"net": make_net(), "frozen_net": FrozenNet(), "features": features, "target": target}
    if page.stem == "shipping":
        names |= {"trainer": trained(), "net": set_gamma(make_net(), 2.5, [0, 1, 2])}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_python(page, folder):
    if page.stem == "shipping":
        pytest.importorskip("onnxscript")
    names = run_page(page)
    check = CHECKS.get(page.stem)
    if check is not None:
        check(names, folder)


def check_readme(names, folder):
    result = names["calibration"].result
    assert result.estimator == "pseudo_absent"
    assert result.absent_share == 0.2
    assert "test_acc_absent" in names["trainer"].callback_metrics


def check_first_run(names, folder):
    path = names["trainer"].checkpoint_callback.best_model_path
    assert names["get_gamma"](names["model"]) == inspect_checkpoint(path)["gamma"]


def check_measure(names, folder):
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.validate(names["MyLoggingModule"](), loader(6))
    assert {"val_ausuc", "val_acc_absent"} <= trainer.callback_metrics.keys()
    assert "<h2>What it means</h2>" in (folder / "report.html").read_text()


def check_shipping(names, folder):
    inputs = loader(6).dataset.tensors[0]
    calibrated = names["load_calibrated"](MyModule, names["path"]).eval()
    torch.testing.assert_close(names["model"].eval()(inputs), calibrated(inputs))
    assert {path.name for path in folder.iterdir()} > {"model.ckpt", "model.safetensors", "net.onnx", "net.pt2"}


def check_engines(names, folder):
    assert names["result"].num_samples == 60
    assert names["get_gamma"](names["tuned_net"]) is not None
    assert names["get_gamma"](names["frozen_net"]) is not None


CHECKS = {
    "README": check_readme,
    "first-run": check_first_run,
    "measure": check_measure,
    "shipping": check_shipping,
    "engines": check_engines,
}


def test_ways_to_find_gamma(folder):
    """The callbacks that the page on gamma shows are ways to find different gammas."""
    lines = "\n".join(blocks(ROOT / "docs" / "gamma.md", "python")).splitlines()
    calls = [line for line in lines if line.startswith("AbsentClassCalibration(")]
    gammas = set()
    for call in calls:
        pl.seed_everything(0, verbose=False)
        callback = eval(call, {"AbsentClassCalibration": AbsentClassCalibration})
        trainer = pl.Trainer(max_epochs=20, callbacks=[callback], logger=False, enable_progress_bar=False)
        trainer.fit(MyModule(), loader(3), loader(6, 240))
        gammas.add(round(callback.result.gamma, 3))
    assert len(gammas) == len(calls) == 4


def commands(first: str) -> list[list[str]]:
    """The commands of all pages that start with a word, each of them once."""
    lines = dict.fromkeys(line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines())
    words = [shlex.split(line, comments=True) for line in lines]
    return [line for line in words if line and line[0] == first]


def run_command(words: list[str]) -> None:
    """Run a command in a process of its own, with the programs that are installed beside Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(words, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_commands_are_known():
    """The installation and `make` are for continuous integration."""
    lines = {line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()}
    programs = {shlex.split(line)[0] for line in lines}
    assert programs == {"calibft", "make", "pip", "python"}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {words[1] for words in commands("make")} <= set(targets)


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
    assert len(others) == 4
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


def links(page: Path) -> list[str]:
    """The links of a page to other files, without those in code."""
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text)


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "docs" / "integrations.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem
)
def test_links(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        assert (page.parent / target).exists(), link
        file = page if not target else page.parent / target
        if anchor and "{include}" not in file.read_text():
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, link


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= 900


def test_badges_say_what_is_so():
    tomllib = pytest.importorskip("tomllib")  # not in Python 3.10
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"Python :: (3\.\d+)", str(project["classifiers"]))
    assert f"python-{versions[0]}_to_{versions[-1]}-" in README.read_text()
    assert f"license-{project['license'].replace('-', '--')}-" in README.read_text()


def test_no_link_is_broken_where_the_readme_is_shown_alone():
    """As a description of the package, it has links to the site in place of those to files."""
    tomllib = pytest.importorskip("tomllib")
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    readme = README.read_text()
    text = readme[: readme.index("## Develop")] + readme[readme.index("## Cite") :]
    for rule in hook["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert not re.findall(r"\]\((?!https:)", text)
    shown = re.findall(r"readthedocs\.io/en/stable/([\w-]+)\.html", text)
    assert len(shown) > 10
    assert all((ROOT / "docs" / f"{name}.md").is_file() for name in shown)


def test_the_readme_has_the_numbers_of_the_demo():
    """Its table is a part of the one that the page on evidence has, as the demo has printed it."""

    def rows(page: Path) -> list[list[float]]:
        text = page.read_text()
        table = text[text.index("| pre-trained |") :].split("\n\n")[0]
        return [[float(cell.split("±")[0]) for cell in line.split("|")[2:-1]] for line in table.splitlines()]

    shown = [[y, seen, absent, area] for y, seen, absent, _, area, *_ in rows(ROOT / "docs" / "evidence.md")]
    assert rows(README) == shown


def test_every_public_name_is_in_the_reference():
    """Each room with public names that the package itself does not show has its part of the reference."""
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    shown = re.findall(r"automodule:: (\S+)", pages)
    names = {name for module in shown for name in getattr(importlib.import_module(module), "__all__", [])}
    names |= {"ESTIMATORS"} if "data:: lightning_calibft.estimators.ESTIMATORS" in pages else set()
    for found in pkgutil.walk_packages(lightning_calibft.__path__, "lightning_calibft."):
        if not found.name.startswith("lightning_calibft.cli"):  # the command has a page of its own
            assert set(getattr(importlib.import_module(found.name), "__all__", [])) <= names, found.name


def test_no_sentence_about_a_property_is_taken_for_its_type():
    """Napoleon takes the words before a colon in the first line for the type: "Text: more text" loses its order."""
    for found in pkgutil.walk_packages(lightning_calibft.__path__, "lightning_calibft."):
        if found.name.startswith("lightning_calibft.cli"):  # running it is all that its `__main__` does
            continue
        for part in filter(inspect.isclass, vars(importlib.import_module(found.name)).values()):
            for name, value in vars(part).items():
                if isinstance(value, property) and part.__module__ == found.name:
                    first = (value.__doc__ or "").partition("\n")[0]
                    assert not re.search(r":\s", re.sub(r"`[^`]*`", "", first)), f"{part.__name__}.{name}"
