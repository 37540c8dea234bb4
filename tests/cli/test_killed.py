"""Killed in the pass or before the output takes its place, a command leaves its input and at most a hidden file."""

from __future__ import annotations

import json
import os
import shutil
import textwrap

import pytest

from lightning_calibft import inspect_checkpoint
from tests.cli.running import READ, run
from tests.helpers.processes import run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, so that Python need not start anew")

SCRIPT = """
    import json, os, signal, sys
    from lightning_calibft.cli import main

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, arguments):
        if event == "os.rename" and str(arguments[0]).endswith(".tmp"):
            die()
        if place == "pass" and event == "open" and str(arguments[0]).endswith("/4.png"):
            die()

    codes = []
    for place, words in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            sys.addaudithook(audit)
            os._exit(main(words))
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(codes)
"""


def test_killed(best, raw, photos, tmp_path):
    source, weights = shutil.copy(best, tmp_path / "best.ckpt"), shutil.copy(raw, tmp_path / "raw.pth")
    before = {path: path.read_bytes() for path in (source, weights)}
    export = ["--model", "test_resnet", "--img-size", "32"]
    calibrate = ["calibrate", "test_resnet", weights, photos]
    commands = {
        "in_the_pass": ("pass", [*calibrate, tmp_path / "in_the_pass" / "out.pth", *READ]),
        "calibrate": ("rename", [*calibrate, tmp_path / "calibrate" / "out.pth", *READ]),
        "fold": ("rename", ["fold", source, tmp_path / "fold" / "out.ckpt"]),
        "export": ("rename", ["export", source, tmp_path / "export" / "out.pth", *export]),
        "folder": ("rename", ["export", source, tmp_path / "folder" / "out", *export]),
    }
    for name in commands:
        (tmp_path / name).mkdir()
    given = json.dumps([(place, [str(word) for word in words]) for place, words in commands.values()])
    done = run_python("-c", textwrap.dedent(SCRIPT), given)
    assert done.stdout.splitlines()[-1] == str([-9] * len(commands)), done.stderr
    assert {path: path.read_bytes() for path in before} == before
    for name in commands:
        left = [path.name for path in (tmp_path / name).iterdir()]
        assert len(left) == (name != "in_the_pass")
        assert all(each.startswith(".") and each.endswith(".tmp") for each in left)
    assert run(*commands["calibrate"][1]) == 0  # once more
    assert inspect_checkpoint(tmp_path / "calibrate" / "out.pth")["calibrated"]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_cannot_be_read(workers, raw, photos, tmp_path, capsys):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "4" / "3.png").write_bytes(b"no image")
    words = [
        "calibrate",
        "test_resnet",
        raw,
        tmp_path / "photos",
        tmp_path / "out.pth",
        *READ,
        "--num-workers",
        workers,
    ]
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert error.startswith("calibft: error: ")
    assert error.count("\n") == 1
    assert "3.png" in error
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
