"""CalibrationDiagnostics and modules, heads and batches of many kinds."""

from __future__ import annotations

import copy

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_calibft import CalibrationDiagnostics
from tests.callback.diagnosing import HARD, check_evaluation, check_levels, check_weights, fit, val
from tests.helpers.runs import (
    ABSENT,
    NUM_CLASSES,
    SEEN,
    TRAIN,
    Plain,
    loader,
    pretrained,
    quiet,
)

pytestmark = quiet


class TwoHeads(Plain):
    def build(self, dropout):
        self.body = nn.Sequential(nn.Linear(5, 16), nn.ReLU())
        self.head, self.head_dist = nn.Linear(16, NUM_CLASSES), nn.Linear(16, NUM_CLASSES)

    def forward(self, x):
        x = self.body(x)
        return (self.head(x) + self.head_dist(x)) / 2


class Convolution(Plain):
    def build(self, dropout):
        self.body = nn.Linear(5, 16)
        self.fc = nn.Conv2d(16, NUM_CLASSES, 1)

    def forward(self, x):
        return self.fc(self.body(x)[:, :, None, None]).flatten(1)


class Whole(Plain):
    """Of which only the output of a part is known, a mapping."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_classes = NUM_CLASSES
            self.weight = nn.Parameter(torch.randn(5, NUM_CLASSES))

        def forward(self, x):
            return {"logits": x @ self.weight}

    def build(self, dropout):
        self.net = self.Net()

    def forward(self, x):
        return self.net(x)["logits"]


class Late(Plain):
    def build(self, dropout):
        super().build(dropout)
        del self.fc

    def configure_model(self):
        if not hasattr(self, "fc"):
            self.fc = nn.Linear(16, NUM_CLASSES)


@pytest.mark.parametrize(
    ("make", "head"), [(TwoHeads, None), (Convolution, "fc"), (Whole, "net.forward"), (Late, None)]
)
def test_heads(tmp_path, make, head):
    diagnostics = CalibrationDiagnostics(SEEN, head=head)
    _, module = fit(tmp_path, diagnostics, module=make())
    with torch.no_grad():
        logits = module.eval()(HARD.tensors[0])
    check_evaluation(diagnostics.snapshots[-1], logits, HARD.tensors[1])
    check_levels(diagnostics.snapshots[-1], logits, HARD.tensors[1])
    assert (diagnostics.snapshots[-1].norms is None) == (make is Whole)
    assert (tmp_path / "calibration_report.md").read_text().count("data:image/svg+xml") == (4 if make is Whole else 7)


class Compiled(Plain):
    def build(self, dropout):
        self.net = torch.compile(
            nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES)), backend="eager"
        )

    def forward(self, x):
        return self.net(x)


def test_a_compiled_model_that_ran_before(tmp_path):
    diagnostics, module = CalibrationDiagnostics(SEEN), Compiled()
    with torch.no_grad():
        for x, _ in val():
            module.eval()(x)
    fit(tmp_path, diagnostics, module=module.train())
    with torch.no_grad():
        check_evaluation(diagnostics.snapshots[-1], module.eval()(HARD.tensors[0]), HARD.tensors[1])


def test_averaged_weights_are_evaluated_and_the_trained_ones_analysed(tmp_path):
    for order in (0, 1):
        diagnostics, averaging = CalibrationDiagnostics(SEEN), EMAWeightAveraging(decay=0.9)
        seen = []

        class Watch(Callback):
            def on_validation_batch_start(self, trainer, pl_module, *_, seen=seen):
                seen.append(copy.deepcopy(pl_module.state_dict()))

            def on_validation_end(self, trainer, pl_module, seen=seen):
                seen.append(pl_module.fc.weight.detach().clone())

        callbacks = [averaging, diagnostics][:: 1 if order else -1]
        fit(tmp_path, *callbacks, Watch(), num_sanity_val_steps=0)
        *_, averaged, trained = seen
        module = Plain()
        module.load_state_dict(averaged)
        with torch.no_grad():
            check_evaluation(diagnostics.snapshots[-1], module.eval()(HARD.tensors[0]), HARD.tensors[1])
        check_weights(diagnostics.snapshots[-1], pretrained().fc.weight.detach(), trained)
        assert not torch.equal(trained, averaged["fc.weight"])


def test_batches_that_cannot_be_counted_are_told_once(tmp_path):
    class Twice(Plain):
        def validation_step(self, batch, batch_idx):
            self(batch[0]), self(batch[0])

    diagnostics = CalibrationDiagnostics(SEEN)
    with pytest.warns(UserWarning, match="ignores some batches. Expected one forward .* a batch of 7 labels") as met:
        fit(tmp_path, diagnostics, module=Twice())
    assert sum("ignores some batches" in str(each.message) for each in met) == 1
    assert [each.levels for each in diagnostics.snapshots] == [None] * 3
    assert (tmp_path / "calibration_report.md").exists()

    class Soft(Plain):
        def loss(self, batch):
            return super().loss((batch[0], batch[1].argmax(1)))

    soft = torch.utils.data.TensorDataset(
        TRAIN.tensors[0], nn.functional.one_hot(TRAIN.tensors[1], NUM_CLASSES).float()
    )
    with (
        pytest.warns(UserWarning, match="tensor of class ids.*Or pass `seen_classes`"),
        pytest.warns(UserWarning, match="writes no report, because no epoch"),
    ):
        fit(tmp_path, CalibrationDiagnostics(), module=Soft(), train=loader(soft), data=val(soft))


def test_labels_are_mapped(tmp_path):
    class Mapped(Plain):
        def loss(self, batch):
            return super().loss((batch[0], torch.tensor([*SEEN, *ABSENT])[batch[1]]))

    def renumbered(dataset):
        inputs, target = dataset.tensors
        positions = torch.tensor([[*SEEN, *ABSENT].index(label) for label in target.tolist()])
        return torch.utils.data.TensorDataset(inputs, positions)

    plain, mapped = CalibrationDiagnostics(), CalibrationDiagnostics(class_map=[*SEEN, *ABSENT])
    fit(tmp_path, plain)
    module = Mapped()
    module.load_state_dict(pretrained().state_dict())
    fit(tmp_path, mapped, module=module, train=loader(renumbered(TRAIN)), data=val(renumbered(HARD)))
    assert mapped.snapshots == plain.snapshots


def test_plain_arguments_for_a_config_file():
    parser = ArgumentParser()
    parser.add_class_arguments(CalibrationDiagnostics, "diagnostics")
    config = parser.parse_string("diagnostics: {seen_classes: [0, 2], every_n_epochs: 5, output: page.html}")
    diagnostics = parser.instantiate_classes(config).diagnostics
    assert (diagnostics.seen_classes, diagnostics.every_n_epochs, diagnostics.output) == ([0, 2], 5, "page.html")
