"""The callback in trainings with the Trainer of transformers in two real processes."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_calibft import calibrate, inspect_checkpoint
from tests.helpers.processes import outcomes

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import default_data_collator  # noqa: E402

from lightning_calibft.functional import ausuc  # noqa: E402
from tests.integrations.hugging_face import (  # noqa: E402
    HELD_OUT,
    SEEN,
    TRAFFIC,
    VAL,
    folders,
    logits_of,
    reference,
    vit,
)

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


def test_both_count_the_unlabeled_samples(found):
    """Each is read once, by the model and by the one before."""
    folder, (first, second) = found
    assert first["unlabeled"] == second["unlabeled"]
    (path,) = folders(folder / "unlabeled")
    held_out, traffic = (DataLoader(data, 7, collate_fn=default_data_collator) for data in (HELD_OUT, TRAFFIC))
    options = {"estimator": "pseudo_absent", "pretrained": vit(), "unlabeled": traffic, "progress": False}
    model = transformers.ViTForImageClassification.from_pretrained(path)
    expected = calibrate(model, held_out, SEEN, **options)
    for name in ("gamma", "absent_share", "absent_share_interval", "num_samples"):
        assert first["unlabeled"][name] == pytest.approx(expected.as_dict()[name], rel=1e-4), name


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
