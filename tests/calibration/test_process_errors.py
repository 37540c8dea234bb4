"""What one of two real processes meets ends the calibration of both, at once and with the model as it was."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler, TensorDataset

from lightning_calibft import calibrate
from lightning_calibft.calibration.distributed import ShardedReading, SharedErrors, first_batch_of_any
from lightning_calibft.calibration.evaluation_pass import EvaluationPass
from lightning_calibft.head import attach
from lightning_calibft.head.offset import attached_heads
from lightning_calibft.split import ClassSplit
from tests.calibration.nets import net
from tests.helpers.processes import in_group
from tests.helpers.runs import SEEN, TRAIN

X, Y = TRAIN.tensors
CPU = torch.device("cpu")


class Broken(TensorDataset):
    def __getitem__(self, index):
        if index == 41:  # which the second process reads
            raise OSError("the disk is gone")
        return super().__getitem__(index)


class Odd(Sampler):
    """Draws numbers, or on one process something else."""

    def __init__(self, draw):
        self.draw = draw

    def __iter__(self):
        return map(self.draw, range(len(Y)))

    def __len__(self):
        return len(Y)


class Named(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index["index"] if isinstance(index, dict) else index)


def broken_draw(index):
    raise KeyError("no such class")


def out_of_memory(batch):
    raise torch.OutOfMemoryError("12 GiB")


def stream(number, size=5):
    """Batches that know how many they are."""
    return [(X[:size], Y[:size])] * number


def cases(second):
    """Each calls `calibrate` with something that is wrong on the second process alone."""
    good = DataLoader(TRAIN, 8)

    def run(loader=good, seen=SEEN, **kwargs):
        return lambda model: calibrate(model, loader, seen, progress=False, **kwargs)

    soft = [(X, 0.9 * torch.nn.functional.one_hot(Y, 6))]
    return {
        "soft_labels": run(soft if second else [(X, Y)]),
        "soft_labels_while_classes_are_read": run(soft if second else [(X, Y)], None),
        "a_sample_that_cannot_be_read": run(DataLoader(Broken(X, Y), 8)),
        "a_sample_that_cannot_be_read_with_tolerance": run(DataLoader(Broken(X, Y), 8), tolerance=1e-9),
        "a_sampler_that_fails": run(DataLoader(TRAIN, 8, sampler=Odd(broken_draw if second else int))),
        "no_loader": run(None if second else good),
        "no_loader_beside_a_sampler": run(None if second else DataLoader(TRAIN, 8, sampler=Odd(int))),
        "no_head": run(head="no.such" if second else None),
        "a_class_twice": run(seen=[0, 0] if second else SEEN),
        "a_tolerance": run(tolerance=-1 if second else 1),
        "a_class_map": run(class_map={0: 99} if second else None),
        "weights_before": run(estimator="pseudo_absent", pretrained=None if second else net()),
        "a_batch_too_large": run(unpack_batch=out_of_memory if second else None),
        "logits_of_another_shape": run([(X[:9] if second else X, Y)]),
    }


def _run() -> dict[str, Any]:
    rank, results = dist.get_rank(), {}
    for name, run in cases(second=rank == 1).items():
        model = net().train()
        try:
            run(model)
        except Exception as error:
            results[name] = type(error).__name__, str(error), len(attached_heads(model)), model.training
    # What is no error, but differs.
    kinds = DataLoader(Named(X, Y), 8, sampler=Odd((lambda index: {"index": index}) if rank else int))
    results["kinds_of_indices"] = calibrate(net(), kinds, SEEN, progress=False)
    halves = DataLoader(TRAIN, 8, sampler=Odd(lambda index: (2 * index + rank) % (len(Y) - 1)))
    results["halves"] = calibrate(net(), halves, SEEN, progress=False).num_samples
    some = DataLoader(TRAIN, 8, sampler=Odd(int))
    results["some"] = calibrate(net(), some, SEEN, max_samples=20, progress=False).num_samples
    results["none_on_one"] = calibrate(net(), [] if rank else stream(40), SEEN, tolerance=1e-9, progress=False)
    # They say to be equally long, and are not: at most 100 samples of each are read.
    unequal = stream(40, 2) if rank else stream(40, 20)
    results["unequal"] = calibrate(net(), unequal, SEEN, tolerance=1e-9, max_samples=200, progress=False)
    # Of a model that the processes hold in parts.
    parts = ShardedReading(rank, 2, counts=True)
    sharded = EvaluationPass(attach(net()), [[] if rank else stream(3)], bar=None, sharded=parts)
    results["sharded"] = sharded.run(ClassSplit(6, SEEN))
    results["shared_batch"] = first_batch_of_any((X[:2], "name") if rank else None, CPU)
    for name, batch in (("locked", threading.Lock()), ("nothing", None)):
        try:
            results[name] = first_batch_of_any(batch if rank else None, CPU)
        except Exception as error:
            results[name] = type(error).__name__, str(error)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return in_group(_run, tmp_path_factory.mktemp("errors"))


OWN = {
    "soft_labels": ("TypeError", "Soft and multi-label targets"),
    "soft_labels_while_classes_are_read": ("TypeError", "Soft and multi-label targets"),
    "a_sample_that_cannot_be_read": ("OSError", "the disk is gone"),
    "a_sample_that_cannot_be_read_with_tolerance": ("OSError", "the disk is gone"),
    "a_sampler_that_fails": ("KeyError", "no such class"),
    "no_loader": ("TypeError", "`loader` to be a DataLoader"),
    "no_loader_beside_a_sampler": ("TypeError", "`loader` to be a DataLoader"),
    "no_head": ("HeadNotFoundError", "`head` to name a module"),
    "a_class_twice": ("ValueError", "each class once"),
    "a_tolerance": ("ValueError", "`tolerance` to be a positive number"),
    "a_class_map": ("ValueError", "99"),
    "weights_before": ("ValueError", "`pretrained` to be the model before fine-tuning"),
    "a_batch_too_large": ("OutOfMemoryError", "Give it smaller batches"),
    "logits_of_another_shape": ("UnexpectedLogitsError", "(9, 6)"),
}


@pytest.mark.parametrize("name", OWN)
def test_an_error_on_one_process_ends_both(name, results):
    kind, text = OWN[name]
    own, other = results[1][name], results[0][name]
    assert own[0] == kind
    assert text in own[1]
    assert other[0] == (
        "ValueError" if kind in ("ValueError", "HeadNotFoundError", "UnexpectedLogitsError") else "RuntimeError"
    )
    assert other[1] == "The calibration pass failed on another process. See the error there. Gamma stays unset."
    assert own[2:] == other[2:] == (0, True)


def test_all_cases_are_tested():
    assert OWN.keys() == cases(second=True).keys()


@pytest.mark.parametrize("name", ["kinds_of_indices", "halves", "some", "none_on_one", "unequal", "sharded", "nothing"])
def test_what_differs_between_processes_gives_one_result(name, results):
    assert results[0][name] == results[1][name]


def test_the_samples_of_both(results):
    assert results[0]["kinds_of_indices"].num_samples == 2 * len(Y)  # nothing tells that two kinds mean the same
    assert results[0]["halves"] == len(Y) - 1
    assert results[0]["some"] == 20
    assert results[0]["none_on_one"].num_samples == 40 * 5
    assert results[0]["unequal"].num_samples == 100 + 40 * 2
    assert results[0]["sharded"].num_samples == 3 * 5


def test_a_batch_that_is_sent(results):
    for rank in results:
        tensor, name = rank["shared_batch"]
        assert torch.equal(tensor, X[:2])
        assert name == "name"
    assert results[0]["locked"][0] == "RuntimeError"
    assert "pickle" in results[1]["locked"][1]


def test_errors_are_told_once():
    errors = SharedErrors()
    with pytest.raises(torch.OutOfMemoryError) as raised, errors.shared(), errors.shared():
        raise torch.OutOfMemoryError("12 GiB")
    assert str(raised.value).count("Out of memory in the calibration pass") == 1
