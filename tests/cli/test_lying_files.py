"""Files that load safely and say of themselves what is not so: one line, nothing written, nothing run or fetched."""

from __future__ import annotations

import argparse
import json
import os
import resource
import stat
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file

from lightning_calibft import inspect_checkpoint, set_gamma
from lightning_calibft.checkpoint.files import write_weights
from tests.cli.running import READ, run
from tests.helpers.runs import quiet
from tests.shipping.consumer import NUM_CLASSES
from tests.shipping.fine_tuned import SEEN

pytestmark = quiet
ABSENT = [row for row in range(NUM_CLASSES) if row not in SEEN]
TRUE = {"gamma": 2.5, "num_classes": NUM_CLASSES, "seen_classes": SEEN, "absent_classes": ABSENT}


def state_dict(**entries):
    state = set_gamma(timm.create_model("test_resnet", num_classes=NUM_CLASSES), 2.5, SEEN).state_dict()
    state.update({f"fc.absent_class_calibration.{name}": value for name, value in entries.items()})
    return state


def refused(capsys, *words):
    """Run the command and return the one line that it ends with."""
    assert run(*words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("calibft: error: ")
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 1000
    return captured.err


class Boom:
    def __reduce__(self):
        return os.mkdir, (os.environ["EXPLOIT"],)


@pytest.mark.parametrize(
    "told",
    [
        {"model": "test_resnet", "model_args": {"checkpoint_path": "payload.bin"}},
        {"model": "test_resnet", "model_args": {"pretrained": True, "pretrained_cfg": {"file": "payload.bin"}}},
        {"model": "test_resnet", "model_args": {"pretrained_cfg_overlay": {"url": "http://127.0.0.1:1/x"}}},
        {"model": "test_resnet", "model_args": {"cache_dir": "elsewhere"}},
        {"model": "test_resnet", "model_args": {"in_chans": 10**12}},
        {"model": "test_resnet", "model_args": {"act_layer": "../x"}},
        {"model": "test_resnet", "model_args": {"global_pool": {"a": 1}}},
        {"model": "test_resnet", "model_args": [1]},
        {"model": "hf-hub:attacker/model"},
        {"model": "hf_hub:attacker/model"},
        {"model": "local-dir:folder"},
        {"model": "no_such_model"},
        {"model": "test_resnet.no_such_tag"},
        {"model": ["test_resnet"]},
        {"model": "test\x1b[2Jresnet"},
        {"model": "test_resnet", "model_args": {"global_pool": "nonsense"}},
        {"model": "test_resnet", "model_args": {"in_chans": 0}},
        {"model": "test_resnet", "model_args": {"output_stride": 5}},
        {"model": "test_vit", "model_args": {"img_size": 60_000, "patch_size": 1}},
        {"model": "test_vit", "model_args": {"patch_size": 0}},
        {"model": "test_resnet", "data_config": {"input_size": [3, 10**6, 10**6]}},
        {"model": "test_resnet", "data_config": {"input_size": [3, 32]}},
        {"model": "test_resnet", "data_config": {"mean": [float("nan")] * 3}},
        {"model": "test_resnet", "data_config": {"std": [0.5, 0.0, 0.5]}},
        {"model": "test_resnet", "data_config": {"crop_pct": 1e-9}},
        {"model": "test_resnet", "data_config": {"interpolation": ["bicubic"]}},
        {"model": "test_resnet", "data_config": {"file": "payload.bin"}},
        {"model": "test_resnet", "data_config": [1]},
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_a_file_says_of_its_model(told, suffix, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EXPLOIT", str(tmp_path / "exploited"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Boom()}, "payload.bin")
    (tmp_path / "folder").mkdir()
    config = {"architecture": "test_resnet", "num_classes": 6, "model_args": {"checkpoint_path": "payload.bin"}}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    write_weights(state_dict(), {**TRUE, **told}, f"lying{suffix}")
    before = sorted(os.listdir())
    assert "\x1b" not in refused(capsys, "export", f"lying{suffix}", "out.pth")
    assert sorted(os.listdir()) == before


def test_arguments_that_a_file_may_name(tmp_path, capsys):
    write_weights(state_dict(), {**TRUE, "model": "test_resnet", "model_args": {"drop_rate": 0.1}}, tmp_path / "a.pth")
    assert run("export", tmp_path / "a.pth", tmp_path / "out.pth") == 0
    write_weights(state_dict(), {**TRUE, "model": "test_resnet", "model_args": {"stem_width": 32}}, tmp_path / "b.pth")
    assert "pass all arguments of the model yourself, as `--model-kwargs`" in refused(
        capsys.readouterr() and capsys, "export", tmp_path / "b.pth", tmp_path / "out_b.pth"
    )


@pytest.mark.parametrize(
    "told",
    [
        {"model_kwargs": {"checkpoint_path": "payload.bin"}},
        {"model_kwargs": {"pretrained_cfg": {"file": "payload.bin"}}},
        {"model_kwargs": [1]},
        {"gp": "../x"},
        {"in_chans": 10**12},
        {"img_size": 10**9},
        {"img_size": "32"},
        {"input_size": [3, 10**9, 32]},
        {"mean": [float("inf")] * 3},
        {"std": "x"},
        {"crop_pct": 1e-300},
        {"interpolation": "magic"},
    ],
)
def test_what_the_arguments_of_a_training_script_say(told, raw, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EXPLOIT", str(tmp_path / "exploited"))
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Boom()}, "payload.bin")
    args = argparse.Namespace(model="test_resnet", **told)
    torch.save({"state_dict": torch.load(raw, weights_only=True), "args": args}, "lying.pth")
    torch.save({"state_dict": state_dict(), "args": args}, "lying_calibrated.pth")
    before = sorted(os.listdir())
    refused(capsys, "calibrate", "test_resnet", "lying.pth", photos, "out.pth", *READ)
    refused(capsys, "export", "lying_calibrated.pth", "out.pth")
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("model", ["hf-hub:attacker/model", ["test_resnet"], "no_such_model", 3, None])
def test_a_training_script_of_another_kind(model, raw, photos, tmp_path):
    """Its arguments mean other things, and say nothing of a timm model."""
    checkpoint = {"state_dict": torch.load(raw, weights_only=True), "arch": model, "img_size": -1}
    torch.save({**checkpoint, "args": {"model": model, "mean": "x"}}, tmp_path / "other.pth")
    assert run("calibrate", "test_resnet", tmp_path / "other.pth", photos, tmp_path / "out.pth", *READ) == 0


FOLDED = {**TRUE, "folded": True}


@pytest.mark.parametrize(
    "metadata",
    [
        {"folded": True},
        {**FOLDED, "gamma": "x"},
        {**FOLDED, "gamma": float("nan")},
        {**FOLDED, "gamma": True},
        {**FOLDED, "gamma": 10**400},
        {**FOLDED, "num_classes": 10**30},
        {**FOLDED, "absent_classes": 3},
        {**FOLDED, "absent_classes": [10**9]},
        {**FOLDED, "absent_classes": ["1"]},
        {**FOLDED, "seen_classes": [1, 1]},
        {**FOLDED, "standard_error": None},
        {**FOLDED, "standard_error": 10**400},
        {**FOLDED, "num_samples": 10**4000},
        {**FOLDED, "estimator": "x" * 10**6},
        {**FOLDED, "estimator": "alg\n  seen: all"},
        {**FOLDED, "version": ["1"]},
        {**FOLDED, "folded": "no"},
        *(
            {**FOLDED, "share_table": table}
            for table in (
                [0.5],
                {"absent_share": [0.1, 0.9]},
                {"absent_share": [0.1, 0.9], "gamma": [1.0]},
                {"absent_share": [0.1, 0.9], "gamma": [1.0, 10**400]},
                {"absent_share": [0.9, 0.1], "gamma": [1.0, 2.0]},
                {"absent_share": [0.1, 1.0], "gamma": [1.0, 2.0]},
                {"absent_share": [0.5], "gamma": [1.0]},
                {"absent_share": 0.5, "gamma": 1.0},
                {"absent_share": [0.1, 0.9], "gamma": [1.0, 2.0], "seen_accuracy": [0.5, 90.0]},
                {"absent_share": [0.1, 0.9], "gamma": [1.0, 2.0], "file": ["payload.bin", 1]},
                {"absent_share": [0.1, 0.9], "gamma": [1.0, None]},
            )
        ),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_metadata_that_cannot_be_true(metadata, suffix, tmp_path, capsys):
    path = tmp_path / f"lying{suffix}"
    write_weights(torch.nn.Linear(2, NUM_CLASSES).state_dict(), metadata, path)
    assert "lying" in refused(capsys, "inspect", path)
    refused(capsys, "export", path, tmp_path / "out.pth")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_metadata_say_nothing_that_the_weights_say(tmp_path):
    path = tmp_path / "lying.pth"
    write_weights(torch.nn.Linear(2, 3).state_dict(), {"calibrated": True, "heads": ["x"], "gamma": 5.0}, path)
    info = inspect_checkpoint(path)
    assert (info["calibrated"], info["heads"]) == (False, [])
    write_weights(state_dict(), {**TRUE, "gamma": 9.0, "num_classes": 500, "absent_classes": [0]}, path)
    assert run("fold", path, tmp_path / "folded.pth") == 0
    for name in ("lying.pth", "folded.pth"):
        info = inspect_checkpoint(tmp_path / name)
        assert (info["gamma"], info["num_classes"], info["absent_classes"]) == (2.5, NUM_CLASSES, ABSENT)


ENTRIES = {
    "nan": {"offset": torch.tensor(float("nan"))},
    "infinite": {"offset": torch.tensor(float("inf"))},
    "two_offsets": {"offset": torch.ones(2)},
    "two_dimensions": {"mask": torch.ones(2, NUM_CLASSES)},
    "no_classes": {"mask": torch.ones(0)},
    "another_mask": {"mask": torch.full((NUM_CLASSES,), 7.0)},
    "nan_mask": {"mask": torch.full((NUM_CLASSES,), float("nan"))},
    "complex": {"mask": torch.ones(NUM_CLASSES, dtype=torch.complex64)},
    "string_mask": {"mask": "ones"},
    "string_offset": {"offset": "1"},
    "expanded": {"mask": torch.ones(1).expand(10**10)},
    "without_values": {"mask": torch.ones(NUM_CLASSES, device="meta")},
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", ENTRIES)
def test_entries_that_cannot_be_true(kind, suffix, tmp_path, capsys):
    if suffix == ".safetensors" and kind in ("string_mask", "string_offset", "expanded", "without_values"):
        pytest.skip("cannot be in such a file")
    path = tmp_path / f"lying{suffix}"
    state = state_dict(**ENTRIES[kind])
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    for words in (["inspect", path], ["fold", path, tmp_path / "out.pth"]):
        assert "lying" in refused(capsys, *words)
    refused(capsys, "export", path, tmp_path / "out.pth", "--model", "test_resnet")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["offset", "mask"])
def test_one_entry_alone(name, tmp_path, capsys):
    state = state_dict()
    del state[f"fc.absent_class_calibration.{name}"]
    torch.save(state, tmp_path / "lying.pth")
    refused(capsys, "inspect", tmp_path / "lying.pth")
    refused(capsys, "fold", tmp_path / "lying.pth", tmp_path / "out.pth")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"gamma": 1, "gamma": 2}', "{", "\x00", "9" * 10_000, '"' + "\\"]
)
def test_json_that_cannot_be_read(text, tmp_path, capsys):
    save_file(torch.nn.Linear(2, 3).state_dict(), tmp_path / "a.safetensors", {"lightning_calibft": text})
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("a/extra/lightning_calibft.json", text)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(text)
    for name in ("a.safetensors", "a.pt2", "folder"):
        refused(capsys, "inspect", tmp_path / name)


def test_archives_that_unpack_to_gigabytes(tmp_path, capsys):
    torch.save({"w": torch.zeros(2**28, dtype=torch.uint8)}, tmp_path / "large.pth")
    with zipfile.ZipFile(tmp_path / "large.pth") as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with zipfile.ZipFile(tmp_path / "bomb.pt2", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("x/extra/lightning_calibft.json", b" " * 2**27 + b"{}")
    for name in ("bomb.pth", "bomb.pt2"):
        assert "unpack" in refused(capsys, "inspect", tmp_path / name)
    assert run("inspect", tmp_path / "large.pth") == 3  # of its true size


def test_tensors_that_repeat_what_is_stored(tmp_path, capsys):
    """A few bytes that stand for gigabytes, once they are copied."""
    state = state_dict()
    state["more"] = torch.zeros(1).expand(10**5, 10**5)
    torch.save(state, tmp_path / "lying.pth")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "lying.ckpt")
    for name in ("lying.pth", "lying.ckpt"):
        assert "its tensors take 37.3 GiB, many times what is stored" in refused(
            capsys, "fold", tmp_path / name, tmp_path / "out.safetensors"
        )
    state["more"] = torch.zeros(1).expand(1000, 1000)  # as an honest file may hold
    torch.save(state, tmp_path / "honest.pth")
    assert run("fold", tmp_path / "honest.pth", tmp_path / "out.safetensors") == 0


def test_a_huge_model_is_not_built(tmp_path, capsys):
    """The weights of a file do not fit, and building what it names would take 4 GiB to see that."""
    told = {"model": "test_vit", "model_args": {"img_size": 4096, "patch_size": 1}}
    state = set_gamma(timm.create_model("test_vit", num_classes=NUM_CLASSES), 2.5, SEEN, head="head").state_dict()
    write_weights(state, {**TRUE, **told}, tmp_path / "lying.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "but pos_embed has the shape" in refused(capsys, "export", tmp_path / "lying.pth", tmp_path / "out.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kilobytes


def test_a_name_without_end(tmp_path, capsys):
    save_file({"x" * 10**6: torch.ones(1), **state_dict()}, tmp_path / "lying.safetensors")
    assert run("export", tmp_path / "lying.safetensors", tmp_path / "o.pth", "--model", "test_resnet") == 1
    captured = capsys.readouterr().err
    assert "has unknown xxx" in captured
    assert len(captured) < 2100


def test_no_json_holds_nan(tmp_path, capsys):
    write_weights(state_dict(), {**TRUE, "standard_error": float("nan")}, tmp_path / "one_sample.pth")
    assert run("inspect", tmp_path / "one_sample.pth", "--json") == 0
    text = capsys.readouterr().out
    assert "NaN" not in text
    assert json.loads(text)["standard_error"] is None


def test_names_that_order_a_terminal_about(tmp_path, capsys):
    state = set_gamma(torch.nn.Linear(3, 5), 2.5, [0, 1]).state_dict()
    save_file({f"a\x1b[2J\nb.{key}": value for key, value in state.items()}, tmp_path / "lying.safetensors")
    assert run("inspect", tmp_path / "lying.safetensors") == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert r"\x1b[2J\nb" in text


@pytest.mark.parametrize("sharded", [False, True])
def test_a_config_does_not_hide_the_weights_beside_it(sharded, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    assert run("inspect", tmp_path) == 3
    state = state_dict()
    names = ["model-1.safetensors", "model-2.safetensors"] if sharded else ["model.safetensors"]
    for index, name in enumerate(names):
        save_file(dict(list(state.items())[index :: len(names)]), tmp_path / name)
    capsys.readouterr()
    assert run("inspect", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["absent_classes"] == ABSENT
    assert f"Name the file in it, such as '{tmp_path / names[0]}'" in refused(
        capsys, "fold", tmp_path, tmp_path / "o.pth"
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "last.ckpt"])
def test_a_config_does_not_hide_weights_of_another_name(name, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    torch.save(state_dict(), tmp_path / name)
    assert run("inspect", tmp_path) == 0
    assert "7 absent" in capsys.readouterr().out
    save_file(torch.nn.Linear(2, 3).state_dict(), tmp_path / "model.safetensors")  # which loaders prefer
    assert run("inspect", tmp_path) == 3


def test_two_calibrated_files_in_a_folder(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    for name in ("best", "last"):
        save_file(state_dict(), tmp_path / f"{name}.safetensors")
    assert "'fc.absent_class_calibration.mask' too. Inspect each file on its own" in refused(
        capsys, "inspect", tmp_path
    )


def test_a_part_of_a_checkpoint(raw, photos, tmp_path, capsys):
    """One part alone would make an incomplete model, and might hold no head."""
    first = tmp_path / "model-00001-of-00002.safetensors"
    save_file(state_dict(), first)
    torch.save(state_dict(), tmp_path / "pytorch_model-00001-of-00002.bin")
    for name in (first.name, "pytorch_model-00001-of-00002.bin"):
        for words in (
            ["fold", tmp_path / name, tmp_path / "out.pth"],
            ["export", tmp_path / name, tmp_path / "out.pth", "--model", "test_resnet"],
            ["calibrate", "test_resnet", tmp_path / name, photos, tmp_path / "out.pth", *READ],
        ):
            assert "is a part of one. Write it into one file first" in refused(capsys, *words)
    assert "is a directory. Write it into one file first" in refused(capsys, "fold", tmp_path, tmp_path / "out.pth")
    assert run("inspect", first) == 0
    first.rename(tmp_path / "model-00001-of-00001.safetensors")
    assert run("fold", tmp_path / "model-00001-of-00001.safetensors", tmp_path / "out.pth") == 0


@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "folder"])
def test_a_source_that_is_no_file(kind, raw, photos, tmp_path, capsys):
    source = tmp_path / "source.pth"
    if kind == "fifo":
        os.mkfifo(source)
    elif kind == "folder":
        source.mkdir()
    else:
        source.symlink_to("/dev/zero" if kind == "device" else source)
    calibrating = ["calibrate", "test_resnet", raw, photos, tmp_path / "out.pth", *READ]
    for words in (
        ["inspect", source],
        ["fold", source, tmp_path / "out.pth"],
        ["export", source, tmp_path / "out.pth", "--model", "test_resnet"],
        ["calibrate", "test_resnet", source, *calibrating[3:]],
        [*calibrating, "--pretrained", source],
        [*calibrating, "--class-map", source],
        [*calibrating, "--label-names", source],
    ):
        refused(capsys, *words)
    assert [each.name for each in tmp_path.iterdir()] == ["source.pth"]


def test_weights_in_a_folder_that_are_no_file(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")
    assert "is a device, a pipe or a socket" in refused(capsys, "inspect", tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"1": 1, "4": 4, "7": 7, "1": 2}', "{", "\x00", "9" * 10_000])
@pytest.mark.parametrize("option", ["--class-map", "--label-names"])
def test_class_maps_that_cannot_be_read(option, text, raw, photos, tmp_path, capsys):
    (tmp_path / "lying.json").write_text(text)
    words = ["calibrate", "test_resnet", raw, photos, tmp_path / "out.pth", *READ, option, tmp_path / "lying.json"]
    assert f"`{option}` to be a JSON file, but '{tmp_path}/lying.json' is not: " in refused(capsys, *words)


@pytest.mark.parametrize("kind", ["fifo", "link_to_fifo", "device"])
def test_a_destination_that_is_no_file(kind, best, raw, photos, tmp_path, capsys):
    target = tmp_path / "out.pth"
    real = tmp_path / "real" if kind == "link_to_fifo" else target
    if kind == "device":
        try:
            os.mknod(target, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("needs root")
    else:
        os.mkfifo(real)
    if real != target:
        target.symlink_to(real)
    mode, names = os.stat(target).st_mode, sorted(os.listdir(tmp_path))
    for words in (
        ["fold", best, target],
        ["export", best, target, "--model", "test_resnet"],
        ["calibrate", "test_resnet", raw, photos, target, *READ],
    ):
        assert "is a device, a pipe or a socket. It was left unchanged" in refused(capsys, *words)
    if kind != "device":  # opening one to read waits for a writer
        refused(capsys, "inspect", target)
    assert (os.stat(target).st_mode, sorted(os.listdir(tmp_path))) == (mode, names)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_new_files_have_the_modes_of_the_umask(umask, best, tmp_path):
    before = os.umask(umask)
    try:
        assert run("fold", best, tmp_path / "a.safetensors") == 0
        assert run("fold", best, tmp_path / "a.ckpt") == 0
        assert run("export", best, tmp_path / "folder", "--model", "test_resnet", "--img-size", "32") == 0
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path
