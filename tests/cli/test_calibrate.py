"""The command finds gamma from files alone."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torchvision.datasets import ImageFolder

from lightning_calibft import attach, calibrate, get_gamma, inspect_checkpoint
from lightning_calibft.functional import pseudo_absent_gamma
from tests.cli.running import READ, X, plain, run
from tests.helpers.runs import quiet
from tests.shipping.consumer import NUM_CLASSES
from tests.shipping.fine_tuned import SEEN

pytestmark = quiet


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_calibrate(suffix, raw, photos, tmp_path, capsys):
    calibrated = tmp_path / f"calibrated{suffix}"
    assert run("calibrate", "test_resnet", raw, photos, calibrated, *READ, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    model = plain(raw)
    config = resolve_model_data_config(model, {"img_size": 32})
    loader = torch.utils.data.DataLoader(ImageFolder(photos, create_transform(**config)), 64)
    result = calibrate(model, [(x, torch.tensor(SEEN)[y]) for x, y in loader], progress=False)
    assert info["gamma"] == pytest.approx(result.gamma, rel=1e-5)
    assert (info["seen_classes"], info["num_samples"]) == (SEEN, 15)
    assert (info["model"], info["calibrated"], info["folded"]) == ("test_resnet", True, False)
    # The file loads into an attached model, and goes on to `fold` and `export`, which now know the model.
    assert run("fold", calibrated, tmp_path / "folded.pth") == 0
    assert run("export", calibrated, tmp_path / "exported.pth") == 0
    for name in ("folded.pth", "exported.pth"):
        torch.testing.assert_close(plain(tmp_path / name)(X), model(X), rtol=0, atol=1e-5)
    if suffix == ".pth":
        attached = attach(timm.create_model("test_resnet", num_classes=NUM_CLASSES))
        attached.load_state_dict(torch.load(calibrated, weights_only=True))
        assert get_gamma(attached) == info["gamma"]


def test_calibrate_again_and_what_is_folded(raw, photos, best, tmp_path, capsys):
    """A calibrated file is raw weights with a gamma that is found anew; a folded one is refused."""
    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    assert run("calibrate", "test_resnet", raw, photos, first, *READ) == 0
    assert run("calibrate", "test_resnet", first, photos, second, *READ) == 0
    assert inspect_checkpoint(second)["gamma"] == inspect_checkpoint(first)["gamma"]
    assert run("fold", first, tmp_path / "folded.pth") == 0
    assert run("calibrate", "test_resnet", tmp_path / "folded.pth", photos, tmp_path / "third.pth", *READ) == 1
    assert "Calibrating these weights would count it" in capsys.readouterr().err
    assert run("calibrate", "test_resnet", best, photos, tmp_path / "of_lightning.pth", *READ) == 0


def test_class_maps(raw, photos, tmp_path, capsys):
    """However the folders are told to belong to rows, gamma is the same."""
    folders = tmp_path / "photos"
    shutil.copytree(photos, folders)
    for row, name in zip(SEEN, "cab", strict=True):  # not in the order of the rows
        (folders / str(row)).rename(folders / name)
    names = list("0123456789")
    for row, name in zip(SEEN, "cab", strict=True):
        names[row] = name
    (tmp_path / "names.txt").write_text("\n".join(names))
    (tmp_path / "rows.json").write_text(json.dumps([4, 7, 1]))
    (tmp_path / "by_name.json").write_text(json.dumps(dict(zip("cab", SEEN, strict=True))))
    out = tmp_path / "out.pth"
    assert run("calibrate", "test_resnet", raw, photos, out, *READ) == 0
    gamma = inspect_checkpoint(out)["gamma"]
    maps = [
        ["--label-names", tmp_path / "names.txt"],
        ["--class-map", tmp_path / "rows.json"],
        ["--class-map", tmp_path / "by_name.json"],
    ]
    for words in maps:
        out.unlink()
        assert run("calibrate", "test_resnet", raw, folders, out, *READ, *words) == 0
        assert inspect_checkpoint(out)["gamma"] == pytest.approx(gamma, rel=1e-5)
    out.unlink()
    assert run("calibrate", "test_resnet", raw, folders, out, *READ) == 1
    assert "--class-map" in capsys.readouterr().err
    (tmp_path / "by_name.json").write_text('{"a": 4, "b": 7}')
    assert run("calibrate", "test_resnet", raw, folders, out, *READ, *maps[2]) == 1
    assert "to name every folder, but it does not name c" in capsys.readouterr().err
    assert not out.exists()


def test_wordnet_folders_of_an_imagenet_head(photos, tmp_path):
    folders, weights = tmp_path / "photos", tmp_path / "raw.pth"
    shutil.copytree(photos, folders)
    synsets = timm.data.ImageNetInfo().label_names()
    for old, row in zip(SEEN, (0, 217, 482), strict=True):
        (folders / str(old)).rename(folders / synsets[row])
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    assert run("calibrate", "test_resnet", weights, folders, tmp_path / "out.pth", *READ) == 0
    assert inspect_checkpoint(tmp_path / "out.pth")["seen_classes"] == [0, 217, 482]


def test_the_progress_bar_is_not_on_stdout(raw, photos, tmp_path, capsys):
    words = ["calibrate", "test_resnet", raw, photos, tmp_path / "out.pth", *READ, "--json"]
    assert run(*words) == 0
    assert "Calibrating" not in capsys.readouterr().err
    assert run(*[word for word in words if word != "--no-progress"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["calibrated"]
    assert "Calibrating" in captured.err


def test_interrupted(raw, photos, tmp_path):
    many = tmp_path / "photos"
    for row in SEEN:
        (many / str(row)).mkdir(parents=True)
        for index in range(400):
            shutil.copy(photos / str(row) / "0.png", many / str(row) / f"{index}.png")
    words = ["calibrate", "test_resnet", raw, many, tmp_path / "out.pth", "--num-workers", "0", "--batch-size", "1"]
    command = [sys.executable, "-m", "lightning_calibft.cli", *map(str, words), "--device", "cpu"]
    # Where the suite runs in the background of a shell, SIGINT is ignored from the start, and by what it starts.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, handler)
    with process:
        met = b""
        while b"Calibrating" not in met:
            met += process.stderr.read1()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert b"Traceback" not in rest
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("change", [{"num_classes": 3}, {"data": "no_such_folder"}, {"model": "no_such_model"}])
def test_arguments_that_do_not_fit(change, raw, photos, tmp_path, capsys):
    words = [change.get("model", "test_resnet"), raw, change.get("data", photos), tmp_path / "out.pth", *READ]
    words += ["--num-classes", change["num_classes"]] if "num_classes" in change else []
    assert run("calibrate", *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("calibft: error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_class_map_of_other_folders(raw, photos, tmp_path, capsys):
    (tmp_path / "rows.json").write_text("[1, 4, 7, 8]")
    words = ["calibrate", "test_resnet", raw, photos, tmp_path / "out.pth", *READ]
    assert run(*words, "--class-map", tmp_path / "rows.json") == 1
    assert "`--class-map` to give the row of 3 folders, but got 4 rows" in capsys.readouterr().err


def test_arguments_of_the_model(photos, tmp_path):
    """A file remembers what its model was built with."""
    model = timm.create_model("test_vit", num_classes=NUM_CLASSES, img_size=32)
    torch.save(model.state_dict(), tmp_path / "raw.pth")
    words = ["calibrate", "test_vit", tmp_path / "raw.pth", photos, tmp_path / "calibrated.pth", *READ]
    assert run(*words) == 1
    assert run(*words, "--model-kwargs", "img_size=32") == 0
    assert run("export", tmp_path / "calibrated.pth", tmp_path / "folder") == 0
    exported = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    assert exported(X).shape == (2, NUM_CLASSES)
    assert run("export", tmp_path / "calibrated.pth", tmp_path / "model.pt2", "--img-size", "32") == 0
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(X), exported(X))


def test_the_weights_from_before_fine_tuning(raw, photos, tmp_path, capsys):
    before = timm.create_model("test_resnet", num_classes=NUM_CLASSES)
    torch.save(before.state_dict(), tmp_path / "before.pth")
    out, words = tmp_path / "out.pth", ["calibrate", "test_resnet", raw, photos, tmp_path / "out.pth", *READ]
    assert run(*words, "--estimator", "pseudo_absent") == 1
    assert "`--pretrained` to be the model before fine-tuning" in capsys.readouterr().err
    assert run(*words, "--estimator", "pseudo_absent", "--pretrained", tmp_path / "before.pth") == 0
    model = plain(raw)
    dataset = ImageFolder(photos, create_transform(**resolve_model_data_config(model, {"img_size": 32})))
    images, target = next(iter(torch.utils.data.DataLoader(dataset, 64)))
    with torch.no_grad():
        gamma = pseudo_absent_gamma(model(images), torch.tensor(SEEN)[target], before.eval()(images), SEEN).gamma
    assert inspect_checkpoint(out)["gamma"] == pytest.approx(gamma.item(), rel=1e-4)
    assert inspect_checkpoint(out)["estimator"] == "pseudo_absent"


def test_another_estimator_and_its_arguments(raw, photos, tmp_path, capsys):
    words = ["calibrate", "test_resnet", raw, photos, tmp_path / "out.pth", *READ, "--estimator", "fixed"]
    assert run(*words, "--estimator-kwargs", "gamma=1e999") == 1
    assert "`gamma` to be finite, but got inf" in capsys.readouterr().err
    assert run(*words, "--estimator-kwargs", "g=0.5") == 1
    assert "`--estimator-kwargs` to hold 'gamma' for the estimator 'fixed'" in capsys.readouterr().err
    assert run(*words, "--estimator-kwargs", "gamma=0.5") == 0
    assert inspect_checkpoint(tmp_path / "out.pth")["gamma"] == 0.5


def test_a_told_share(raw, photos, tmp_path, capsys):
    words = ["calibrate", "test_resnet", raw, photos, tmp_path / "out.pth", *READ]
    gammas = []
    for share in (0.1, 0.4):
        assert run(*words, "--absent-share", share) == 0
        gammas.append(inspect_checkpoint(tmp_path / "out.pth")["gamma"])
    assert gammas[1] - gammas[0] == pytest.approx(math.log(0.4 / 0.6) - math.log(0.1 / 0.9), abs=1e-5)
    assert run(*words, "--absent-share", "10") == 1
    assert "`--absent-share` to be None or a number in (0, 1), but got 10.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_such_folder/out.pth", "`destination` to be in an existing directory, but there is no"),
        ("out.h5", "`destination` to end in one of .pth, .pt, .bin, .safetensors, but got"),
        ("photos", "`destination` to end in"),
    ],
)
def test_a_destination_is_checked_before_anything_is_read(name, text, tmp_path, capsys):
    assert run("calibrate", "test_resnet", "no_such_weights", "no_such_data", tmp_path / name, *READ) == 1
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_mistyped_or_another(raw, photos, tmp_path, capsys):
    words = [raw, photos, tmp_path / "out.pth", *READ]
    assert run("calibrate", "test_resnot", *words) == 1
    assert "a timm model, but got 'test_resnot'. Did you mean 'test_resnet'" in capsys.readouterr().err
    assert run("calibrate", "resnet18", *words) == 1
    error = capsys.readouterr().err
    assert "to hold the weights of timm's 'resnet18', but it is missing " in error
    assert len(error) < 600
    state = torch.load(raw, weights_only=True)
    state["conv1.0.weight"] = state["conv1.0.weight"][:1]
    torch.save(state, tmp_path / "narrow.pth")
    assert run("calibrate", "test_resnet", tmp_path / "narrow.pth", *words[1:]) == 1
    assert "but conv1.0.weight has the shape (1, " in capsys.readouterr().err


def test_a_file_with_averaged_weights(raw, photos, tmp_path, capsys):
    state = torch.load(raw, weights_only=True)
    torch.save({"state_dict": state, "state_dict_ema": state}, tmp_path / "both.pth")
    assert run("calibrate", "test_resnet", tmp_path / "both.pth", photos, tmp_path / "out.pth", *READ) == 0
    assert "holds 'state_dict_ema' and 'state_dict'. 'state_dict_ema' is used, as timm does." in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fold", "export"])
def test_plain_weights_are_told_to_be_calibrated_with_the_command(command, raw, tmp_path, capsys):
    words = ["--model", "test_resnet"] if command == "export" else []
    assert run(command, raw, tmp_path / "out.pth", *words) == 1
    error = capsys.readouterr().err
    assert "with `calibft calibrate`" in error
    assert "load_from_checkpoint" not in error
    assert "Callback" not in error
    assert not list(tmp_path.iterdir())
