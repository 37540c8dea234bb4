"""Another share of absent samples for what was shipped: as a fresh calibration at that share, in models and files."""

from __future__ import annotations

import copy
import json
import pickle
import stat
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from lightning_calibft import (
    calibrate,
    export,
    fold,
    fold_checkpoint,
    get_gamma,
    inspect_checkpoint,
    load_calibrated,
    set_absent_share,
    set_gamma,
)
from lightning_calibft.checkpoint.files import write_weights
from lightning_calibft.functional.share_table import ABSENT_SHARES
from tests.cli.running import X, run
from tests.helpers.runs import quiet
from tests.shipping.consumer import NUM_CLASSES, Classifier
from tests.shipping.fine_tuned import SEEN, train

pytestmark = quiet
SHARE = 0.07
IMAGES = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(2))
DATA = [(IMAGES, torch.tensor(SEEN).repeat(16))]
FRESH = {"alg": 1e-5, "pseudo_absent": 0.01}  # how far gamma may be from that of a fresh calibration


def network(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=NUM_CLASSES).eval()


def calibrated(estimator="alg", model=None, **options):
    model = model or network()
    pretrained = {"pretrained": network(1)} if estimator == "pseudo_absent" else {}
    return model, calibrate(model, DATA, SEEN, estimator=estimator, progress=False, **pretrained, **options)


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"))


def bits(state):
    """The entries of a state dict, but those of gamma, as bytes."""
    return {key: value.numpy().tobytes() for key, value in state.items() if "absent_class" not in key}


@pytest.mark.parametrize("estimator", FRESH)
def test_a_live_model(estimator):
    model, _ = calibrated(estimator)
    assert set_absent_share(model, SHARE) is None
    other, fresh = calibrated(estimator, absent_share=SHARE)
    assert get_gamma(model) == pytest.approx(fresh.gamma, abs=FRESH[estimator])
    folded = copy.deepcopy(model)
    for way in (lambda each: each, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        model = way(model)
        for share in (0.9, ABSENT_SHARES[20]):  # from any share to any other; and exactly at those of the table
            set_absent_share(model, torch.tensor(share, dtype=torch.float64))
    assert get_gamma(model) == pytest.approx(calibrated(estimator, absent_share=ABSENT_SHARES[20])[1].gamma, abs=1e-5)
    with torch.no_grad():
        folded = fold(folded)
        set_absent_share(folded, 0.5)
        set_absent_share(folded, SHARE)
        torch.testing.assert_close(folded(X), fold(other)(X), rtol=0, atol=2 * FRESH[estimator])


def test_what_is_told_changes_too(tmp_path):
    model, result = calibrated("pseudo_absent", absent_share=0.5)
    before = result.as_dict()
    set_absent_share(model, SHARE)
    assert result.as_dict() == before
    export(model, tmp_path / "model.safetensors")
    info, fresh = inspect_checkpoint(tmp_path / "model.safetensors"), calibrated("pseudo_absent", absent_share=SHARE)[1]
    assert info["absent_share"] == SHARE
    assert "standard_error" not in info
    assert info["verdict"] == fresh.verdict
    for key in ("gamma", "seen_change", "absent_change", "break_even_share"):
        assert info[key] == pytest.approx(getattr(fresh, key), abs=0.03)
    for key in ("estimator", "num_samples", "seen_classes", "absent_classes", "share_table"):
        assert info[key] == before[key]


@pytest.mark.parametrize(
    "kind", ["best.ckpt", "folded.ckpt", "folded.pth", "folded.safetensors", "raw.pth", "raw.safetensors"]
)
def test_files(kind, best, tmp_path):
    """All else in the file stays as it is, and the old file, too."""
    source, out = tmp_path / kind, tmp_path / f"out{Path(kind).suffix}"
    if kind == "best.ckpt":
        source = best
    elif kind.startswith("folded"):
        fold_checkpoint(best, source)
    else:
        model, result = calibrated()
        write_weights(model.state_dict(), result.as_dict(), source)
    content, before = source.read_bytes(), inspect_checkpoint(source)
    set_absent_share(source, SHARE, out)
    assert source.read_bytes() == content
    info = inspect_checkpoint(out)
    shift = torch.logit(torch.tensor(SHARE, dtype=torch.float64)) + torch.log(
        torch.tensor(len(SEEN) / (10 - len(SEEN)))
    )
    gamma = before["gamma"] + shift.item()
    assert info["gamma"] == pytest.approx(gamma, abs=1e-5)
    assert info["absent_share"] == SHARE
    assert (info["calibrated"], info["folded"], info["heads"]) == tuple(
        before[key] for key in ("calibrated", "folded", "heads")
    )
    if kind == "best.ckpt":
        one, other = (torch.load(path, weights_only=True) for path in (source, out))
        assert bits(one["state_dict"]) == bits(other["state_dict"])
        assert one.keys() == other.keys()
        assert str(one["optimizer_states"]) == str(other["optimizer_states"])
        assert get_gamma(load_calibrated(Classifier, out)) == pytest.approx(gamma, abs=1e-5)
    if kind == "folded.ckpt":
        logits = [Classifier.load_from_checkpoint(path).eval()(X) for path in (source, out)]
    elif kind.startswith("folded"):
        logits = [
            timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(path)).eval()(X)
            for path in (source, out)
        ]
    else:
        return
    expected = torch.zeros(10)
    expected[[row for row in range(10) if row not in SEEN]] = shift.float()
    torch.testing.assert_close(logits[1] - logits[0], expected.expand(2, -1), rtol=0, atol=1e-5)


