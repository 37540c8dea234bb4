"""The one pass that calibration, cross-validation and the analyses share."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from torch import nn

from lightning_calibft import ClassSplit, attach, calibrate
from lightning_calibft.analysis import collect_outputs
from lightning_calibft.calibration.batch_calls import _part_with_forward
from lightning_calibft.calibration.batch_reader import BatchReader
from lightning_calibft.calibration.evaluation_pass import EvaluationPass
from tests.calibration.nets import ALL, X, Y, net, raw
from tests.helpers.runs import SEEN, loader, quiet

pytestmark = quiet

BATCHES = [(X[:20], Y[:20]), (X[:0], Y[:0]), (X[20:41], Y[20:41]), (X[41:], Y[41:])]


def passed(model, batches=BATCHES, **kwargs):
    return EvaluationPass(attach(model), [batches], bar=None, **kwargs)


def test_what_is_yielded():
    model = net().train()
    evaluated = list(passed(model).evaluate())
    assert [batch.number for batch in evaluated] == [0, 2, 3]  # those with samples
    assert torch.equal(torch.cat([batch.target for batch in evaluated]), Y)
    assert torch.allclose(torch.cat([batch.logits for batch in evaluated]), raw(model), atol=1e-6)
    assert all(batch.pretrained_logits == [] for batch in evaluated)
    assert model.training


def test_logits_of_before():
    before = net()
    model = net()
    with torch.no_grad():
        model.fc.bias += 1
    evaluated = list(passed(model, estimator="pseudo_absent", pretrained=before.state_dict()).evaluate())
    given = torch.cat([batch.pretrained_logits[0] for batch in evaluated])
    assert torch.allclose(given, raw(before), atol=1e-6)


def test_a_pass_that_is_closed_early_leaves_no_trace():
    model = net().train()
    model.body[1].eval()
    modes = [module.training for module in model.modules()]
    with closing(passed(model).evaluate()) as batches:
        next(batches)
        assert not model.training
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert [module.training for name, module in model.named_modules() if "absent" not in name] == modes


@pytest.mark.parametrize(
    ("run", "times"),
    [
        (lambda model, data: calibrate(model, data, SEEN, progress=False), 6),
        (lambda model, data: calibrate(model, data, SEEN, max_samples=30, progress=False), 4),  # of 8 samples each
        (lambda model, data: calibrate(model, data, progress=False), 12),  # once more for the classes
        (lambda model, data: collect_outputs(model, data), 6),
        (lambda model, data: passed(model, data).feed(Sum(ALL), ClassSplit(6, SEEN)), 6),
    ],
)
def test_the_rows_of_a_batch_are_read_once(run, times, monkeypatch):
    calls, rows = [], BatchReader.rows
    monkeypatch.setattr(BatchReader, "rows", lambda reader, batch: calls.append(1) or rows(reader, batch))
    run(net(), list(loader(shuffle=False)))
    assert len(calls) == times


class Sum(nn.Module):
    """Stands for a metric."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def update(self, logits, target):
        assert logits.shape == (len(target), len(self.classes))


def test_nothing_is_evaluated_of_nothing():
    assert list(passed(net(), []).evaluate()) == []
    assert list(passed(net(), [(X[:0], Y[:0])]).evaluate()) == []
    assert list(EvaluationPass(attach(net()), [], max_samples=3).evaluate()) == []


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_the_forward_of_a_module_of_either_package(package):
    base = pytest.importorskip(package).LightningModule

    class Without(base):
        def __init__(self):
            super().__init__()
            self.model = net()

    class With(Without):
        def forward(self, x):
            return self.model(x)

    class LightningModule(With):
        """Also of such a name."""

    for make, part in ((Without, "model"), (With, ""), (LightningModule, "")):
        module = make()
        attach(module, "model.fc")
        assert _part_with_forward(module) == part
