"""The command on real files: what it writes, what it prints, and its exit status."""

from __future__ import annotations

import json
from importlib.metadata import entry_points

import pytest
import timm
import torch

from lightning_calibft import inspect_checkpoint
from lightning_calibft.cli import main
from tests.cli.running import X, plain, run
from tests.helpers.runs import quiet
from tests.shipping.consumer import NUM_CLASSES, Classifier

pytestmark = quiet


def test_the_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="calibft")
    assert command.load() is main


def test_inspect(best, raw, tmp_path, capsys):
    info = inspect_checkpoint(best)
    assert run("inspect", best) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{best}: calibrated\n")
    assert f"{info['gamma']:.4f} ± {info['standard_error']:.4f}" in text
    assert "alg from 48 samples" in text
    assert "10: 3 seen, 7 absent" in text
    assert "seen       1, 4, 7\n" in text
    assert "model.fc" in text
    assert f"torch {torch.__version__}" in text
    assert run("inspect", best, "--json") == 0
    assert json.loads(capsys.readouterr().out) == info
    assert run("inspect", raw) == 3
    assert capsys.readouterr().out == f"{raw}: not calibrated\n"
    assert run("inspect", raw, "--json") == 3
    assert json.loads(capsys.readouterr().out) == {"calibrated": False, "folded": False, "heads": []}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_from_training_to_plain_timm(suffix, best, expected, tmp_path, capsys):
    folded = tmp_path / f"model{suffix}"
    assert run("fold", best, folded) == 0
    assert capsys.readouterr().out.startswith(f"{folded}: calibrated, gamma is folded into the bias\n  gamma")
    torch.testing.assert_close(plain(folded)(X), expected, rtol=0, atol=1e-6)
    assert run("inspect", folded) == 0
    assert run("fold", folded, tmp_path / "again.pth") == 1
    assert "gamma is already folded into the bias" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [folded.name]


def test_fold_a_whole_checkpoint(best, expected, tmp_path):
    assert run("fold", best, tmp_path / "folded.ckpt") == 0
    model = Classifier.load_from_checkpoint(tmp_path / "folded.ckpt").eval()
    torch.testing.assert_close(model(X), expected)
    assert run("fold", best, tmp_path / "b.ckpt", "--prefix", "model.") == 1


def test_fold_with_a_prefix(best, expected, tmp_path, capsys):
    state = torch.load(best, weights_only=True)
    state["state_dict"]["criterion.weight"] = torch.ones(NUM_CLASSES)  # so not all keys begin with "model."
    torch.save(state, tmp_path / "more.ckpt")
    assert run("fold", tmp_path / "more.ckpt", tmp_path / "whole.pth") == 0
    assert "model.fc.bias" in torch.load(tmp_path / "whole.pth", weights_only=True)
    assert run("fold", tmp_path / "more.ckpt", tmp_path / "model.pth", "--prefix", "model.") == 0
    torch.testing.assert_close(plain(tmp_path / "model.pth")(X), expected, rtol=0, atol=1e-6)
    assert run("fold", tmp_path / "more.ckpt", tmp_path / "no.pth", "--prefix", "net.") == 1
    assert "`--prefix` to begin the keys of the weights, but got 'net.'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model.pt2", "model.onnx", "folder"])
def test_export(name, best, expected, tmp_path, capsys):
    assert run("export", best, tmp_path / name, "--model", "test_resnet", "--img-size", "32", "--json") == 0
    assert json.loads(capsys.readouterr().out)["folded"]
    assert run("inspect", tmp_path / name) == 0
    path = str(tmp_path / name)
    if name == "folder":
        logits = timm.create_model(f"local-dir:{path}", pretrained=True).eval()(X)
    elif name.endswith("pt2"):
        logits = torch.export.load(path).module()(X)
    elif name.endswith("onnx"):
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        logits = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])
    else:
        logits = plain(path)(X)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_export_needs_the_name_of_the_model(best, tmp_path, capsys):
    assert run("export", best, tmp_path / "model.pth") == 1
    assert "`--model` to name a timm model" in capsys.readouterr().err
    assert run("export", best, tmp_path / "model.pth", "--model", "test_vit") == 1
    assert "to hold the weights of timm's 'test_vit', but it is missing cls_token, " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [[], ["unknown"], ["fold", "a.ckpt"], ["calibrate", "m", "w", "d", "o", "--estimator", "nonsense"]],
)
def test_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as raised:
        run(*words)
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: calibft")
    if "nonsense" in words:
        assert "(choose from" in error
        assert "alg" in error


def test_help(capsys):
    for words in ([], ["inspect"], ["fold"], ["export"], ["calibrate"]):
        with pytest.raises(SystemExit) as raised:
            run(*words, "--help")
        assert raised.value.code == 0
        assert "exit status" in capsys.readouterr().out
