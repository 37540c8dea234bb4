"""The command finds gamma from files alone."""

from __future__ import annotations

import argparse
import copy
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
from torchvision.transforms.functional import to_pil_image

from lightning_calibft import (
    attach,
    calibrate,
    detach,
    fold,
    get_gamma,
    inspect_checkpoint,
    load_calibrated,
    set_gamma,
)
from lightning_calibft.functional import pseudo_absent_gamma
from tests.cli.running import READ, X, plain, run
from tests.helpers.runs import quiet
from tests.shipping.consumer import NUM_CLASSES, Classifier
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


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        ([1], [], "argument `data` to hold at least 2 classes, but got 1"),
        (range(NUM_CLASSES), [], "argument `data` to leave out at least one of the 10 classes"),
        (
            SEEN,
            ["--absent-classes", SEEN[0]],
            f"`data` and `--absent-classes` to share no class, but both hold {SEEN[0]}",
        ),
    ],
)
def test_the_seen_classes_are_the_folders(rows, options, text, raw, photos, tmp_path, capsys):
    for row in rows:
        shutil.copytree(photos / str(SEEN[0]), tmp_path / "data" / str(row))
    assert run("calibrate", "test_resnet", raw, tmp_path / "data", tmp_path / "out.pth", *READ, *options) == 1
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()


def test_weights_of_another_model(raw, photos, tmp_path, capsys):
    torch.save(timm.create_model("test_vit", num_classes=NUM_CLASSES).state_dict(), tmp_path / "vit.pth")
    words = ["calibrate", "test_resnet", raw, photos, tmp_path / "out.pth", *READ, "--estimator", "pseudo_absent"]
    assert run(*words, "--pretrained", tmp_path / "vit.pth") == 1
    assert "vit.pth' to hold the weights of timm's 'test_resnet', but it does not show for" in capsys.readouterr().err


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
        assert f"  meant for  a share of {share:.1%} of absent samples\n" in capsys.readouterr().out
        gammas.append(inspect_checkpoint(tmp_path / "out.pth")["gamma"])
    assert gammas[1] - gammas[0] == pytest.approx(math.log(0.4 / 0.6) - math.log(0.1 / 0.9), abs=1e-5)
    assert run(*words, "--absent-share", "10") == 1
    assert "`--absent-share` to be None or a number in (0, 1), but got 10.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a" * 300 + ".pth", "name too long"),
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


@pytest.fixture
def trained(raw, tmp_path):
    """A file of timm's training script: two kinds of weights, and its arguments."""
    state = torch.load(raw, weights_only=True)
    averaged = {key: value.clone() for key, value in state.items()}
    averaged["fc.bias"][SEEN] += 1
    args = argparse.Namespace(
        model="test_resnet", img_size=48, input_size=None, mean=(0.1, 0.2, 0.3), std=[0.4, 0.5, 0.6], crop_pct=0.8,
        interpolation="nearest", model_kwargs={"drop_rate": 0.1}, gp=None, in_chans=None,
    )  # fmt: skip
    kept = {"epoch": 3, "arch": "test_resnet", "args": args, "state_dict": state, "state_dict_ema": averaged}
    torch.save(kept, tmp_path / "model_best.pth.tar")
    return tmp_path / "model_best.pth.tar"


def test_the_weights_are_chosen(trained, photos, tmp_path, capsys):
    """The averaged bias of the seen classes is larger by 1, and so is gamma."""
    gammas = {}
    for choice in ("--ema", "--no-ema"):
        out = tmp_path / f"{choice}.pth"
        assert run("calibrate", "test_resnet", trained, photos, out, *READ, choice) == 0
        assert "warning" not in capsys.readouterr().err
        gammas[choice] = inspect_checkpoint(out)["gamma"]
    assert gammas["--ema"] == pytest.approx(gammas["--no-ema"] + 1, abs=1e-4)
    assert run("calibrate", "test_resnet", tmp_path / "--ema.pth", photos, tmp_path / "o.pth", *READ, "--ema") == 1
    assert "to hold averaged weights (EMA) because of the argument `--ema`, but it holds one" in capsys.readouterr().err


