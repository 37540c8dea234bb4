"""A file is written whole or not at all, and one that cannot be used is refused with its reason."""

from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_calibft import AbsentClassCalibration, attach, fold_checkpoint, inspect_checkpoint, load_calibrated
from lightning_calibft.checkpoint.files import write_atomically
from tests.helpers.runs import Plain, loader, pretrained, quiet, read, trainer_of

pytestmark = quiet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with ``best.ckpt``, calibrated, and ``plain.ckpt``, written without the callback."""
    path = tmp_path_factory.mktemp("runs")
    for name, callbacks in (("best", [AbsentClassCalibration()]), ("plain", [])):
        trainer_of(path, *callbacks, ModelCheckpoint(path, name)).fit(pretrained(), loader())
    return path


@pytest.fixture
def best(folder):
    return folder / "best.ckpt"


class Exploit:
    def __reduce__(self):
        return os.mkdir, (os.environ["EXPLOIT"],)


def make_bad_file(kind, best, path):
    whole = best.read_bytes()
    content = {
        "truncated": whole[: len(whole) // 2],
        "truncated_at_the_end": whole[:-10],
        "empty": b"",
        "text": b"hello, this is no checkpoint\n",
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(99),
        "zeros": bytes(999),
        "pickle": pickle.dumps({"a": 1}),
        "truncated_pickle": pickle.dumps({"state_dict": {str(i): i for i in range(99)}})[:50],
    }
    things = {
        "list": [torch.zeros(1)],
        "no_tensors": {"state_dict": {"a": 1}},
        "no_names": {0: torch.zeros(1)},
        "state_dict_of_another_kind": {"state_dict": 3},
    }
    if kind == "directory":
        path.mkdir()
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "hello")
    elif kind in content:
        path.write_bytes(content[kind])
    elif kind in things:
        torch.save(things[kind], path)


BAD = [
    "missing",
    "directory",
    "truncated",
    "truncated_at_the_end",
    "empty",
    "text",
    "picture",
    "zeros",
    "pickle",
    "truncated_pickle",
    "zip",
    "list",
    "no_tensors",
    "no_names",
    "state_dict_of_another_kind",
]
USES = {
    "load": lambda path, folder, **kwargs: load_calibrated(Plain, path, **kwargs),
    "fold": lambda path, folder, **kwargs: fold_checkpoint(path, folder / "destination.ckpt", **kwargs),
    "inspect": lambda path, folder, **kwargs: inspect_checkpoint(path, **kwargs),
}


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", BAD)
def test_bad_files(kind, use, weights_only, best, tmp_path):
    path = tmp_path / "bad.ckpt"
    make_bad_file(kind, best, path)
    error = FileNotFoundError if kind == "missing" else ValueError
    with pytest.raises(error, match=r"^Expected a checkpoint.*bad\.ckpt'") as raised:
        USES[use](path, tmp_path, weights_only=weights_only)
    assert "weights_only=False" not in str(raised.value)  # which would not help
    assert {other.name for other in tmp_path.iterdir()} <= {"bad.ckpt"}


@pytest.mark.parametrize("use", ["load", "fold"])
def test_files_without_gamma(use, folder, tmp_path):
    torch.save({"state_dict": attach(pretrained()).state_dict()}, tmp_path / "attached.ckpt")
    for path in (folder / "plain.ckpt", tmp_path / "attached.ckpt"):
        with pytest.raises(ValueError, match=r"Expected a calibrated checkpoint.*holds no gamma.*`calibrate\("):
            USES[use](path, tmp_path)
    assert [other.name for other in tmp_path.iterdir()] == ["attached.ckpt"]


@pytest.mark.parametrize("use", USES)
def test_code_in_a_file_is_not_run(use, best, tmp_path, monkeypatch):
    monkeypatch.setenv("EXPLOIT", str(tmp_path / "exploited"))
    path = tmp_path / "code.ckpt"
    torch.save({**read(best), "extra": Exploit()}, path)
    with pytest.raises(ValueError, match=r"holds other Python objects, which can run code.* pass `weights_only=False`"):
        USES[use](path, tmp_path)
    assert [other.name for other in tmp_path.iterdir()] == ["code.ckpt"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.ckpt"
    write_atomically({"a": 1}, path)
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        write_atomically({"a": lambda: None}, path)
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="directory"):
        write_atomically({"a": 2}, tmp_path / "no" / "file.ckpt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomically({"a": 2}, tmp_path / "folder")
    assert sorted(other.name for other in tmp_path.iterdir()) == ["file.ckpt", "folder"]
    assert read(path) == {"a": 1}


def test_a_link_stays_a_link_and_modes_stay(tmp_path):
    path, link = tmp_path / "file.ckpt", tmp_path / "link.ckpt"
    write_atomically({"a": 1}, path)
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    path.chmod(0o600)
    link.symlink_to("file.ckpt")
    write_atomically({"a": 2}, link)
    assert os.readlink(link) == "file.ckpt"
    assert read(path) == read(link) == {"a": 2}
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_long_name(tmp_path):
    path = tmp_path / ("a" * 250 + ".ckpt")
    write_atomically({"a": 1}, path)
    assert read(path) == {"a": 1}
