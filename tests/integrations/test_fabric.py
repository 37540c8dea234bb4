"""`calibrate` in fine-tuning loops with Lightning Fabric, in one process and in two real ones."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric import Fabric

from lightning_calibft import attach, get_gamma
from lightning_calibft.head.find import find_head
from tests.helpers.processes import outcomes
from tests.integrations.fabric import KINDS, Net, fine_tune, reference


def test_one_process():
    """The loader and the wrapped module are what Fabric has returned, and the module of the user gets gamma."""
    run = fine_tune(Fabric(accelerator="cpu", devices=1))
    gamma, error, count = reference(run.model)
    assert (run.result.gamma, run.result.num_samples) == (pytest.approx(gamma, rel=1e-5), count)
    assert run.result.standard_error == pytest.approx(error, rel=1e-3)
    assert get_gamma(run.model) == pytest.approx(gamma, rel=1e-5)
    assert find_head(run.wrapped) is run.model.fc
    plain = fine_tune(Fabric(accelerator="cpu", devices=1), in_between=False)
    assert run.orders == plain.orders  # Fabric counts how often a loader is read
    assert all(torch.equal(run.model.state_dict()[key], value) for key, value in plain.model.state_dict().items())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_the_precision_of_fabric(precision):
    """The pass has it: the logits are those of half precision, and gamma stays in float32."""
    run = fine_tune(Fabric(accelerator="cpu", devices=1, precision=precision))
    gamma, *_ = reference(run.model.float())
    assert run.result.gamma == pytest.approx(gamma, rel=2e-2)
    assert run.result.gamma != pytest.approx(gamma, rel=1e-6)
    assert run.model.fc.absent_class_calibration.offset.dtype == torch.float32


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fabric")
    return folder, outcomes("tests.integrations.fabric_script", folder, 2)


@pytest.mark.parametrize("name", KINDS)
def test_two_processes(found, name):
    """Each sample is read once, whatever the loader drops or pads for training."""
    folder, (first, second) = found
    assert first[name]["gamma"] == second[name]["gamma"]
    model = attach(Net(**KINDS[name]))
    model.load_state_dict(torch.load(folder / f"{name}.ckpt", weights_only=True)["model"])
    gamma, _, count = reference(model)
    assert first[name]["num_samples"] == count == 41
    assert first[name]["gamma"] == pytest.approx(gamma, rel=1e-5)
    assert get_gamma(model) == pytest.approx(gamma, rel=1e-5)
