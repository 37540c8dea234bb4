"""Folding gamma in files that hold a state dict and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_calibft import (
    fold_checkpoint,
    inspect_checkpoint,
    set_gamma,
)
from tests.helpers.runs import (
    ABSENT,
    NUM_CLASSES,
    SEEN,
    quiet,
    read,
)

pytestmark = quiet
X = 3 * torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
SHIFT = torch.isin(torch.arange(NUM_CLASSES), torch.tensor(ABSENT)).float()


def test_a_bare_head(tmp_path):
    head = set_gamma(nn.Linear(5, NUM_CLASSES), 2.5, SEEN).eval()
    torch.save(head.state_dict(), tmp_path / "head.pt")
    assert inspect_checkpoint(tmp_path / "head.pt")["gamma"] == 2.5
    fold_checkpoint(tmp_path / "head.pt", tmp_path / "folded.pt")
    plain = nn.Linear(5, NUM_CLASSES)
    plain.load_state_dict(read(tmp_path / "folded.pt"))
    torch.testing.assert_close(plain(X), head(X))


def test_fold_half_precision(tmp_path):
    model = set_gamma(nn.Sequential(nn.Linear(5, NUM_CLASSES)).bfloat16(), 2.5, SEEN)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fold_checkpoint(tmp_path / "model.pt", tmp_path / "folded.pt")
    folded = read(tmp_path / "folded.pt")
    assert folded["0.bias"].dtype == torch.bfloat16
    assert torch.equal(folded["0.bias"], (model[0].bias.float() + 2.5 * SHIFT).bfloat16())


def test_a_head_without_bias_is_refused(tmp_path):
    model = set_gamma(nn.Sequential(nn.Linear(5, NUM_CLASSES, bias=False)), 2.5, SEEN)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"the head '0' in .* a bias .* Pass `add_bias=True` to give it one"):
        fold_checkpoint(tmp_path / "model.pt", tmp_path / "folded.pt")
    assert not (tmp_path / "folded.pt").exists()