def test_the_file_names_the_model(trained, raw, photos, tmp_path, capsys):
    words = (photos, tmp_path / "auto.pth", *READ, "--ema")
    assert run("calibrate", "auto", trained, *words, "--estimator", "pseudo_absent", "--pretrained", raw) == 0
    assert inspect_checkpoint(tmp_path / "auto.pth")["model"] == "test_resnet"
    assert run("calibrate", "auto", raw, photos, tmp_path / "none.pth", *READ) == 1
    assert "argument `model` to name a timm model, because" in capsys.readouterr().err
    assert not (tmp_path / "none.pth").exists()


def test_both_kinds_of_weights_are_folded(tmp_path, capsys):
    model = set_gamma(timm.create_model("test_resnet", num_classes=NUM_CLASSES), 2.5, SEEN)
    averaged = set_gamma(timm.create_model("test_resnet", num_classes=NUM_CLASSES), 3.5, SEEN)
    raw_averaged = detach(copy.deepcopy(averaged)).state_dict()
    kept = {"state_dict": model.state_dict(), "state_dict_ema": averaged.state_dict()}
    torch.save(kept, tmp_path / "both.ckpt")
    torch.save({**kept, "state_dict_ema": raw_averaged}, tmp_path / "one.ckpt")
    for choice, expected in (("--ema", averaged), ("--no-ema", model)):
        assert run("fold", tmp_path / "both.ckpt", tmp_path / "folded.ckpt", choice) == 0
        folded = torch.load(tmp_path / "folded.ckpt", weights_only=True)
        for key, source in (("state_dict", model), ("state_dict_ema", averaged)):
            assert torch.equal(folded[key]["fc.bias"], fold(copy.deepcopy(source)).fc.bias)
        assert run("fold", tmp_path / "both.ckpt", tmp_path / "folded.pth", choice) == 0
        torch.testing.assert_close(plain(tmp_path / "folded.pth")(X), expected.eval()(X), rtol=0, atol=1e-5)
        assert run("inspect", tmp_path / "both.ckpt", choice, "--json") == 0
    capsys.readouterr()
    # Gamma is not looked for in other weights than the chosen ones.
    assert run("fold", tmp_path / "one.ckpt", tmp_path / "o.ckpt") == 1
    assert "holds no gamma in its 'state_dict_ema'" in capsys.readouterr().err
    assert run("inspect", tmp_path / "one.ckpt") == 3
    assert "holds 'state_dict_ema' and 'state_dict'. 'state_dict_ema' is used" in capsys.readouterr().err
    assert run("inspect", tmp_path / "one.ckpt", "--no-ema") == 0
    assert run("fold", tmp_path / "one.ckpt", tmp_path / "o.ckpt", "--no-ema") == 0
    assert torch.load(tmp_path / "o.ckpt")["state_dict_ema"]["fc.bias"].equal(raw_averaged["fc.bias"])


def test_a_lightning_file_with_other_weights_beside(best, expected, tmp_path, capsys):
    """Lightning loads ``state_dict``, which the callback has calibrated."""
    checkpoint = torch.load(best, weights_only=True)
    checkpoint["model_ema"] = {key: value + 1 for key, value in checkpoint["state_dict"].items() if "absent" not in key}
    torch.save(checkpoint, tmp_path / "more.ckpt")
    assert run("inspect", tmp_path / "more.ckpt") == 0
    assert "'state_dict' is used, as Lightning does" in capsys.readouterr().err
    torch.testing.assert_close(load_calibrated(Classifier, tmp_path / "more.ckpt")(X), expected)
    assert run("fold", tmp_path / "more.ckpt", tmp_path / "folded.ckpt") == 0
    torch.testing.assert_close(Classifier.load_from_checkpoint(tmp_path / "folded.ckpt").eval()(X), expected)