def test_a_timm_folder(tmp_path):
    model, result = calibrated()
    export(model, tmp_path / "model", result=result)
    (tmp_path / "model" / "README.md").write_text("Mine.")
    (tmp_path / "model" / "config.json").chmod(stat.S_IRUSR)
    assert run("share", tmp_path / "model", "--absent-share", SHARE, tmp_path / "out") == 0
    set_absent_share(model, SHARE)
    logits = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(X)
    torch.testing.assert_close(logits, model(X), rtol=0, atol=1e-5)
    assert (tmp_path / "out" / "README.md").read_text() == "Mine."
    one, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "out"))
    assert one.pop("lightning_calibft")["gamma"] != other.pop("lightning_calibft")["gamma"]
    assert one == other


def test_a_transformers_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        num_labels=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32
    )
    model = transformers.ViTForImageClassification(config).eval()
    images = torch.randn(8, 3, 32, 32)
    batches = [{"pixel_values": images, "labels": torch.arange(8) % 3}]
    result = calibrate(model, batches, [0, 1, 2], progress=False)
    export(model, tmp_path / "model", result=result)
    set_absent_share(tmp_path / "model", SHARE, tmp_path / "out")
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    live = transformers.ViTForImageClassification.from_pretrained(tmp_path / "model").eval()
    set_absent_share(live, SHARE)  # its config says how it was folded
    set_absent_share(model, SHARE)
    with torch.no_grad():
        expected = model(images).logits
        torch.testing.assert_close(loaded(images).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(live(images).logits, expected, rtol=0, atol=1e-5)
    live.save_pretrained(tmp_path / "again")
    assert inspect_checkpoint(tmp_path / "again")["absent_share"] == SHARE


@pytest.mark.parametrize("share", [0, 1, 1.5, -0.1, float("nan"), 0.0005])
def test_shares_that_are_refused(share):
    model, result = calibrated()
    with pytest.raises(ValueError, match="`absent_share` to be"):
        set_absent_share(model, share)
    assert get_gamma(model) == pytest.approx(result.gamma)


@pytest.mark.parametrize("share", [None, "0.1", True, torch.ones(2)])
def test_what_is_no_share(share):
    with pytest.raises(TypeError, match="`absent_share` to be a number"):
        set_absent_share(calibrated()[0], share)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (network, "a calibrated model, but got one without gamma"),
        (lambda: calibrated("fixed", estimator_kwargs={"gamma": 1.0})[0], "the estimator 'fixed', which knows none"),
        (lambda: set_gamma(network(), 2.0, SEEN), "does not say how its gamma was found. Calibrate it again"),
        (lambda: set_gamma(calibrated()[0], 2.0, SEEN), "does not say how its gamma was found"),
        (lambda: fold(set_gamma(network(), 2.0, SEEN)), "does not say how its gamma was found"),
        (lambda: with_other_weights(calibrated()[0]), "does not say how its gamma was found"),
    ],
)
def test_models_that_know_no_other_share(make, text):
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=text):
        set_absent_share(model, SHARE)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def with_other_weights(model):
    """Load the gamma of another run, of which the model knows nothing."""
    model.load_state_dict(set_gamma(network(), 2.5, SEEN).state_dict())
    return model


