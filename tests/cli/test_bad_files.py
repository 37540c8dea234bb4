"""The command refuses what it cannot read or write, in one line, and leaves everything as it was."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import textwrap

import pytest
import torch

from tests.cli.running import READ, run
from tests.helpers.processes import run_python
from tests.helpers.runs import quiet

pytestmark = quiet


class Exploit:
    def __reduce__(self):
        return os.mkdir, (os.environ["EXPLOIT"],)


def bad_file(kind, best, path):
    """Write a file that is not what it claims to be."""
    huge = (2**62).to_bytes(8, "little")
    content = {
        "truncated.ckpt": best.read_bytes()[:5000],
        "text.pth": b"hello, this is no checkpoint\n",
        "empty.safetensors": b"",
        "huge_header.safetensors": huge + b"{}",
        "long_header.safetensors": (10**6).to_bytes(8, "little") + b'{"a": {}}',
        "no_json.safetensors": (4).to_bytes(8, "little") + b"hell" + bytes(99),
        "offsets.safetensors": (61).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[9999],"data_offsets":[0,39996]}}',
        "pickle.pth": pickle.dumps(Exploit()) if "EXPLOIT" in os.environ else b"",
        "damaged.pt2": b"hello",
        "damaged.onnx": b"hello",
    }
    if kind == "malicious.ckpt":
        torch.save({**torch.load(best, weights_only=True), "extra": Exploit()}, path)
    elif kind in content:
        path.write_bytes(content[kind])
    elif kind == "folder.ckpt":
        path.mkdir()
    return path


KINDS = [
    "missing.ckpt", "folder.ckpt", "truncated.ckpt", "text.pth", "pickle.pth", "malicious.ckpt", "empty.safetensors",
    "huge_header.safetensors", "long_header.safetensors", "no_json.safetensors", "offsets.safetensors", "damaged.pt2",
    "damaged.onnx",
]  # fmt: skip


@pytest.mark.parametrize("command", ["inspect", "fold", "export", "calibrate"])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_files_are_refused_in_one_line(kind, command, best, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EXPLOIT", str(tmp_path / "exploited"))
    bad, out = bad_file(kind, best, tmp_path / kind), tmp_path / "out.pth"
    out.write_bytes(b"precious")
    words = {
        "inspect": [bad],
        "fold": [bad, out],
        "export": [bad, out, "--model", "test_resnet"],
        "calibrate": ["test_resnet", bad, photos, out, *READ],
    }
    assert run(command, *words[command]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("calibft: error: Expected ")
    assert captured.err.count("\n") == 1
    assert kind in captured.err
    assert out.read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} <= {kind, "out.pth"}


def test_trusted_files(best, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EXPLOIT", str(tmp_path / "exploited"))
    bad_file("malicious.ckpt", best, tmp_path / "objects.ckpt")
    assert run("inspect", tmp_path / "objects.ckpt") == 1
    assert "--unsafe" in capsys.readouterr().err
    assert run("inspect", tmp_path / "objects.ckpt", "--unsafe") == 0
    assert (tmp_path / "exploited").exists()  # this is what the option allows


def test_a_file_of_a_pickled_module(tmp_path, capsys):
    torch.save(torch.nn.Linear(3, 4), tmp_path / "module.pth")
    assert run("inspect", tmp_path / "module.pth") == 1
    assert "holds other Python objects" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "fold", "export", "share", "calibrate"])
def test_arguments_are_named_as_they_are_written(command, photos, tmp_path, capsys):
    """In what is told of a file that holds objects, of one with two kinds of weights, and of one that is replaced."""
    torch.save(torch.nn.Linear(3, 4), objects := tmp_path / "objects.pth")
    weights = torch.nn.Linear(3, 4).state_dict()
    torch.save({"state_dict": weights, "state_dict_ema": weights}, both := tmp_path / "both.pth")
    with pytest.raises(SystemExit):
        run(command, "--help")
    known = capsys.readouterr().out
    out = tmp_path / "out.pth"
    of_share = ["--absent-share", "0.5"]
    cases = [(objects, out, "pass `--unsafe`")]
    if command != "share":  # which changes both kinds
        cases.append((both, out, "with `--ema` or `--no-ema`"))
    if command != "inspect":
        differs = {"calibrate": "weights"}.get(command, "source")
        cases.append((objects, objects, f"`destination` to differ from `{differs}`"))
    for file, target, text in cases:
        words = {"inspect": [file], "share": [file, target, *of_share], "calibrate": ["auto", file, photos, target]}
        assert run(command, *words.get(command, [file, target])) in (1, 3)
        told = capsys.readouterr().err
        assert text in told
        assert {*re.findall("`(--[a-z-]+)`", told)} <= {*re.findall("--[a-z-]+", known)}
        assert not re.search("`(model_args|model_or_path|num_classes|use_ema|weights_only)\\b", told)


def writing(source, target):
    """Return the words that write ``target``."""
    if str(target).endswith((".ckpt", ".pth", ".safetensors")):
        return ["fold", source, target]
    return ["export", source, target, "--model", "test_resnet", "--img-size", "32"]


TARGETS = ["out.ckpt", "out.pth", "out.safetensors", "out.pt2", "out.onnx", "folder"]


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_system_without_new_files(name, best, capsys):
    before = best.read_bytes()
    assert run(*writing(best, f"/proc/{name}")) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("calibft: error: [Errno ")
    assert best.read_bytes() == before


def test_a_full_disk(best, tmp_path):
    """Files may not grow beyond a size, in a process of its own: some libraries end theirs."""
    source = shutil.copy(best, tmp_path / "best.ckpt")
    before = source.read_bytes()
    script = """
        import json, resource, signal, sys
        from lightning_calibft.cli import main

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        print([main(words) for words in json.loads(sys.argv[1])])
    """
    words = [list(map(str, writing(source, tmp_path / name))) for name in TARGETS]
    done = run_python("-c", textwrap.dedent(script), json.dumps(words))
    assert done.stdout.splitlines()[-1] == str([1] * len(TARGETS)), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("calibft: error: ") == len(TARGETS)
    assert source.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["best.ckpt"]