def test_what_a_file_says_of_its_images(trained, raw, photos, tmp_path, capsys):
    out = tmp_path / "out.pth"
    words = ["calibrate", "test_resnet", trained, photos, out, *READ, "--ema"]
    words = [word for word in words if word not in ("--img-size", "32")]
    assert run(*words) == 0
    told = {
        "input_size": [3, 48, 48], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.8,
        "interpolation": "nearest",
    }  # fmt: skip
    info = inspect_checkpoint(out)
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in info["data_config"].items()} == told
    assert info["model_args"] == {"drop_rate": 0.1}
    # The same gamma as with these values as options, and another one than without them.
    options = ["--img-size", "48", "--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6"]
    options += ["--crop-pct", "0.8", "--interpolation", "nearest"]
    state = torch.load(trained, weights_only=False)["state_dict_ema"]
    torch.save(state, tmp_path / "alone.pth")
    gammas = []
    for more in (options, ["--img-size", "48"]):
        assert run("calibrate", "test_resnet", tmp_path / "alone.pth", photos, tmp_path / "o.pth", *READ, *more) == 0
        gammas.append(inspect_checkpoint(tmp_path / "o.pth")["gamma"])
    assert info["gamma"] == gammas[0] != gammas[1]
    # An option wins.
    assert run(*words, "--std", "0.5", "--img-size", "32") == 0
    config = inspect_checkpoint(out)["data_config"]
    assert (list(config["std"]), list(config["input_size"])) == ([0.5] * 3, [3, 32, 32])
    # What is exported has them too, and knows its model.
    assert run("calibrate", "test_resnet", trained, photos, out, *READ, "--ema", "--img-size", "48") == 0
    assert run("export", out, tmp_path / "folder") == 0
    exported = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    config = resolve_model_data_config(exported)
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in config.items() if key in told} == told


def test_a_calibrated_file_of_the_training_script_names_its_model(trained, tmp_path):
    model = timm.create_model("test_resnet", num_classes=NUM_CLASSES)
    checkpoint = {**torch.load(trained, weights_only=False), "state_dict": set_gamma(model, 2.5, SEEN).state_dict()}
    torch.save(checkpoint, tmp_path / "calibrated.pth.tar")
    assert run("export", tmp_path / "calibrated.pth.tar", tmp_path / "out.pt2", "--no-ema") == 0
    x = torch.randn(2, 3, 48, 48)
    exported = torch.export.load(tmp_path / "out.pt2").module()
    torch.testing.assert_close(exported(x), model.eval()(x), rtol=0, atol=1e-5)


def test_another_model_than_the_file_says(trained, photos, tmp_path, capsys):
    assert run("calibrate", "test_resnet.r160_in1k", trained, photos, tmp_path / "out.pth", *READ, "--ema") == 0
    assert "warning" not in capsys.readouterr().err
    assert run("calibrate", "test_vit", trained, photos, tmp_path / "o.pth", *READ, "--ema") == 1
    assert "holds a 'test_resnet', as it says, but 'test_vit' is built." in capsys.readouterr().err


@pytest.fixture
def every_class(photos, tmp_path):
    """A folder with images of all classes."""
    root = tmp_path / "val"
    generator = torch.Generator().manual_seed(1)
    for row in range(NUM_CLASSES):
        (root / str(row)).mkdir(parents=True)
        for index in range(3):
            to_pil_image(torch.rand(3, 40, 48, generator=generator)).save(root / str(row) / f"{index}.png")
    return root


