"""Folders as `save_pretrained` writes them: gamma goes next to the weights of the head, and all else stays."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_calibft import CalibrationResult, ClassSplit, inspect_checkpoint, load_calibrated
from lightning_calibft.checkpoint.pretrained_folder import read_folder, write_calibration
from lightning_calibft.checkpoint.state import MASK, OFFSET

WEIGHTS = {"body.weight": torch.randn(4, 3), "head.weight": torch.randn(5, 4), "tail.weight": torch.ones(2)}
ENTRIES = {f"head.{OFFSET}": torch.tensor(2.5), f"head.{MASK}": torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])}
RESULT = CalibrationResult(2.5, 0.1, 64, ClassSplit(5, [0, 1]), "alg")
PARTS = {name: f"model-0000{number}-of-00003.safetensors" for number, name in enumerate(WEIGHTS, 1)}


def write_index(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)


def in_parts(folder):
    for name, value in WEIGHTS.items():
        save_file({name: value}, folder / PARTS[name], metadata={"format": "pt"})
    sizes = sum(value.nbytes for value in WEIGHTS.values())
    write_index(folder, json.dumps({"metadata": {"total_size": sizes}, "weight_map": PARTS}))


def in_one(folder):
    save_file(WEIGHTS, folder / "model.safetensors", metadata={"format": "pt"})


def of_adapter(folder):
    save_file(WEIGHTS, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def pickled(folder):
    torch.save(WEIGHTS, folder / "pytorch_model.bin")


@pytest.mark.parametrize("write", [in_one, in_parts, of_adapter, pickled])
def test_gamma_is_added_and_the_rest_stays(tmp_path, write):
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for _ in range(2):  # writing it again changes nothing
        write_calibration(tmp_path, ENTRIES, RESULT)
        state, metadata = read_folder(tmp_path)
        assert state.keys() == WEIGHTS.keys() | ENTRIES.keys()
        assert all(torch.equal(state[key], value) for key, value in {**WEIGHTS, **ENTRIES}.items())
        assert (metadata["gamma"], metadata["seen_classes"]) == (2.5, [0, 1])
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() == before.keys()
    if write is in_parts:
        changed = {name for name in after if after[name] != before[name]}
        assert changed == {PARTS["head.weight"], "model.safetensors.index.json"}
        index = json.loads(after["model.safetensors.index.json"])
        assert {index["weight_map"][key] for key in ENTRIES} == {PARTS["head.weight"]}
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
        assert load_file(tmp_path / PARTS["head.weight"]).keys() == {"head.weight", *ENTRIES}
        (tmp_path / "config.json").write_text("{}")
        assert inspect_checkpoint(tmp_path)["gamma"] == 2.5


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{}", "to name files of weights beside it"),
        ('{"weight_map": {"head.weight": "../model.safetensors"}}', "to name files of weights beside it"),
        ('{"weight_map": {"head.weight": 3}}', "to name files of weights beside it"),
        ('{"weight_map": ', "readable JSON"),
    ],
)
def test_an_index_that_lies(tmp_path, content, match):
    write_index(tmp_path, content)
    for work in (lambda: read_folder(tmp_path), lambda: write_calibration(tmp_path, ENTRIES, RESULT)):
        with pytest.raises(ValueError, match=match):
            work()


def test_a_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder that `save_pretrained` has written"):
        read_folder(tmp_path)
    in_parts(tmp_path)
    (tmp_path / PARTS["tail.weight"]).unlink()
    with pytest.raises(FileNotFoundError, match="00003-of-00003"):
        read_folder(tmp_path)


class Loads:
    @classmethod
    def from_pretrained(cls, path, **kwargs):
        raise AssertionError("it has no gamma to load")


def test_a_folder_without_gamma(tmp_path):
    in_one(tmp_path)
    with pytest.raises(ValueError, match="holds no gamma that is not folded"):
        load_calibrated(Loads, tmp_path)
    with pytest.raises(TypeError, match="or one with `from_pretrained`"):
        load_calibrated(dict, tmp_path)
