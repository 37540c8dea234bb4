"""The callback in trainings with the Trainer of transformers in two real processes."""

from __future__ import annotations

import pytest
import torch

from lightning_calibft import inspect_checkpoint
from tests.helpers.processes import outcomes

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from lightning_calibft.functional import ausuc  # noqa: E402
from tests.integrations.hugging_face import SEEN, VAL, folders, logits_of, reference  # noqa: E402

KINDS = {"vit": "ViTForImageClassification", "resnet": "ResNetForImageClassification"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return folder, outcomes("tests.integrations.two_processes_script", folder, 2)


@pytest.mark.parametrize("name", KINDS)
def test_as_in_one_process(found, name):
    """Each of 33 samples is read once. Gamma belongs to the running statistics of the first process, which saves."""
    folder, ranks = found
    first, second = (rank[name] for rank in ranks)
    assert first == second
    assert first["processes"] == 2
    assert first["same"]
    for path in folders(folder / name):
        model = getattr(transformers, KINDS[name]).from_pretrained(path)
        gamma, error, count = reference(model)
        assert first["folders"][path.name] == pytest.approx(gamma, rel=1e-5)
        assert inspect_checkpoint(path)["gamma"] == pytest.approx(gamma, rel=1e-5)
    result = first["result"]
    assert (result["gamma"], result["num_samples"]) == (pytest.approx(gamma, rel=1e-5), count)
    assert result["standard_error"] == pytest.approx(error, rel=1e-3)
    assert first["gamma"] == pytest.approx(gamma, rel=1e-5)
    expected = ausuc(logits_of(model, VAL), torch.tensor(VAL.target), SEEN)
    if name == "vit":  # an evaluation of the user has the running statistics of each process
        assert first["metrics"]["eval_ausuc"] == pytest.approx(float(expected), abs=1e-6)


def test_an_error_on_one_process(found):
    """Neither waits for the other, and both go on."""
    _, ranks = found
    assert [rank["uncalibrated"] for rank in ranks] == [None, None]
    assert [len(rank["told"]) for rank in ranks] == [1, 1]
    assert "the disk is gone" in ranks[1]["told"][0]
    assert "failed on another process" in ranks[0]["told"][0]


def test_a_sharded_model_is_refused(found):
    _, ranks = found
    assert all("share a model among processes are not supported" in rank["sharded"] for rank in ranks)