def test_whether_gamma_helps(raw, photos, every_class, tmp_path, capsys):
    out = tmp_path / "out.pth"
    words = ["calibrate", "test_resnet", raw, photos, out, *READ, "--val", every_class]
    words += ["--estimator", "fixed", "--estimator-kwargs"]
    assert run(*words, "gamma=50.0", "--json") == 0
    found = json.loads(capsys.readouterr().out)["validation"]
    assert found["num_samples"] == 3 * NUM_CLASSES
    model = plain(raw)
    dataset = ImageFolder(every_class, create_transform(**resolve_model_data_config(model, {"img_size": 32})))
    images, target = next(iter(torch.utils.data.DataLoader(dataset, 64)))
    seen = torch.isin(target, torch.tensor(SEEN))
    with torch.no_grad():
        logits = model(images)
    shift = 50 * (~torch.isin(torch.arange(NUM_CLASSES), torch.tensor(SEEN))).float()
    for name, gamma in (("without_gamma", 0), ("with_gamma", shift)):
        right = ((logits + gamma).argmax(1) == target).double()
        assert found[name]["acc_all"] == pytest.approx(right.mean().item())
        assert found[name]["acc_seen"] == pytest.approx(right[seen].mean().item())
        assert found[name]["acc_absent"] == pytest.approx(right[~seen].mean().item())
    assert found["with_gamma"]["acc_seen"] == 0  # so large a gamma lets no seen class win
    assert run(*words, "gamma=50.0") == 0
    assert f"accuracy on {3 * NUM_CLASSES} validation images, without gamma -> with gamma" in capsys.readouterr().out


def test_a_gamma_that_harms(raw, photos, every_class, tmp_path, capsys):
    state = torch.load(raw, weights_only=True)
    state["fc.weight"] *= 1e-3
    state["fc.bias"].zero_()
    state["fc.bias"][SEEN[0]], state["fc.bias"][0] = 1, 0.5  # the class of every image, or with a large gamma 0
    torch.save(state, tmp_path / "raw.pth")
    shutil.copy(every_class / "0" / "0.png", every_class / str(SEEN[0]) / "more.png")
    words = ["calibrate", "test_resnet", tmp_path / "raw.pth", photos, tmp_path / "out.pth", *READ]
    words += ["--val", every_class, "--estimator", "fixed", "--estimator-kwargs"]
    assert run(*words, "gamma=0.25") == 0
    captured = capsys.readouterr()
    assert "  all        12.9% -> 12.9%\n" in captured.out
    assert captured.err == ""
    assert run(*words, "gamma=50.0") == 0
    captured = capsys.readouterr()
    assert "  all        12.9% -> 9.7%\n" in captured.out
    assert "this gamma lowers the accuracy from 12.9% to 9.7%. Choose another `--estimator`" in captured.err


def test_validation_data_without_absent_classes(raw, photos, tmp_path, capsys):
    words = ["calibrate", "test_resnet", raw, photos, tmp_path / "out.pth", *READ, "--val", photos]
    assert run(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)["validation"]
    assert (found["with_gamma"]["acc_absent"], found["with_gamma"]["ausuc"]) == (None, None)
    assert run(*words) == 0
    captured = capsys.readouterr()
    assert "absent     no images -> no images" in captured.out
    assert captured.err == ""


def test_what_is_wrong_with_validation_data_is_told_first(raw, photos, every_class, tmp_path, capsys):
    (photos_without := tmp_path / "data").mkdir()
    for row in SEEN:
        (photos_without / str(row)).mkdir()
        (photos_without / str(row) / "0.png").write_bytes(b"no image")  # which reading it would tell
    words = ["calibrate", "test_resnet", raw, photos_without, tmp_path / "out.pth", *READ]
    (tmp_path / "rows.json").write_text(json.dumps(SEEN))
    (tmp_path / "empty" / "1").mkdir(parents=True)
    for row in range(3):  # as many folders as the map has rows
        shutil.copytree(every_class / str(row), tmp_path / "others" / str(row))
    other_folders = "because the validation data has other folders than the training data"
    for more, text in (
        (["--val", tmp_path / "others", "--class-map", tmp_path / "rows.json"], other_folders),
        (["--val", tmp_path / "missing"], "missing"),
        (["--val", tmp_path / "empty"], "no valid file"),
        (["--val", every_class, "--class-map", tmp_path / "rows.json"], "Expected argument `--class-map` to"),
    ):
        assert run(*words, *more) == 1
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
    assert run(*words) == 1
    assert "0.png" in capsys.readouterr().err


