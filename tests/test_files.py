"""A file is written whole or not at all; what cannot be read is tested with what uses it, in test_checkpoint.py."""

from __future__ import annotations

import os
import pickle

import pytest

from lightning_calibft.files import write_atomically
from tests.runs import read


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