def test_files_that_are_refused(best, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    torch.save(network().state_dict(), tmp_path / "raw.pth")
    model, result = calibrated()
    old = {key: value for key, value in result.as_dict().items() if key != "share_table"}
    write_weights(model.state_dict(), old, tmp_path / "old.pth")
    write_weights(model.state_dict(), {**result.as_dict(), "gamma": 9.0}, tmp_path / "changed.pth")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    twice = nn.ModuleDict({"fc": nn.Linear(4, 10), "auxiliary": nn.Linear(4, 10)}).state_dict()
    write_weights(twice, {**result.as_dict(), "folded": True}, tmp_path / "twice.pth")
    no_bias = nn.ModuleDict({"fc": nn.Linear(4, 10, bias=False)}).state_dict()
    write_weights(no_bias, {**result.as_dict(), "folded": True}, tmp_path / "no_bias.pth")
    (tmp_path / "graph.onnx").write_bytes(b"")
    present = sorted(tmp_path.iterdir())
    for source, out, text in (
        (tmp_path / "missing.ckpt", "out.ckpt", "does not exist"),
        (tmp_path / "raw.pth", "out.pth", "does not say how its gamma was found"),
        (tmp_path / "old.pth", "out.pth", "by an older release, which knows none"),
        (tmp_path / "changed.pth", "out.pth", "but it has others. Calibrate it again"),
        (tmp_path / "twice.pth", "out.pth", "but got ['fc', 'auxiliary']. Change the share in the file"),
        (tmp_path / "no_bias.pth", "out.pth", "but got []. Change the share in the file"),
        (tmp_path / "graph.onnx", "out.onnx", "holds the code of the model too"),
        (tmp_path / "a", "out", "is a directory"),
        (best, "out.pth", "to end in '.ckpt'"),
        (best, best, "both are"),
        (best, "none/out.ckpt", "there is no"),
    ):
        assert run("share", source, "--absent-share", SHARE, tmp_path / out) == 1
        captured = capsys.readouterr()
        assert text in captured.err
        assert captured.err.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == present
    export(model, tmp_path / "folder", result=result)
    for out, text in (
        ("b/../folder/inside", "to be outside"),
        ("folder", "both are"),
        ("raw.pth", "to be a new folder"),
    ):
        assert run("share", tmp_path / "folder", "--absent-share", SHARE, tmp_path / out) == 1
        assert text in capsys.readouterr().err
    with pytest.raises(ValueError, match="`destination` to name the file to write"):
        set_absent_share(best, SHARE)
    with pytest.raises(ValueError, match="`destination` to be None for a model"):
        set_absent_share(model, SHARE, tmp_path / "out.pth")
    with pytest.raises(TypeError, match="`model_or_path` to be a path"):
        set_absent_share(3, SHARE, tmp_path / "out.pth")
    assert sorted(tmp_path.iterdir()) == sorted([*present, tmp_path / "folder"])


def test_the_command(best, tmp_path, capsys):
    assert run("share", best, "--absent-share", "0.05", tmp_path / "out.ckpt", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == inspect_checkpoint(tmp_path / "out.ckpt")
    assert (told["absent_share"], told["verdict"]) == (0.05, "cannot be told")
    assert run("share", best, "--absent-share", "5", tmp_path / "again.ckpt") == 1
    assert "`--absent-share` to be None or a number in (0, 1)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("share", best, tmp_path / "again.ckpt")


def test_all_weights_of_a_file(tmp_path):
    """Those of an average have the same gamma, and get the same."""
    model, result = calibrated()
    states = {"state_dict": model.state_dict(), "state_dict_ema": copy.deepcopy(model.state_dict()), "epoch": 3}
    torch.save({**states, "lightning_calibft": result.as_dict()}, tmp_path / "both.pth")
    set_absent_share(tmp_path / "both.pth", SHARE, tmp_path / "out.pth")
    gammas = [inspect_checkpoint(tmp_path / "out.pth", use_ema=use_ema)["gamma"] for use_ema in (False, True)]
    assert gammas[0] == gammas[1] != pytest.approx(result.gamma)