def test_a_validation_image_that_cannot_be_read(raw, photos, every_class, tmp_path, capsys):
    """Gamma does not depend on it, so the file is written."""
    (every_class / "0" / "0.png").write_bytes(b"no image")
    words = ["calibrate", "test_resnet", raw, photos, tmp_path / "out.pth", *READ, "--val", every_class]
    assert run(*words) == 1
    assert "0.png" in capsys.readouterr().err
    assert inspect_checkpoint(tmp_path / "out.pth")["calibrated"]


@pytest.mark.parametrize("name", ["weights", "link", "pretrained"])
def test_a_destination_that_is_read(name, raw, photos, tmp_path, capsys):
    weights, before = shutil.copy(raw, tmp_path / "weights.pth"), shutil.copy(raw, tmp_path / "before.pth")
    target = {"weights": weights, "link": tmp_path / "link.pth", "pretrained": before}[name]
    if name == "link":
        target.symlink_to(weights)
    content = target.read_bytes()
    words = ["calibrate", "test_resnet", weights, photos, target, *READ, "--pretrained", before]
    assert run(*words, "--estimator", "pseudo_absent") == 1
    assert "`destination` to differ from" in capsys.readouterr().err
    assert target.read_bytes() == content


def test_an_export_onto_its_source(best, tmp_path, capsys):
    source = shutil.copy(best, tmp_path / "best.pth")
    before = source.read_bytes()
    assert run("export", source, source, "--model", "test_resnet") == 1
    assert "to differ from `source`, but both are" in capsys.readouterr().err
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_fold_writes_no_graph(name, best, tmp_path, capsys):
    assert run("fold", best, tmp_path / name) == 1
    assert "with `export(model, ...)` or `calibft export`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text"), [("no/out.pth", "no '"), ("out.h5", "to end in one of"), ("a" * 300 + ".pth", "name too long")]
)
@pytest.mark.parametrize("command", ["fold", "export"])
def test_a_destination_is_checked_before_the_source(command, name, text, tmp_path, capsys):
    if (command, name) == ("fold", "out.h5"):
        pytest.skip("fold writes a state dict under any other name")
    assert run(command, "no_such_source", tmp_path / name) == 1
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fold", "export"])
def test_plain_weights_are_told_to_be_calibrated_with_the_command(command, raw, tmp_path, capsys):
    words = ["--model", "test_resnet"] if command == "export" else []
    assert run(command, raw, tmp_path / "out.pth", *words) == 1
    error = capsys.readouterr().err
    assert "with `calibft calibrate`" in error
    assert "load_from_checkpoint" not in error
    assert "Callback" not in error
    assert not list(tmp_path.iterdir())


def test_what_is_told_of_gamma(raw, photos, tmp_path, capsys):
    before, out = tmp_path / "before.pth", tmp_path / "out.pth"
    torch.manual_seed(3)
    torch.save(timm.create_model("test_resnet", num_classes=NUM_CLASSES).state_dict(), before)
    words = ["calibrate", "test_resnet", raw, photos, out, *READ]
    pseudo = ["--estimator", "pseudo_absent", "--pretrained", before, "--absent-share", "0.3"]
    assert run(*words, *pseudo) == 0
    capsys.readouterr()
    assert run("inspect", out) == 0
    text, info = capsys.readouterr().out, inspect_checkpoint(out)
    assert info["absent_share"] == 0.3
    assert f"{info['standard_error']:.4f} (sampling error only)\n" in text
    seen, absent = 100 * info["seen_change"], 100 * info["absent_change"]
    assert f"  expected change in accuracy: {seen:+.1f} points on seen samples, {absent:+.1f} on absent ones\n" in text
    side = "more" if info["gamma"] > 0 else "less"
    assert f"gamma pays if {side} than {info['break_even_share']:.1%} of the samples are of absent classes" in text
    assert "(it is for 30.0%)" in text


def test_a_negative_gamma_is_no_plain_success(raw, photos, tmp_path, capsys):
    words = ["calibrate", "test_resnet", raw, photos, tmp_path / "out.pth", *READ, "--estimator", "fixed"]
    assert run(*words, "--estimator-kwargs", "gamma=-1.0") == 0
    assert "  gamma is negative: the model predicts absent classes even less often" in capsys.readouterr().out
