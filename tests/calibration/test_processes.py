"""`calibrate` in a group of two real processes, without Lightning."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_calibft import calibrate, get_gamma
from lightning_calibft.head.offset import attached_heads
from tests.helpers.processes import in_group
from tests.helpers.runs import SEEN
from tests.helpers.scheduled_runs import TRAIN, Scheduled, data

MANY = data(SEEN, 1001, each=400)
EXACT = {"rel": 1e-12}  # only the order of summation differs: see tests/callback/test_ddp.py


class Unreadable(TensorDataset):
    def __init__(self, *tensors, at):
        super().__init__(*tensors)
        self.at = at

    def __getitem__(self, index):
        if index == self.at:
            raise OSError("the share is gone")
        return super().__getitem__(index)


def _calibrate():
    """Plain PyTorch: a group, a model, a loader."""
    results = {}
    for size in (101, 3, 2):
        model = Scheduled().body.append(Scheduled().fc)
        data = TensorDataset(*(tensor[:size] for tensor in TRAIN.tensors))
        result = calibrate(model, DataLoader(data, 16, shuffle=True, drop_last=True), SEEN, progress=False)
        results[size] = result, get_gamma(model)
    results["inferred"] = calibrate(Scheduled().fc, DataLoader(TRAIN, 16), progress=False)
    results["at_most"] = calibrate(Scheduled().fc, DataLoader(TRAIN, 16), SEEN, max_samples=51, progress=False)
    for batch_size in (7, 64):
        many = DataLoader(MANY, batch_size)  # of 1,001 samples the first process reads one more, and so a batch more
        results["sure", batch_size] = calibrate(Scheduled().fc, many, SEEN, tolerance=0.5, progress=False)
    only = TensorDataset(*(tensor[:1] for tensor in TRAIN.tensors))  # the second process has no sample
    results["only"] = calibrate(Scheduled().fc, DataLoader(only, 4), SEEN, progress=False).gamma
    results["never_sure"] = calibrate(Scheduled().fc, DataLoader(MANY, 5), SEEN, tolerance=1e-9, progress=False)
    # The last look comes after the last batch of the second process, and before that of the first.
    few = TensorDataset(*(tensor[:33] for tensor in TRAIN.tensors))
    results["one_more"] = calibrate(Scheduled().fc, DataLoader(few, 16), SEEN, tolerance=1e-9, progress=False)
    for name, spoil in (("inputs", torch.nan), ("target", 6)):
        inputs, target = (tensor.clone() for tensor in TRAIN.tensors)
        {"inputs": inputs, "target": target}[name][35] = spoil  # which only the second process reads
        model = Scheduled().fc
        try:
            calibrate(model, DataLoader(TensorDataset(inputs, target), 4), SEEN, progress=False)
        except ValueError as error:
            results[name] = str(error), len(attached_heads(model))
    for name in ("image", "label"):
        inputs, target = (tensor.clone() for tensor in TRAIN.tensors)
        if name == "label":
            target[35] = 6
        data, model = Unreadable(inputs, target, at=35 if name == "image" else None), Scheduled().fc
        try:
            calibrate(model, DataLoader(data, 4), progress=False)
        except (OSError, RuntimeError, ValueError) as error:
            results[f"classes_{name}"] = type(error), str(error), len(attached_heads(model)), model.training
    return results


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return in_group(_calibrate, tmp_path_factory.mktemp("plain"))


def test_calibrate_in_a_process_group(plain):
    first, second = (
        {key: value for key, value in rank.items() if not str(key).startswith("classes")} for rank in plain
    )
    assert first == second
    for size in (101, 3, 2):
        model = Scheduled().body.append(Scheduled().fc)
        data = TensorDataset(*(tensor[:size] for tensor in TRAIN.tensors))
        expected = calibrate(model, DataLoader(data, 16), SEEN, progress=False)
        result, gamma = plain[0][size]
        assert result.num_samples == size
        assert result.split == expected.split
        assert result.gamma == pytest.approx(expected.gamma, **EXACT)
        assert result.standard_error == pytest.approx(expected.standard_error, **EXACT)
        assert gamma == pytest.approx(get_gamma(model))
    assert plain[0]["inferred"].split.seen_classes == tuple(SEEN)
    assert plain[0]["inferred"].gamma == pytest.approx(plain[0][101][0].gamma, **EXACT)
    assert plain[0]["at_most"].num_samples == 51


def test_processes_stop_together_when_gamma_is_sure(plain):
    order = torch.randperm(len(MANY), generator=torch.Generator().manual_seed(0))
    for batch_size in (7, 64):
        result = plain[0]["sure", batch_size]
        assert 100 <= result.num_samples < len(MANY)
        assert result.num_samples % (2 * batch_size) == 0
        first = TensorDataset(*(tensor[order[: result.num_samples]] for tensor in MANY.tensors))
        expected = calibrate(Scheduled().fc, DataLoader(first, 16), SEEN, progress=False)
        assert result.gamma == pytest.approx(expected.gamma, **EXACT)
        assert result.standard_error == pytest.approx(expected.standard_error, **EXACT)
        assert result.standard_error <= 0.5
    assert plain[0]["never_sure"].num_samples == len(MANY)
    assert plain[0]["one_more"].num_samples == 33


def test_a_process_without_a_sample(plain):
    only = TensorDataset(*(tensor[:1] for tensor in TRAIN.tensors))
    expected = calibrate(Scheduled().fc, DataLoader(only, 4), SEEN, progress=False).gamma
    assert plain[0]["only"] == plain[1]["only"] == pytest.approx(expected, **EXACT)


def test_all_processes_raise_what_one_meets(plain):
    for rank in plain:
        message, attached = rank["inputs"]
        assert "finite logits in the calibration pass, but batch 4 has" in message
        assert attached == 0
        message, attached = rank["target"]
        assert "[0, 6)" in message
        assert "1 of 101 samples" in message
        assert attached == 0


@pytest.mark.parametrize(
    ("name", "error", "text", "of_the_first"),
    [
        ("image", OSError, "the share is gone", RuntimeError),
        (
            "label",
            ValueError,
            "Expected targets to be class ids in [0, 6), rows of the classification head, but got 6.",
            ValueError,
        ),
    ],
)
def test_what_one_meets_while_it_looks_for_the_classes(name, error, text, of_the_first, plain):
    """The other hears of it, at once."""
    kind, message, *model = plain[1][f"classes_{name}"]
    assert (kind, model) == (error, [0, True])
    assert message.startswith(text)
    kind, message, *model = plain[0][f"classes_{name}"]
    assert (kind, model) == (of_the_first, [0, True])
    assert message == "The calibration pass failed on another process. See the error there. Gamma stays unset."
