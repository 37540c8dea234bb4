"""Files of safetensors: what they hold, and what cannot be in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_calibft import attach, fold_checkpoint, get_gamma, inspect_checkpoint, load_calibrated, set_gamma
from lightning_calibft.checkpoint.files import write_atomically
from tests.helpers.runs import Plain, pretrained, quiet

pytestmark = quiet


@pytest.fixture
def calibrated(tmp_path):
    """A calibrated state dict as others save it, without metadata."""
    torch.manual_seed(0)
    save_file(set_gamma(pretrained(), 2.5, [0, 2]).state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_inspect_fold_and_load(calibrated, tmp_path):
    assert inspect_checkpoint(calibrated)["gamma"] == 2.5
    fold_checkpoint(calibrated, tmp_path / "folded.safetensors")
    fold_checkpoint(calibrated, tmp_path / "folded.pth")
    folded = load_file(tmp_path / "folded.safetensors")
    plain = torch.load(tmp_path / "folded.pth", weights_only=True)
    assert folded.keys() == plain.keys() == pretrained().state_dict().keys()
    assert all(torch.equal(folded[key], plain[key]) for key in folded)
    shift = folded["fc.bias"] - load_file(calibrated)["fc.bias"]
    torch.testing.assert_close(shift, 2.5 * load_file(calibrated)["fc.absent_class_calibration.mask"])
    module = load_calibrated(Plain, calibrated)
    assert get_gamma(module) == 2.5


def test_metadata_survive_in_every_kind_of_file(calibrated, tmp_path):
    for name in ("a.safetensors", "a.pth"):
        fold_checkpoint(calibrated, tmp_path / name)
        info = inspect_checkpoint(tmp_path / name)
        assert (info["folded"], info["gamma"], info["num_classes"]) == (True, 2.5, 6)
        with pytest.raises(ValueError, match="already folded into the bias"):
            fold_checkpoint(tmp_path / name, tmp_path / "again.pth")
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "nested.pth")
    assert inspect_checkpoint(tmp_path / "nested.pth")["folded"]


def test_weights_that_share_memory(tmp_path):
    state = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.arange(6.0)[::2][:2]}
    state["tied.weight"] = state["fc.weight"]
    write_atomically({"state_dict": state}, tmp_path / "tied.safetensors")
    read = load_file(tmp_path / "tied.safetensors")
    assert all(torch.equal(read[key], value) for key, value in state.items())


def test_what_is_no_tensor_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'extra' is a dict.* Name the file .*\.pth"):
        write_atomically({"state_dict": {"w": torch.ones(1), "extra": {}}}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_permissions_are_those_of_other_files(calibrated, tmp_path):
    fold_checkpoint(calibrated, tmp_path / "folded.safetensors")
    Path(tmp_path / "other").touch()
    assert (tmp_path / "folded.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_metadata_that_are_no_json(tmp_path):
    save_file(attach(nn.Linear(2, 3)).state_dict(), tmp_path / "a.safetensors", {"lightning_calibft": "{broken"})
    with pytest.raises(ValueError, match=r"metadata of '.*a\.safetensors' to be readable JSON, but it is not"):
        inspect_checkpoint(tmp_path / "a.safetensors")
    save_file(attach(nn.Linear(2, 3)).state_dict(), tmp_path / "a.safetensors", {"lightning_calibft": json.dumps([1])})
    assert not inspect_checkpoint(tmp_path / "a.safetensors")["calibrated"]
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"lightning_calibft": "[1]"}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        torch.randn(3, 4).T,
        torch.arange(7)[::2],
        torch.ones(1).expand(4),
        nn.Parameter(torch.randn(2)),
        *[
            torch.arange(5).to(getattr(torch, dtype))
            for dtype in (
                "float16",
                "bfloat16",
                "float64",
                "int8",
                "int32",
                "complex64",
                "float8_e4m3fn",
                "float8_e5m2",
            )
        ],
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.dtype}",
)
def test_other_readers_read_what_is_written(tensor, tmp_path):
    state = {"odd": torch.ones(3, dtype=torch.uint8), 'a "name"\n': tensor}
    write_atomically({"state_dict": state, "lightning_calibft": {"gamma": 2.5}}, tmp_path / "ours.safetensors")
    read = load_file(tmp_path / "ours.safetensors")
    for key, value in state.items():
        assert (read[key].shape, read[key].dtype) == (value.shape, value.dtype)
        assert read[key].double().equal(value.double()) if value.dtype != torch.complex64 else read[key].equal(value)
    content = (tmp_path / "ours.safetensors").read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    start = json.loads(content[8:size])['a "name"\n']["data_offsets"][0]
    assert (size + start) % tensor.element_size() == 0


def test_a_dtype_that_no_safetensors_file_holds(tmp_path):
    with pytest.raises(ValueError, match=r"'w' has the dtype torch\.complex128\. Name the file \.ckpt or \.pth"):
        write_atomically({"state_dict": {"w": torch.ones(1, dtype=torch.complex128)}}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
