"""The names of the top level load on demand, and the light parts of the package load nothing heavy."""

from __future__ import annotations

import ast
import pickle
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.data import transforms

import lightning_calibft
from lightning_calibft import estimators
from lightning_calibft.cli import options
from tests.helpers.processes import run_python


def type_checked_names():
    """Return the names that type checkers see, with their modules."""
    tree = ast.parse(Path(lightning_calibft.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {alias.name: node.module for node in block.body for alias in node.names}


def test_type_checkers_see_what_is_there():
    names = {name: f"lightning_calibft.{module}" for name, module in lightning_calibft._MODULE_OF.items()}
    names |= dict.fromkeys(lightning_calibft._SUBPACKAGES, "lightning_calibft")
    assert type_checked_names() == names
    assert sorted(lightning_calibft.__all__) == lightning_calibft.__all__ == sorted(lightning_calibft._MODULE_OF)


@pytest.mark.parametrize("name", lightning_calibft.__all__)
def test_each_public_name(name):
    public = getattr(lightning_calibft, name)
    assert public.__name__ == name
    assert name in dir(lightning_calibft)
    assert pickle.loads(pickle.dumps(public)) is public


def test_star_import():
    namespace = {}
    exec("from lightning_calibft import *", namespace)
    assert set(lightning_calibft.__all__) <= namespace.keys()


def test_a_name_that_is_none():
    with pytest.raises(AttributeError, match="module 'lightning_calibft' has no attribute 'calibrat'"):
        lightning_calibft.calibrat  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'calibrat'"):
        from lightning_calibft import calibrat  # noqa: F401


def test_help():
    text = pydoc.render_doc(lightning_calibft, renderer=pydoc.plaintext)
    assert "class AbsentClassCalibration(" in text
    assert "Find gamma" in text  # from the docstring of `calibrate`


def test_a_replaced_class_is_seen(monkeypatch):
    import lightning_calibft.callback as room

    monkeypatch.setattr(room, "AbsentClassCalibration", "replaced")
    assert lightning_calibft.AbsentClassCalibration == "replaced"


HEAVY = ["lightning", "matplotlib", "onnx", "pytorch_lightning", "timm", "torch", "torchmetrics", "torchvision"]


def output(code):
    """Return the lines that a fresh process prints; the last tells which of the heavy packages it has loaded."""
    show = f"import os, sys; print('loaded', *[name for name in {HEAVY} if name in sys.modules], flush=True)"
    end = "os._exit(0)"  # to take the interpreter down takes as long as some imports
    words = [sys.executable, "-c", f"{code}\n{show}\n{end}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def loaded(code):
    """Return which of the heavy packages a fresh process has loaded after ``code``."""
    return output(code)[-1].split()[1:]


def test_the_package_itself_loads_nothing():
    assert loaded("import lightning_calibft; dir(lightning_calibft)") == []


def test_subpackages_are_attributes():
    code = "import sys, lightning_calibft as package; print('lightning_calibft.functional' in sys.modules)\n"
    assert run_python("-c", f"{code}print(package.functional.ausuc.__name__)").stdout.split() == ["False", "ausuc"]


LIGHT = ["functional", "metrics", "split", "labels.class_map", "labels.label_names"]


@pytest.fixture(scope="module")
def loaded_by_light():
    """Which of the heavy packages are loaded beside torch and torchmetrics after each light one, in this order."""
    code = f"""
import sys, torch, torchmetrics
from importlib import import_module
before = {{*sys.modules}}
found = {{}}
for name in {LIGHT}:
    import_module(f"lightning_calibft.{{name}}")
    found[name] = [heavy for heavy in {HEAVY} if heavy in sys.modules and heavy not in before]
print(found)
"""
    return ast.literal_eval(output(code)[-2])


@pytest.mark.parametrize("package", LIGHT)
def test_functions_and_metrics_load_torch_and_torchmetrics_alone(package, loaded_by_light):
    assert loaded_by_light[package] == []


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A calibrated state dict in each kind of file, and in a folder as transformers writes it."""
    folder = tmp_path_factory.mktemp("files")
    state = lightning_calibft.set_gamma(torch.nn.Linear(3, 5), 2.5, [0, 1]).state_dict()
    save_file(state, folder / "model.safetensors")
    (folder / "folder").mkdir()
    save_file(state, folder / "folder" / "model.safetensors")
    (folder / "folder" / "config.json").write_text("{}")
    torch.save(state, folder / "model.pth")
    torch.save({"state_dict": state}, folder / "model.ckpt")
    return folder


@pytest.mark.parametrize(
    ("words", "packages"),
    [
        (["--help"], []),
        (["--version"], []),
        (["inspect", "--help"], []),
        (["fold", "--help"], []),
        (["export", "--help"], []),
        (["calibrate", "--help"], []),
        (["inspect", "model.safetensors"], []),
        (["inspect", "folder", "--json"], []),
        (["inspect", "no.safetensors"], []),
        (["inspect", "model.pth"], ["torch"]),
        (["inspect", "model.ckpt", "--json"], ["torch"]),
    ],
)
def test_the_command_loads_what_it_needs(words, packages, files, monkeypatch):
    monkeypatch.chdir(files)
    run = f"""
from lightning_calibft.cli import main
try:
    main({words})
except SystemExit:
    pass
"""
    assert loaded(run) == packages


def test_what_the_command_lists_itself():
    """The names that the command has written down, so as not to load those who know them."""
    names = tuple(name for name in estimators.ESTIMATORS if not estimators.needs_absent_samples(name))
    assert names == options._ESTIMATORS
    assert set(options._INTERPOLATIONS) == set(transforms._str_to_pil_interpolation)
